"""DVC's graph as data, and one of its stages reproduced in a process group of its own."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

GRACE_S = 10.0


class Outcome(Enum):
    """How a stage ended: it ran, had nothing to do, or came out of DVC's run cache."""

    COMPLETED = "Completed"
    CACHED = "Cached"
    RESTORED = "Restored"


class StageError(RuntimeError):
    """A stage failed, took too long or was ended."""


class BusyError(RuntimeError):
    """Another flow works in this workspace."""


@dataclass(frozen=True)
class Stage:
    """A stage of ``dvc.yaml`` with the names of the stages whose outputs it reads."""

    name: str
    upstream: tuple[str, ...]


def read(workspace: Path) -> list[Stage]:
    """Return the stages of ``dvc.yaml``, each after those that it needs."""
    stages = yaml.safe_load((workspace / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    outs = {name: _paths(stage, "outs", "metrics", "plots") for name, stage in stages.items()}
    upstream = {
        name: {
            other
            for dep in _paths(stage, "deps")
            for other, written in outs.items()
            if any(dep.is_relative_to(out) for out in written)
        }
        for name, stage in stages.items()
    }
    order = TopologicalSorter(upstream).static_order()
    return [Stage(name, tuple(sorted(upstream[name]))) for name in order]


@contextmanager
def exclusive(workspace: Path) -> Iterator[int]:
    """Hold the workspace for one flow; yield the lock's file descriptor.

    The lock ends with the last process that holds the descriptor, so stages inherit it: a flow that
    was killed still keeps others out while a stage of its runs on.

    Raises:
        BusyError: another flow holds it.
    """
    path = workspace / ".dvc" / "tmp" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(
                f"another flow works in {workspace.resolve()}: process {file.read().strip()}. "
                f"One at a time; wait for it or end it."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


class Runner:
    """Reproduces stages of one workspace, each in its own process group, until it is closed."""

    def __init__(self, workspace: Path, *, timeout_s: float, inherit: tuple[int, ...] = ()) -> None:
        """Take the workspace, the longest time for one stage and descriptors to hand down."""
        self._workspace = workspace
        self._timeout_s = timeout_s
        self._inherit = inherit
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._closed = False

    def reproduce(self, stage: str, log: Callable[[str], object]) -> Outcome:
        """Run ``dvc repro --single-item STAGE``; each line of its output goes to ``log``.

        Raises:
            StageError: it failed, took longer than the timeout or was ended; the message is the
                line in which it said why.
        """
        process = self._start(stage)
        is_over_time = threading.Event()

        def end() -> None:
            is_over_time.set()
            _end_group(process)

        timer = threading.Timer(self._timeout_s, end)
        timer.start()
        lines = []
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    if text := line.rstrip():
                        lines.append(text)
                        log(text)
            code = process.wait()
        finally:
            timer.cancel()
            with self._lock:
                self._running.discard(process)
        if self._closed:
            raise StageError(f"{stage} was ended with the flow")
        if is_over_time.is_set():
            raise StageError(f"{stage} took longer than {self._timeout_s:g} s and was ended")
        if code != 0:
            raise StageError(_reason(stage, lines, code))
        return _outcome(lines)

    def close(self) -> None:
        """End every running stage with all of its processes, and start none again."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            _end_group(process)

    def _start(self, stage: str) -> "subprocess.Popen[str]":
        beside_python = str(Path(sys.executable).parent)
        path = os.pathsep.join([beside_python, os.environ.get("PATH", "")])
        with self._lock:
            if self._closed:
                raise StageError(f"{stage} was not started: the flow ends")
            process = subprocess.Popen(
                ["dvc", "--wait-for-lock", "repro", "--single-item", stage],
                cwd=self._workspace,
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="backslashreplace",
                start_new_session=True,
                pass_fds=self._inherit,
            )
            self._running.add(process)
        return process


def _paths(stage: dict[str, Any], *keys: str) -> list[PurePosixPath]:
    """Return a stage's paths; an entry is a path, or a mapping from it to its options."""
    entries = [entry for key in keys for entry in stage.get(key, [])]
    return [
        PurePosixPath(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries
    ]


def _end_group(process: "subprocess.Popen[str]") -> None:
    """Ask the whole process group to end, then make it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _reason(stage: str, lines: list[str], code: int) -> str:
    """Return tlpipe's own line if it said one, else DVC's."""
    for mark in ("tlpipe: ", "ERROR: "):
        for line in reversed(lines):
            if line.startswith(mark):
                return f"{stage}: {line.removeprefix(mark)}"
    return f"{stage} ended with exit code {code}"


def _outcome(lines: list[str]) -> Outcome:
    """Read from DVC's own words what it did."""
    for line in lines:
        if line.startswith("Stage '"):
            if line.endswith("didn't change, skipping"):
                return Outcome.CACHED
            if "is cached - skipping run" in line:
                return Outcome.RESTORED
    return Outcome.COMPLETED
