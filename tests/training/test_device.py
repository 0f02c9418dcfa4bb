"""Whether training is compiled, and what is said where it cannot be."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from tlpipe.training.trainer import missing_to_compile, pays_to_compile


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are looked for; it is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_a_missing_compiler_is_named(tools: Path) -> None:
    assert missing_to_compile().endswith("a C compiler (cc)")
    (tools / "cc").touch(0o755)
    has_triton = importlib.util.find_spec("triton") is not None
    assert missing_to_compile() == ("" if has_triton else "Triton")


def test_a_long_training_on_a_gpu_says_that_it_is_not_compiled(
    tools: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    with caplog.at_level(logging.WARNING, "tlpipe.training.trainer"):
        assert not pays_to_compile(cpu, 5000)
        assert not pays_to_compile(gpu, 1999)
        assert caplog.messages == []
        assert not pays_to_compile(gpu, 2000)
    (said,) = caplog.messages
    assert said.endswith("a C compiler (cc) not found: training 2000 steps without torch.compile")
    (tools / "cc").touch(0o755)
    has_triton = importlib.util.find_spec("triton") is not None
    assert pays_to_compile(gpu, 2000) == has_triton
