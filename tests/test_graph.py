"""One vocabulary: DVC stage = command = section of params.yaml = verb file = Prefect task."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path, PurePosixPath

import grimp
import pytest
import yaml

from flows.graph import read
from tests.conftest import ROOT
from tlpipe.cli import STAGES

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NAMES = list(DVC)


def paths(stage: str, *keys: str) -> list[str]:
    entries = [entry for key in keys for entry in DVC[stage].get(key, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def test_one_name_in_every_place() -> None:
    assert list(STAGES) == NAMES
    assert set(yaml.safe_load((ROOT / "params.yaml").read_text())) == set(NAMES)
    assert {stage.name for stage in read(ROOT)} == set(NAMES)
    printed = subprocess.run(["tlpipe", "--help"], capture_output=True, text=True, check=True)
    for name, module in STAGES.items():
        assert module.rpartition(".")[2] == name
        assert (ROOT / file_of(module)).is_file()
        assert re.search(rf"^│ {name} ", printed.stdout, re.MULTILINE)
        assert DVC[name]["cmd"].startswith(f"tlpipe {name} --")


@pytest.mark.parametrize("stage", NAMES)
def test_paths_in_the_command_are_the_deps_and_outs(stage: str) -> None:
    words = shlex.split(DVC[stage]["cmd"])[2:]
    options, named = words[::2], words[1::2]
    assert all(option.startswith("--") for option in options)
    read_paths = [p for p in paths(stage, "deps") if p.startswith("artifacts/")]
    written = paths(stage, "outs", "metrics", "plots")
    assert sorted(named) == sorted(read_paths + written)
    for path in written:
        # In Git, where nothing of artifacts is.
        assert path.startswith(f"artifacts/{stage}/") or (stage, path) == ("split", "splits.csv")
    help_text = subprocess.run(
        ["tlpipe", stage, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option, path in zip(options, named, strict=True):
        kind = "Output" if path in written else "Input"
        assert re.search(rf"{option}\b.*{kind}", help_text), (option, kind)


@pytest.mark.parametrize("stage", NAMES)
def test_code_deps_are_the_import_closure(stage: str) -> None:
    graph = grimp.build_graph("tlpipe")
    closure = {STAGES[stage], *graph.find_upstream_modules(STAGES[stage])}
    code = [p for p in paths(stage, "deps") if p.startswith("tlpipe/")]
    assert code == sorted(file_of(module) for module in closure)


@pytest.mark.parametrize("stage", NAMES)
def test_the_section_is_the_stage_s_model(stage: str) -> None:
    assert DVC[stage]["params"] == [stage]
    model = importlib.import_module(STAGES[stage]).Params
    section = yaml.safe_load((ROOT / "params.yaml").read_text())[stage]
    assert set(section) <= set(model.model_fields)


def test_every_dep_is_a_file_an_output_or_the_source() -> None:
    outputs = {path for stage in NAMES for path in paths(stage, "outs", "metrics", "plots")}
    for stage in NAMES:
        for dep in paths(stage, "deps"):
            is_source = dep in ("${ingest.source}", "${evaluate.ood}")
            is_output = any(PurePosixPath(dep).is_relative_to(path) for path in outputs)
            assert is_output or is_source or (ROOT / dep).is_file(), dep
    assert [s for s in NAMES if "${ingest.source}" in paths(s, "deps")] == ["ingest"]


def test_byte_code_never_counts(tmp_path: Path) -> None:
    folders = {str(Path(dep).parent) for stage in NAMES for dep in paths(stage, "deps")}
    compiled = [f"{folder}/__pycache__/x.pyc" for folder in sorted(folders)]
    checked = subprocess.run(
        ["dvc", "check-ignore", *compiled], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert checked.stdout.split("\n")[:-1] == compiled


def test_the_order_is_that_of_the_data() -> None:
    upstream = {stage.name: stage.upstream for stage in read(ROOT)}
    assert upstream == {
        "ingest": (),
        "split": ("ingest",),
        "embed": ("ingest",),
        "audit": ("embed", "ingest", "split"),
        "train": ("embed", "ingest", "split"),
        "export": ("ingest", "split", "train"),
        "evaluate": ("export", "ingest", "split", "train"),
        "register": ("audit", "evaluate", "export", "ingest", "split", "train"),
    }
