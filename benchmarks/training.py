"""What training costs: ``python benchmarks/training.py [--photos FOLDER] [--no-fastai]``.

tlpipe against the loop of PyTorch's tutorial and fastai's ``fine_tune``, with the same
weights on the same photographs, in turns. Times are CPU seconds, user + system of whole commands,
imports and decoding included, but for the rows that say "a step". fastai comes into an environment
of its own in the user's cache folder, the first time.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import peers
import yaml
from accuracy import test_images
from costs import Cost, measure, total
from rich.console import Console
from rich.table import Table

from tlpipe import files
from tlpipe.backbones import activations
from tlpipe.backbones.activations import Origin
from tlpipe.backbones.backbone import describe
from tlpipe.data.manifest import Assignment, image_key, load_split, save_split
from tlpipe.graph import FILE, LOCK, PARAMS, PATHS
from tlpipe.project import Project
from tlpipe.training import model

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
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
from tlpipe.graph import PATHS
from tlpipe.training import model, trainer, tuning
from tlpipe.training.batches import batches
from tlpipe.training.recipe import Recipe
root, count = Path(sys.argv[1]), int(sys.argv[2])
recipe = Recipe()
data = model.load_dataset(root / PATHS["activations"], root / PATHS["split"])
task, _ = tuning.prepare(data, root / PATHS["pixels"], recipe)
training = trainer.Training(task, recipe, None)
training.model.open_last(len(training.model.stages))
training.set_learning_rates(0.1)
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


def settings(folder: Path, photos: Path, freeze: str, epochs: int = 10) -> None:
    """Write params.yaml."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"]["source"] = str(photos)
    params["embed"]["freeze"] = freeze
    params["train"]["epochs"] = epochs
    (folder / PARAMS).write_text(yaml.safe_dump(params))
    Project(folder).generate()


def ours(folder: Path, env: Mapping[str, str] = ENVIRONMENT) -> Cost:
    """Run everything from the files to the trained model, anew."""
    for path in folder.iterdir():
        if path.name not in (FILE, PARAMS, LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tlpipe = [sys.executable, "-m", "tlpipe"]
    stages = ("ingest", "split", "embed", "train")
    return total([measure([*tlpipe, stage], folder, env) for stage in stages])


def in_turns(rounds: int, *tasks: Callable[[], float]) -> list[float]:
    """Run the tasks one after the other, several times; return each one's median."""
    found = [[task() for task in tasks] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*found, strict=True)]


def cpu_s(command: list[str]) -> float:
    """Return the CPU seconds of a command."""
    return measure(command, ROOT, ENVIRONMENT).cpu_s


def made_activations(folder: Path, images: int, origin: Origin) -> None:
    """Write activations of random numbers, and a split table of as many images."""
    (folder / PATHS["activations"]).mkdir(parents=True)
    (folder / PATHS["split"]).parent.mkdir()
    random = np.random.default_rng(0)
    shape = LITE0.stages[LITE0.position(OPEN_TWO) - 1].shape
    writer = activations.Writer(
        folder / PATHS["activations"],
        origin,
        width=1280,
        boundary=(1, *shape),
        known=None,
    )
    rows = []
    for number in range(images):
        sha256 = f"{number * 2654435761 % 2**64:016x}" + "0" * 48
        part = ("train", "train", "train", "validation")[number % 4]
        rows.append(
            Assignment(f"{number}.jpg", "ab"[number // 4 % 2], part, "", sha256[:16], sha256, "")
        )
        one = random.standard_normal((1, *shape), dtype=np.float32).astype(np.float16)
        features = random.standard_normal(1280, dtype=np.float32).astype(np.float16)
        writer.append(image_key(sha256, ""), features, one)
    writer.finish()
    save_split(folder / PATHS["split"], rows)


class Report:
    """The table; every row is shown on standard error as soon as it is known."""

    def __init__(self) -> None:
        self.table = Table("what", "peer", "tlpipe", "ratio", "goal", "reached", title="training")

    def faster(self, what: str, peer: float, own: float, unit: str, goal: float) -> None:
        """Add how many times less we need."""
        self._add(what, peer, own, unit, peer / own, f">= {goal:g}", peer / own >= goal)

    def smaller(self, what: str, peer: float, own: float, unit: str, goal: float) -> None:
        """Add which share of the peer's we need."""
        self._add(what, peer, own, unit, own / peer, f"<= {goal:.3g}", own / peer <= goal)

    def _add(
        self, what: str, peer: float, own: float, unit: str, ratio: float, goal: str, reached: bool
    ) -> None:
        cells = (f"{peer:.1f} {unit}", f"{own:.1f} {unit}", f"{ratio:.2f}", goal)
        self.table.add_row(what, *cells, "yes" if reached else "no")
        print(what, *cells, file=sys.stderr, flush=True)


def head_only(report: Report, photos: Path, work: Path) -> None:
    """Compare the solved head with epochs over the photographs, frozen part cold and exported."""
    settings(work, photos, "all")
    cold = ours(work, ENVIRONMENT | {"XDG_CACHE_HOME": str(work.parent / "cache")})
    command = peers.tutorial(photos, len(LITE0.stages), 10, "--plain")
    peer, own = in_turns(2, lambda: cpu_s(command), lambda: ours(work).cpu_s)
    report.faster("head only, exported before, against 10 epochs", peer, own, "s", 20)
    report.faster("head only, cold, against 10 epochs", peer, cold.cpu_s, "s", 10)


def against_fastai(report: Report, photos: Path, work: Path) -> None:
    """Compare the solved head with fastai's defaults on the same split."""
    own = ours(work)
    split = work / PATHS["split"]
    data = model.load_dataset(work / PATHS["activations"], split)
    test = test_images(data, split)
    ((weight, bias),) = model.load(work / PATHS["model"]).head
    logits = data.activations.features[test.rows].astype(np.float32) @ weight.T + bias
    accuracy = (logits.argmax(1) == test.labels).mean()
    rows = [(photos / row.path, row.label, row.split) for row in load_split(split)]
    files.write_csv(work.parent / "table.csv", ("path", "label", "split"), rows)
    peer = measure(peers.fastai(work.parent / "table.csv", 1, 0), ROOT)
    report.smaller("fine_tune(1) of fastai, CPU", peer.cpu_s, own.cpu_s, "s", 1 / 3)
    report.smaller("fine_tune(1) of fastai, memory", peer.peak_mb, own.peak_mb, "MB", 0.5)
    theirs = json.loads(peer.said)["accuracy"]
    report.table.caption = (
        f"accuracy of the rows of fine_tune: fastai {theirs:.3f}, ours {accuracy:.3f}"
    )


def last_stages(report: Report, photos: Path, work: Path) -> None:
    """Compare training from stored activations with a loop that computes them in every epoch."""
    settings(work, photos, OPEN_TWO)
    command = peers.tutorial(photos, len(LITE0.stages) - 2, 10)
    peer, own = in_turns(1, lambda: cpu_s(command), lambda: ours(work).cpu_s)
    report.faster("last two stages open, 10 epochs", peer, own, "s", 4)


def steps(report: Report, photos: Path, work: Path) -> None:
    """Compare a step in which every stage learns."""
    settings(work, photos, "none", epochs=1)
    ours(work)

    def peer(*options: str) -> float:
        command = peers.tutorial(photos, 0, 9, "--steps", "8", *options)
        return float(json.loads(measure(command, ROOT, ENVIRONMENT).said)["ms_an_image"])

    command = [sys.executable, "-c", STEPS, str(work), "8"]
    plain, tuned, own = in_turns(
        3, peer, lambda: peer("--tuned"), lambda: float(measure(command, ROOT, ENVIRONMENT).said)
    )
    report.faster("nothing frozen, an image of a step", plain, own, "ms", 2)
    report.faster("the same, allocator and channels last tuned", tuned, own, "ms", 1.3)


def memory(report: Report, photos: Path, root: Path, origin: Origin) -> None:
    """Compare what training from stored activations of few and of many images takes."""
    peaks = []
    for images in (2000, 20000):
        folder = root / str(images)
        folder.mkdir()
        settings(folder, photos, OPEN_TWO, epochs=1)
        made_activations(folder, images, origin)
        command = [sys.executable, "-c", MEMORY, "train"]
        peaks.append(float(measure(command, folder, ENVIRONMENT).said))
        shutil.rmtree(folder)
    few, many = peaks
    report.smaller("peak memory, 20,000 against 2,000 images", few, many, "MB", 1.1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    photos = ROOT.parent / "shared" / "data" / "hymenoptera"
    parser.add_argument("--photos", type=Path, default=photos)
    parser.add_argument("--no-fastai", action="store_true")
    given = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name) / "work"
        work.mkdir()
        head_only(report, given.photos, work)
        if not given.no_fastai:
            against_fastai(report, given.photos, work)
        last_stages(report, given.photos, work)
        origin = activations.load(work / "embed/activations").origin
        memory(report, given.photos, Path(name), origin)
        steps(report, given.photos, work)
    Console(width=110).print(report.table)


if __name__ == "__main__":
    main()
