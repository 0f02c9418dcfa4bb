"""Trainings that are killed, stopped, raced or starved: real processes, real signals."""

import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Workspace, copy_repository
from tlpipe import files
from tlpipe.learning import train

RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch": 4,
    "mix": "mixup",
    "average": 0.8,
    "batch_norm": "batch",
    "checkpoint_minutes": 1e-6,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A data set embedded up to the last two stages."""
    path = tmp_path_factory.mktemp("prepared")
    for number, label in enumerate(("dark", "light")):
        (path / "photos" / label).mkdir(parents=True)
        for i in range(14):
            shade = 40 + 150 * number + 3 * i
            picture = Image.new("RGB", (40 + i, 48), (shade, shade // 2, i))
            picture.save(path / "photos" / label / f"{i}.png")
    workspace = copy_repository(path / "copy", cache_env)
    workspace.set_source(path / "photos")
    workspace.configure("embed", freeze="blocks5")
    workspace.run("dvc", "repro", "--quiet", "split", "embed")
    return workspace


def training(folder: Path, prepared: Path, recipe: dict[str, Any], threads: int = 2) -> None:
    """Train, as the command does; in a process of its own."""
    given = prepared / "artifacts"
    train.run(
        activations=given / "embed/activations",
        pixels=given / "ingest/pixels",
        split=given / "split/split.csv",
        model=folder / "model",
        history=folder / "history.csv",
        params=train.Params(**recipe),
    )


@pytest.fixture(scope="module")
def start(prepared: Workspace) -> Callable[..., multiprocessing.Process]:
    """Start a training in a process of its own, forked where torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tlpipe.learning.tuning", "timm", "torchvision"])

    def start(folder: Path, **changes: Any) -> multiprocessing.Process:
        arguments = (folder, prepared.path, RECIPE | changes)
        process = context.Process(target=training, args=arguments)
        process.start()
        return process  # type: ignore[return-value]

    return start


def finished(process: multiprocessing.Process) -> None:
    process.join(120)
    assert process.exitcode == 0


def result(folder: Path) -> dict[str, str]:
    paths = [folder / "history.csv", *sorted((folder / "model").iterdir())]
    return {path.name: files.sha256(path) for path in paths}


@pytest.fixture(scope="module")
def undisturbed(
    start: Callable[..., multiprocessing.Process], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], float]:
    """What a training comes to that nobody disturbs, and how long it takes."""
    finished(start(tmp_path_factory.mktemp("warm")))
    folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    finished(start(folder))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "history.csv", "model"]
    return result(folder), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.fault("T01", "T03")
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_training_ends_in_the_same_bytes(
    start: Callable[..., multiprocessing.Process],
    undisturbed: tuple[dict[str, str], float],
    tmp_path: Path,
    seed: int,
) -> None:
    """Killed five times each, at points drawn over its whole length: twenty kills in all."""
    draw = random.Random(seed)
    expected, duration = undisturbed
    for _ in range(5):
        process = start(tmp_path)
        process.join(draw.uniform(0.2, 0.9) * duration)
        process.kill()
        process.join()
    finished(start(tmp_path))
    assert result(tmp_path) == expected


@pytest.mark.fault("T06")
def test_other_parameters_start_from_the_beginning(
    start: Callable[..., multiprocessing.Process], tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    process = start(tmp_path / "one", epochs=50)
    wait_for_checkpoint(tmp_path / "one", process)
    process.kill()
    process.join()
    finished(start(tmp_path / "one", seed=5))
    finished(start(tmp_path / "two", seed=5))
    assert result(tmp_path / "one") == result(tmp_path / "two")


def wait_for_checkpoint(folder: Path, process: multiprocessing.Process) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(".checkpoints/*.json")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fault("T12")
def test_a_second_training_in_a_folder_is_refused_and_a_dead_one_is_not_waited_for(
    start: Callable[..., multiprocessing.Process], prepared: Workspace, tmp_path: Path
) -> None:
    process = start(tmp_path, epochs=1000)
    wait_for_checkpoint(tmp_path, process)
    refused = command(prepared, tmp_path, code=10)
    assert f"runs in {tmp_path} already, as process {process.pid}; expected one" in refused
    process.kill()
    process.join()
    finished(start(tmp_path, epochs=1))


def command(prepared: Workspace, folder: Path, *, code: int) -> str:
    return prepared.run(*arguments(folder), code=code).stderr


def arguments(folder: Path) -> list[str]:
    known = ("--activations", "artifacts/embed/activations", "--pixels", "artifacts/ingest/pixels")
    outputs = ("--model", str(folder / "model"), "--history", str(folder / "history.csv"))
    return ["tlpipe", "train", *known, "--split", "artifacts/split/split.csv", *outputs]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_asked_to_stop_says_how_to_go_on(
    prepared: Workspace,
    tmp_path: Path,
    number: int,
) -> None:
    workspace = Workspace(tmp_path, prepared.env)
    shutil.copytree(prepared.path / "artifacts", tmp_path / "artifacts")
    shutil.copyfile(prepared.path / "params.yaml", tmp_path / "params.yaml")
    workspace.configure("train", **RECIPE | {"epochs": 500})
    (tmp_path / "out").mkdir()

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            arguments(tmp_path / "out"),
            cwd=tmp_path,
            env=workspace.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )

    with begin() as process:
        deadline = time.monotonic() + 90
        while not (tmp_path / "out" / "history.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped in epoch" in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("everything is kept. Run 'dvc repro' to go on.")
    assert not (tmp_path / "out" / "model").exists()
    with begin() as again:
        assert again.stderr is not None
        assert any("going on from a checkpoint at epoch" in line for line in again.stderr)
        again.kill()


STARVED = """
import resource, sys
from pathlib import Path
from tests.learning import test_resume
import torch, timm, torchvision
import tlpipe.learning.tuning
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
recipe = test_resume.RECIPE | {"hidden": [1_000_000]}
test_resume.training(Path(sys.argv[1]), Path(sys.argv[2]), recipe)
"""


@pytest.mark.fault("T08")
def test_too_little_memory_is_said_at_once(prepared: Workspace, tmp_path: Path) -> None:
    """There are no loader workers that could die: a step reads its own rows."""
    began = time.monotonic()
    result = prepared.run(sys.executable, "-c", STARVED, str(tmp_path), ".", code=1, timeout=90)
    assert "TrainingError: there is not enough memory to train" in result.stderr
    assert "Lower train.batch, now 4, or freeze more" in result.stderr
    assert time.monotonic() - began < 60
