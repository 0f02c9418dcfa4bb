"""What many classes cost: ``python benchmarks/classes.py``.

Runs the pipeline on drawn pictures of 10, 100 and 1,000 classes with three images each, and prints
for each stage CPU seconds (user + system, of all its processes), wall seconds and the peak memory
of its largest process, then the largest files that it wrote beside pixels and networks.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from costs import Cost, measure
from PIL import Image
from rich.console import Console
from rich.table import Table

from tlpipe.graph import STAGES

ROOT = Path(__file__).resolve().parent.parent
CLASSES, IMAGES = (10, 100, 1000), 3
# Memory grows with the images at most: these are ten times as many.
MOST_GROWTH, MOST_REPORT_MB = 10.0, 1.0
# These grow with images and networks, however many classes there are.
_OTHERS = ("pixels", "activations", "bundle", "model", ".activations", ".checkpoints")


def draw(folder: Path, classes: int) -> None:
    """Draw pictures: a class is a pattern of colours, an image adds noise of its own."""
    random = np.random.default_rng(classes)
    for number in range(classes):
        pattern = random.integers(0, 256, (6, 6, 3))
        path = folder / f"class {number:04d}"
        path.mkdir(parents=True)
        for i in range(IMAGES):
            noisy = np.clip(pattern + random.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
            picture = Image.fromarray(noisy).resize((224, 224), Image.Resampling.BICUBIC)
            picture.save(path / f"{i}.png")


def run(classes: int, scratch: Path) -> tuple[dict[str, Cost], dict[str, int]]:
    """Run every stage in a clone; return what each cost, and the sizes of files in bytes."""
    clone = scratch / str(classes)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    draw(clone / "photos", classes)
    path = clone / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["ingest"]["source"] = "photos"
    path.write_text(yaml.safe_dump(params))
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_"))},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(clone),
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }
    costs = {
        name: measure(["dvc", "repro", "-q", "--single-item", name], clone, env) for name in STAGES
    }
    artifacts = clone / "artifacts"
    sizes = {
        str(file.relative_to(artifacts)): file.stat().st_size
        for file in artifacts.rglob("*")
        if file.is_file() and not set(file.relative_to(artifacts).parts) & set(_OTHERS)
    }
    return costs, sizes


def main() -> None:
    """Measure and print both tables."""
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        found = {classes: run(classes, Path(name)) for classes in CLASSES}
    table = Table("stage", *(f"{c} classes: CPU s, wall s, MB" for c in CLASSES))
    for stage in STAGES:
        costs = [found[c][0][stage] for c in CLASSES]
        cells = [f"{cost.cpu_s:.1f}, {cost.wall_s:.1f}, {cost.peak_mb:.0f}" for cost in costs]
        table.add_row(stage, *cells)
    console.print(table)
    largest = sorted(found[CLASSES[-1]][1].items(), key=lambda item: -item[1])[:12]
    table = Table("file", *(f"{c} classes: KB" for c in CLASSES))
    for path, _ in largest:
        cells = [f"{found[c][1].get(path, 0) / 1e3:.1f}" for c in CLASSES]
        table.add_row(path, *cells)
    console.print(table)
    growth = {
        stage: found[CLASSES[-1]][0][stage].peak_mb / found[CLASSES[-2]][0][stage].peak_mb
        for stage in STAGES
    }
    worst = max(growth, key=lambda stage: growth[stage])
    report = found[CLASSES[-1]][1]["evaluate/report.json"] / 1e6
    for text, value, most in (
        (f"memory of {worst}, as a multiple of that of {CLASSES[-2]}", growth[worst], MOST_GROWTH),
        ("report.json, MB", report, MOST_REPORT_MB),
    ):
        holds = "holds" if value <= most else "DOES NOT HOLD"
        console.print(f"{CLASSES[-1]} classes: {text}: {value:.2f}, at most {most:g}: {holds}")


if __name__ == "__main__":
    main()
