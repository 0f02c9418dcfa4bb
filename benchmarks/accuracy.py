"""How right classifiers are: ``python benchmarks/accuracy.py [--data FOLDER] [--fastai 3]``.

Mean accuracy on test splits over seeds, each of which draws the split and the training anew, with
the 95 % interval of the mean (Student's t). What is frozen is embedded once for all seeds. With
``--fastai EPOCHS`` its ``fine_tune`` runs on the same images, splits and weights, and ours for as
many epochs, frozen by ``auto``.
"""

import argparse
import csv
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import peers
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from tlpipe import files
from tlpipe.data import pixels
from tlpipe.data.manifest import load_split
from tlpipe.graph import PATHS
from tlpipe.project import Project
from tlpipe.training import linear_probe, model, trainer, tuning
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.recipe import Recipe
from tlpipe.training.trainer import evaluate

ROOT = Path(__file__).resolve().parent.parent
# Student's t for 95 %, by the number of seeds.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


@dataclass(frozen=True)
class Case:
    """A row: a data set, how it is split, what is frozen, for how long; the goal.

    ``digits``: of the built-in ones, how many of each class.
    """

    data: str
    freeze: str
    epochs: int
    goal: float | None = None
    validation: float = 0.2
    test: float = 0.2
    views: int = 0
    few: int = 0
    digits: int = 100
    augmentation: Mapping[str, object] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """What is frozen, with the number of stored views."""
        return f"{self.freeze}, {self.views} views" if self.views else self.freeze


def few(freeze: str) -> Case:
    """Return a case of five training images a class."""
    return Case("digits", freeze, 20, few=5)


# A mirrored digit is none.
UPRIGHT = {"horizontal_flip": False, "min_crop_area": 0.8, "rotation_degrees": 10.0}
CASES = [
    Case("hymenoptera", "all", 10, goal=0.94),
    Case("hymenoptera", "all", 10, goal=0.95, views=8),
    Case("hymenoptera", "blocks5", 10),
    Case("hymenoptera", "blocks5", 10, views=8),
    Case("hymenoptera", "none", 5),
    Case("sign-digits", "all", 10, validation=0.15, test=0.15),
    Case("sign-digits", "blocks5", 10, validation=0.15, test=0.15),
    Case("sign-digits", "blocks3", 5, goal=0.98, validation=0.15, test=0.15),
    Case("rsscn", "all", 10),
    Case("rsscn", "auto", 10),
    Case("trash", "all", 10),
    Case("trash", "auto", 10),
    Case("digits", "all", 10),
    Case("digits", "all", 10, goal=0.90, digits=167),
    Case("digits", "blocks5", 10, goal=0.96, digits=167),
    Case("digits", "blocks5", 10),
    Case("digits", "blocks5", 10, views=8, augmentation=UPRIGHT),
    *(few(freeze) for freeze in ("all", "blocks6", "blocks5", "blocks4", "blocks3", "none")),
]


def tlpipe(folder: Path, stage: str) -> None:
    """Run a stage."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tlpipe", stage]
    subprocess.run(command, cwd=folder, check=True, env=environment, stderr=subprocess.DEVNULL)


def configure(folder: Path, source: Path, case: Case, seed: int) -> None:
    """Write params.yaml."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"] |= {"source": str(source), "max_rejected": 0.9}
    params["split"] |= {"validation": case.validation, "test": case.test, "seed": seed}
    params["embed"] |= {"freeze": case.freeze, "views": case.views}
    params["embed"]["augmentation"] = dict(case.augmentation)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    Project(folder).generate()


def prepare(folder: Path, source: Path, case: Case, seed: int) -> tuple[Dataset, Examples]:
    """Return the data, embedded and split anew, and the test images."""
    configure(folder, source, case, seed)
    if not (folder / PATHS["pixels"]).exists():
        tlpipe(folder, "ingest")
    (folder / PATHS["placements"]).unlink(missing_ok=True)
    tlpipe(folder, "split")
    kept = folder / case.level  # one for each level, which other seeds look at again
    if not kept.exists():
        tlpipe(folder, "embed")
        (folder / PATHS["activations"]).parent.rename(kept)
    data = model.load_dataset(kept / "activations", folder / PATHS["split"])
    test = test_images(data, folder / PATHS["split"])
    if case.few:
        train, validation = first(data.train, case.few), first(data.validation, case.few)
        data = replace(data, train=train, validation=validation)
    return data, test


def test_images(data: Dataset, split: Path) -> Examples:
    """Return what no training has seen."""
    assigned = load_split(split)
    rows = [i for i, row in enumerate(assigned) if row.split == "test"]
    numbers = {label: number for number, label in enumerate(data.labels)}
    return Examples(np.array(rows), np.array([numbers[assigned[row].label] for row in rows]))


def first(examples: Examples, count: int) -> Examples:
    """Return the first so many images of each class."""
    places = [np.flatnonzero(examples.labels == label)[:count] for label in set(examples.labels)]
    chosen = np.sort(np.concatenate(places))
    return Examples(examples.rows[chosen], examples.labels[chosen])


def accuracy(folder: Path, source: Path, case: Case, seed: int) -> float:
    """Train and return the accuracy on the test images."""
    data, test = prepare(folder, source, case, seed)
    recipe = Recipe(epochs=case.epochs, seed=seed)
    if not data.open_stages:
        found = linear_probe.fit(linear_probe.stored(data), data, data.labelled, recipe)
        features = np.concatenate(list(linear_probe.stored(data)(test.rows, False)))
        logits = found.head.logits(found.standard.apply(features))
        return float((logits.argmax(axis=1) == test.labels).mean())
    task, _ = tuning.prepare(data, folder / PATHS["pixels"], recipe)
    trainer.fine_tune(task, recipe, None, lambda _: None)
    return evaluate(task, task.classifier, test).accuracy


def fastai(folder: Path, epochs: int, seed: int) -> float:
    """Return the accuracy of fastai's ``fine_tune`` on the same split of the stored images."""
    squares, rows = pixels.load(folder / PATHS["pixels"]).array, []
    (folder / "png").mkdir(exist_ok=True)
    for number, row in enumerate(load_split(folder / PATHS["split"])):
        path = folder / "png" / f"{number}.png"
        if not path.exists():
            Image.fromarray(squares[number]).save(path, compress_level=1)
        rows.append((path, row.label, row.split))
    files.write_csv(folder / "table.csv", ("path", "label", "split"), rows)
    command = peers.fastai(folder / "table.csv", epochs, seed)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(said.splitlines()[-1])["accuracy"])


def interval(values: list[float]) -> str:
    """Return the mean and the half width of its interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} +- {half:.4f}"


def main() -> None:
    """Print the table."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6))
    parser.add_argument("--fastai", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--only", default="", help="Cases of this data set alone.")
    given = parser.parse_args()
    table = Table("data", "frozen", "epochs", "train", "accuracy", "goal", "reached")
    cases = [case for case in CASES if given.only in case.data]
    if given.fastai:
        names = dict.fromkeys(case.data for case in cases)
        cases = [Case(name, "auto", given.fastai) for name in names]
        table = Table("data", "frozen", "epochs", "train", "tlpipe", "fastai", "reached")
    with tempfile.TemporaryDirectory() as name:
        for case in cases:
            folder = Path(name) / f"{case.data} {case.digits}"
            folder.mkdir(exist_ok=True)
            source = given.data / case.data
            if case.data == "digits":
                drawn = yaml.safe_load((ROOT / "data" / "digits.yaml").read_text())
                source = folder / "digits.yaml"
                source.write_text(yaml.safe_dump(drawn | {"images_per_class": case.digits}))
            ours, peer = [], []
            for seed in range(given.seeds):
                ours.append(accuracy(folder, source, case, seed))
                if given.fastai:
                    peer.append(fastai(folder, given.fastai, seed))
            with (folder / PATHS["split"]).open(newline="") as file:
                splits = [(row["split"], row["label"]) for row in csv.DictReader(file)]
            classes = len({label for _, label in splits})
            train = case.few * classes or sum(split == "train" for split, _ in splits)
            start = (case.data, case.level, str(case.epochs), str(train), interval(ours))
            if given.fastai:
                reached = statistics.mean(ours) >= statistics.mean(peer)
                table.add_row(*start, interval(peer), "yes" if reached else "no")
            else:
                reached = case.goal is None or statistics.mean(ours) >= case.goal
                goal = "" if case.goal is None else f">= {case.goal}"
                table.add_row(*start, goal, "" if not goal else "yes" if reached else "no")
            print(start, interval(peer) if peer else "", file=sys.stderr, flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
