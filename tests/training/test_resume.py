"""Trainings that are killed, stopped, raced or starved: real processes, real signals.

Where a process is killed is a place in the code: it replaces a function by one that ends it there.
"""

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.conftest import Workspace
from tests.training.conftest import beside
from tlpipe import files
from tlpipe.training import model, train, trainer

TRAINED = "artifacts/train"  # where the command trains
RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 4,
    "mixup": "mixup",
    "ema_decay": 0.8,
    "batch_norm": "batch",
    "checkpoint_minutes": 1e-6,
}


Kill = Callable[[], None]


def training(folder: Path, prepared: Path, recipe: dict[str, Any], prepare: Kill | None) -> None:
    """Train, as the command does; in a process of its own, which says in a file what it does."""
    log = logging.FileHandler(folder / "log.txt")
    logging.getLogger("tlpipe").addHandler(log)
    logging.getLogger("tlpipe").setLevel(logging.INFO)
    if prepare is not None:
        prepare()
    given = prepared / "artifacts"
    train.run(
        activations=given / "embed/activations",
        pixels=given / "ingest/pixels",
        split=given / "split/split.csv",
        model=folder / "model",
        history=folder / "history.csv",
        params=train.Params(**recipe),
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner: Any, name: str, call: int, *, before: bool = False) -> None:
    """End the process right after, or before, one of the calls of a function, counted from 1."""
    function, calls = getattr(owner, name), 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == call:
            die()
        result = function(*arguments, **named)
        if calls == call:
            die()
        return result

    setattr(owner, name, counting)


def after_a_step() -> None:
    die_at(trainer.Training, "take_step", 3)


def in_the_middle_of_tensors() -> None:
    def half(tensors: Any, path: Path) -> None:
        content = safetensors.torch.save(tensors)
        path.write_bytes(content[: len(content) // 2])
        die()

    safetensors.torch.save_file = half


def between_tensors_and_index() -> None:
    die_at(files, "write_json", 4, before=True)


def before_old_ones_are_removed() -> None:
    die_at(files, "write_json", 2)


def behind_an_epoch() -> None:
    die_at(trainer.Training, "_record", 1)


def before_the_model() -> None:
    die_at(model, "save", 1, before=True)


def behind_the_model() -> None:
    die_at(model, "save", 1)


# Where a training is killed, and from where the next one resumes. An epoch has five steps, and a
# checkpoint is saved after each of them and behind each epoch.
KILLS: list[tuple[Kill, str]] = [
    (after_a_step, "epoch 1, step 3"),  # the third one is lost
    (in_the_middle_of_tensors, "epoch 1, step 3"),  # again
    (between_tensors_and_index, "epoch 1, step 6"),  # the epoch's end is lost
    (before_old_ones_are_removed, "epoch 2, step 2"),
    (behind_an_epoch, "epoch 2, step 6"),  # what was measured is lost
    (before_the_model, "epoch 4, step 1"),
    (behind_the_model, "epoch 4, step 1"),
]


@pytest.fixture(scope="module")
def start(prepared: Workspace) -> Callable[..., multiprocessing.Process]:
    """Start a training in a process of its own, forked where torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tlpipe.training.tuning", "timm", "torchvision"])

    def start(folder: Path, prepare: Kill | None = None, **changes: Any) -> multiprocessing.Process:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = (folder, prepared.path, RECIPE | changes, prepare)
        process = context.Process(target=training, args=arguments, daemon=True)
        process.start()
        return process  # type: ignore[return-value]

    return start


def finished(process: multiprocessing.Process) -> None:
    process.join()
    assert process.exitcode == 0


def killed(process: multiprocessing.Process) -> None:
    process.join()
    assert process.exitcode == -signal.SIGKILL


def result(folder: Path) -> dict[str, str]:
    paths = [folder / "history.csv", *sorted((folder / "model").iterdir())]
    return {path.name: files.sha256(path) for path in paths}


@pytest.mark.slow
@pytest.mark.fault("T01", "T03")
def test_a_killed_training_ends_in_the_same_bytes(
    start: Callable[..., multiprocessing.Process], tmp_path: Path
) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    finished(start(undisturbed))
    names = [".lock", "history.csv", "log.txt", "model"]
    assert sorted(path.name for path in undisturbed.iterdir()) == names
    for prepare, _ in KILLS:
        killed(start(disturbed, prepare))
    finished(start(disturbed))
    assert result(disturbed) == result(undisturbed)
    said = (disturbed / "log.txt").read_text()
    resumed = re.findall(r"resumed from the checkpoint at (epoch \d, step \d)", said)
    assert resumed == [place for _, place in KILLS]
    assert "resumed" not in (undisturbed / "log.txt").read_text()


@pytest.mark.fault("T06")
def test_other_parameters_start_from_the_beginning(
    start: Callable[..., multiprocessing.Process], tmp_path: Path
) -> None:
    killed(start(tmp_path / "one", after_a_step))
    finished(start(tmp_path / "one", seed=5, epochs=1))
    assert "starting from the beginning" in (tmp_path / "one/log.txt").read_text()
    finished(start(tmp_path / "two", seed=5, epochs=1))
    assert result(tmp_path / "one") == result(tmp_path / "two")


class Paused:
    """Says that a step was taken, and then waits until it is killed."""

    def __init__(self, reached: Any) -> None:
        self._reached = reached

    def __call__(self) -> None:
        function = trainer.Training.take_step

        def waiting(*arguments: Any) -> float:
            function(*arguments)
            self._reached.set()
            signal.pause()
            raise AssertionError

        pytest.MonkeyPatch().setattr(trainer.Training, "take_step", waiting)


@pytest.mark.fault("T12")
def test_a_second_training_in_a_folder_is_an_error_and_a_dead_one_is_not_waited_for(
    start: Callable[..., multiprocessing.Process], prepared: Workspace, tmp_path: Path
) -> None:
    reached = multiprocessing.get_context("forkserver").Event()
    workspace, folder = beside(prepared, tmp_path), tmp_path / TRAINED
    process = start(folder, Paused(reached))
    reached.wait()
    refused = workspace.run("tlpipe", "train", code=10).stderr
    assert f"runs in {TRAINED} already, as process {process.pid}; expected one" in refused
    process.kill()
    killed(process)
    finished(start(folder, epochs=1))


def test_who_is_asked_to_stop_says_how_to_go_on_and_does(
    prepared: Workspace, tmp_path: Path
) -> None:
    workspace = beside(prepared, tmp_path)
    workspace.configure("train", **RECIPE | {"epochs": 500})

    def stop_by(number: int, begins: str) -> None:
        with subprocess.Popen(
            ("tlpipe", "train"),
            cwd=tmp_path,
            env=workspace.environment(),
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            assert any(begins in line for line in process.stderr)
            assert any("of 500: train loss" in line for line in process.stderr)
            process.send_signal(number)
            *_, last = process.stderr
        assert process.returncode == 130
        assert "stopped in epoch" in last
        assert last.endswith("everything is kept. Run 'tlpipe run' to resume.\n")
        assert not (tmp_path / TRAINED / "model").exists()

    stop_by(signal.SIGINT, "epoch 0 of 500: validation loss")
    stop_by(signal.SIGTERM, "resumed from the checkpoint at epoch")


STARVED = """
import resource, sys
from pathlib import Path
from tests.training import test_resume
import torch, timm, torchvision
import tlpipe.training.tuning
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
recipe = test_resume.RECIPE | {"hidden": [1_000_000]}
test_resume.training(Path(sys.argv[1]), Path(sys.argv[2]), recipe, None)
"""


@pytest.mark.fault("T08")
def test_too_little_memory_is_said_at_once(prepared: Workspace, tmp_path: Path) -> None:
    """There are no loader workers that could die: a step reads its own rows."""
    result = prepared.run(sys.executable, "-c", STARVED, str(tmp_path), ".", code=1)
    assert "TrainingError: there is not enough memory to train" in result.stderr
    assert "Lower train.batch_size, now 4, or freeze more" in result.stderr
