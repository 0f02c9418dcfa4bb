"""The graph: which stages there are, what each reads and writes, ``dvc.yaml``, and runs of it.

``dvc.yaml`` is generated: above a marked line it is what this module writes, below it stand the
user's own stages.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

from tlpipe import files

FILE, PARAMS, LOCK = "dvc.yaml", "params.yaml", "tlpipe.lock.yaml"
# Where everything lies in a project that a stage writes or reads, by the names of run's arguments.
PATHS = {
    "manifest": "artifacts/ingest/manifest.csv",
    "rejects": "artifacts/ingest/rejects.csv",
    "duplicates": "artifacts/ingest/duplicates.csv",
    "pixels": "artifacts/ingest/pixels",
    "data_report": "artifacts/ingest/report.json",
    "split": "artifacts/split/split.csv",
    "split_report": "artifacts/split/report.json",
    "placements": "splits.csv",
    "activations": "artifacts/embed/activations",
    "label_issues": "artifacts/audit/label_issues.csv",
    "leaks_report": "artifacts/audit/leaks.json",
    "shortcuts": "artifacts/audit/shortcuts.json",
    "data_plots": "artifacts/audit/plots",
    "model": "artifacts/train/model",
    "held_out": "artifacts/train/model/held_out.safetensors",
    "history": "artifacts/train/history.csv",
    "train_metrics": "artifacts/train/metrics.json",
    "bundle": "artifacts/export/bundle",
    "parity": "artifacts/export/parity.json",
    "report": "artifacts/evaluate/report.json",
    "speed": "artifacts/evaluate/speed.json",
    "predictions": "artifacts/evaluate/predictions.csv",
    "tables": "artifacts/evaluate/tables",
    "plots": "artifacts/evaluate/plots",
    "examples": "artifacts/evaluate/examples",
    "receipt": "artifacts/register/receipt.json",
}


@dataclass(frozen=True)
class Stage:
    """A stage: the module that holds its ``Params`` and ``run``, and what that reads and writes.

    Attributes:
        module: its name is the stage's, too.
        does: what it is for, one line.
        reads: names of ``PATHS``.
        writes: names of ``PATHS``.
        sources: the parameters that name what it reads from outside.
        optional_sources: those that name such a thing or are null.
        decided_by: parameters of other stages that decide what is auto in its own.
        decided_in: modules beside its own, and what they import, that decide such a value or its
            input, before ``run`` gets it.
        libraries: packages whose version changes what it writes.
        kept: of what it writes, what is still there when it runs again, since it looks at it, or
            since a refusal must leave it.
        uncached: of what it writes, what DVC does not keep.
        metrics: of what it writes, what DVC shows as metrics.
    """

    module: str
    does: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    sources: tuple[str, ...] = ()
    optional_sources: tuple[str, ...] = ()
    decided_by: tuple[str, ...] = ()
    decided_in: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    uncached: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


_NETWORK = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "timm", "torch", "torchvision")
STAGES = {
    "ingest": Stage(
        "tlpipe.data.ingest",
        "Read the source: list, check and decode its images once.",
        reads=(),
        writes=("manifest", "rejects", "duplicates", "pixels", "data_report"),
        sources=("ingest.source",),
        optional_sources=("ingest.decisions", "ingest.unlabelled"),
        decided_by=("embed.backbone",),
        decided_in=("tlpipe.backbones.sampling",),
        libraries=(
            *("mlxtend", "numpy", "pillow", "pillow-heif", "pyarrow", "scikit-image", "scipy"),
            *("timm", "torchvision"),  # whose configurations say how a backbone was trained
        ),
        kept=("manifest", "duplicates", "pixels", "data_report"),
    ),
    "split": Stage(
        "tlpipe.data.split",
        "Say which image trains, validates or tests.",
        reads=("manifest",),
        writes=("split", "split_report", "placements"),
        kept=("split", "split_report", "placements"),
        uncached=("placements",),
    ),
    "embed": Stage(
        "tlpipe.backbones.embed",
        "Run the pretrained network once over every image.",
        reads=("manifest", "pixels"),
        writes=("activations",),
        optional_sources=("embed.advice",),
        decided_in=("tlpipe.training.model",),  # which weights a registered model has
        libraries=("numpy", *_NETWORK),
    ),
    "audit": Stage(
        "tlpipe.training.audit",
        "Show the data set, its label issues, copies of held-out images in train, and shortcuts.",
        reads=("manifest", "pixels", "split", "activations", "data_report"),
        writes=("label_issues", "leaks_report", "shortcuts", "data_plots"),
        libraries=("cleanlab", "matplotlib", "numpy", "pillow", "scikit-learn", "scipy"),
    ),
    "train": Stage(
        "tlpipe.training.train",
        "Fit what is not frozen.",
        reads=("activations", "pixels", "split"),
        writes=("model", "history", "train_metrics"),
        libraries=("numpy", "scipy", "timm", "torch", "torchvision"),
        metrics=("train_metrics",),
    ),
    "export": Stage(
        "tlpipe.export.export",
        "Write the ONNX bundle, proven equal to the trained model.",
        reads=("model", "pixels", "split"),
        writes=("bundle", "parity"),
        libraries=("numpy", "pillow", "scipy", *_NETWORK),
    ),
    "evaluate": Stage(
        "tlpipe.evaluation.evaluate",
        "Measure the bundle on the test split.",
        reads=(*("bundle", "pixels", "manifest", "split", "held_out", "history", "leaks_report"),),
        writes=("report", "speed", "predictions", "tables", "plots", "examples"),
        optional_sources=("evaluate.ood",),
        libraries=(
            *("matplotlib", "mlxtend", "numpy", "onnxruntime", "pillow", "pillow-heif", "pyarrow"),
            *("scikit-image", "scipy"),
        ),
        metrics=("report",),
    ),
    "register": Stage(
        "tlpipe.registry.register",
        "Make the bundle a run and a model version in MLflow.",
        reads=(
            *("model", "bundle", "parity", "report", "speed", "predictions", "plots", "examples"),
            *("history", "data_report", "split_report", "rejects", "label_issues", "leaks_report"),
            *("shortcuts", "data_plots", "pixels", "manifest", "split"),
        ),
        writes=("receipt",),
        kept=("receipt",),  # or DVC's run cache would stand in for a registration
        uncached=("receipt",),
    ),
}
_FLOW_LOCK = "artifacts/.flow.lock"
# What 'dvc plots show' draws.
_PLOTS = f"""\
plots:
  - {PATHS["data_plots"]}
  - {PATHS["plots"]}
  - artifacts/explain/plots
  - curves:
      x: step
      y:
        {PATHS["history"]}: [train_loss, validation_loss]
      title: Training, or the l2 of a linear probe from the strongest on
  - confusion:
      x: label
      y:
        {PATHS["predictions"]}: predicted
      template: confusion
      title: Confusion on the test split
  - coverage:
      x: coverage
      y:
        {PATHS["tables"]}/coverage.csv: accuracy
      title: Accuracy where only the surest answers are given
  - reliability:
      x: confidence
      y:
        {PATHS["tables"]}/reliability.csv: accuracy
      title: How often answers of each confidence are right"""
MARK = "# Written by tlpipe"
_GENERATED = f"{MARK} down to the line that says so; 'tlpipe upgrade' keeps your changes."
_YOURS = "# End of what tlpipe generates. Your own stages go below; they stay."


def generated(named: Mapping[str, str] | None = None) -> str:
    """Return the generated part of ``dvc.yaml``.

    ``named``: what optional sources are in this project, by their parameters. It stands there as it
    is: DVC cannot read a dependency ``${...}`` whose parameter is null.
    """
    named = named or {}
    lines = [_GENERATED, _PLOTS, "stages:"]
    for name, stage in STAGES.items():
        sources = [f'"${{{source}}}"' for source in stage.sources]
        sources += [_literal(named[source]) for source in stage.optional_sources if source in named]
        lines += [
            f"  {name}:",
            f"    cmd: tlpipe {name}",
            # It hardly ever changes: Git can merge a command of the user's with what comes below.
            f"    desc: {json.dumps(stage.does)}",
            f"    params: [{', '.join([name, *stage.decided_by])}, {{{LOCK}: [stages.{name}]}}]",
            *_wrapped("deps", [*sources, *(PATHS[read] for read in stage.reads)]),
            "    outs:",
        ]
        for written in stage.writes:
            if written in stage.metrics:
                continue
            options = ["cache: false"] * (written in stage.uncached)
            options += ["persist: true"] * (written in stage.kept)
            kept = f": {{{', '.join(options)}}}" if options else ""
            lines.append(f"      - {PATHS[written]}{kept}")
        if stage.metrics:
            lines += _wrapped("metrics", [PATHS[metric] for metric in stage.metrics])
    return "\n".join([*lines, _YOURS, ""])


def _literal(path: str) -> str:
    """Return a path as YAML in which DVC replaces nothing, and which is no number or word of it."""
    return json.dumps(path.replace("${", "\\${"), ensure_ascii=False)


def watches(stage: dict[str, Any], source: str, path: str) -> bool:
    """Return whether a stage of a ``dvc.yaml`` depends on what a parameter names, here a path."""
    known = {path, path.replace("${", "\\${"), f"${{{source}}}"}
    return not {PurePosixPath(one) for one in known}.isdisjoint(_paths(stage, "deps"))


def _wrapped(key: str, paths: list[str]) -> list[str]:
    """Return a list of paths as YAML, in lines of at most 100 characters."""
    if not paths:
        return []
    lines = [f"    {key}: ["]
    for number, path in enumerate(paths):
        word = f"{path}{']' if number + 1 == len(paths) else ','}"
        if len(lines[-1]) + len(word) > 99:
            lines.append("      ")
        lines[-1] += word if lines[-1].endswith(("[", "      ")) else f" {word}"
    return [line.rstrip() for line in lines]


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
class Node:
    """A stage of ``dvc.yaml`` with the names of the stages whose outputs it reads."""

    name: str
    upstream: tuple[str, ...]


def read(folder: Path) -> list[Node]:
    """Return the stages of a project's ``dvc.yaml``, each after those that it needs.

    DVC itself says what depends on what, also through other files of its repository.
    """
    from dvc.repo import Repo

    path = str(folder.resolve() / FILE)
    with Repo(str(folder.resolve())) as repo:
        needs = repo.index.graph.adj  # of stages and of tracked data
        upstream: dict[str, set[str]] = {}
        for stage in (one for one in needs if one.path == path):
            known = upstream[stage.name] = set()
            waiting = list(needs[stage])
            while waiting:
                needed = waiting.pop()
                if needed.path == path:
                    known.add(needed.name)
                else:
                    waiting += needs[needed]
    order = TopologicalSorter(upstream).static_order()
    return [Node(name, tuple(sorted(upstream[name]))) for name in order]


@contextmanager
def exclusive(workspace: Path) -> Iterator[int]:
    """Hold the workspace for one flow; yield the lock's file descriptor.

    The lock ends with the last process that holds the descriptor, so stages inherit it: a flow that
    was killed still keeps others out while a stage of its runs on.

    Raises:
        BusyError: another flow holds it.
        FileNotFoundError: it holds no pipeline.
    """
    (workspace / FILE).stat()  # before a folder is made for the lock

    def error(process: str) -> BusyError:
        return BusyError(
            f"another flow works in {workspace.resolve()}: process {process}. One at a time; wait "
            f"for it or end it."
        )

    # Not below .dvc: a project may have none, and DVC would take one for a repository.
    with files.exclusive(workspace / _FLOW_LOCK, error) as lock:
        yield lock


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
            raise StageError(reason(stage, lines, code))
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


def reason(stage: str, lines: list[str], code: int) -> str:
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
