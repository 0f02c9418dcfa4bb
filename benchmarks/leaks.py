"""Leaks that bytes cannot show: ``python benchmarks/leaks.py [--data FOLDER] [--seeds 4]``.

Planted sets: originals of a real set, drawn anew for each seed, and in their place 5, 20 or 50
copies of each as augmentation tools write them: rotated by any angle, mirrored or not, sheared by
up to 15 degrees, zoomed by 0.9 to 1.15, brighter or darker, with black, mirrored or repeated
borders, as JPEG files in class folders; some 300 files a set, the copies without their originals.
They go through ``ingest`` and ``split`` as any folder does. Clean sets: the real sets as they are,
splits drawn anew for each seed. ``found``: runs with a warning; ``share``: the least and the most
of the held-out images looked at that have a copy in train; CPU seconds of ``leaks.find`` alone.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from tlpipe.backbones import sampling
from tlpipe.data import ingest, leaks, pixels, split
from tlpipe.data.manifest import load_manifest, load_split

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "efficientnet_lite0"
SETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "hymenoptera": {},
    "sign-digits": {},
    "rsscn": {},
    "trash": {},
    "voc-raccoon": {"background": "other"},
}
COPIES = (5, 20, 50)
FILES = 300
BORDERS = ("black", "reflect", "edge")


@dataclass(frozen=True)
class Result:
    """One run: whether it warns, the share of copies, and the CPU seconds it took."""

    warns: bool
    share: float
    cpu_s: float


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    given = parser.parse_args()
    logging.disable(logging.INFO)
    table = Table("set", "copies", "found", "share", "CPU s")
    total: dict[str, list[Result]] = {}
    for name in given.sets:
        with tempfile.TemporaryDirectory() as folder:
            clean = Path(folder, "clean")
            source = ROOT / "data/digits.yaml" if name == "digits" else given.data / name
            read(clean, source, **SETS[name])
            for copies in (0, *COPIES):
                results = list(runs(clean, Path(folder), copies, given.seeds))
                kind = str(copies or "clean")
                total.setdefault(kind, []).extend(results)
                table.add_row(name, kind, *summary(results))
                print(name, kind, *summary(results), flush=True)
    for kind, results in total.items():
        table.add_row("all", kind, *summary(results))
    Console(width=80).print(table)


def summary(results: list[Result]) -> tuple[str, str, str]:
    """Return what the table shows of some runs."""
    shares = [result.share for result in results]
    return (
        f"{sum(result.warns for result in results)} of {len(results)}",
        f"{min(shares):.0%} to {max(shares):.0%}",
        f"{max(result.cpu_s for result in results):.1f}",
    )


def runs(clean: Path, folder: Path, copies: int, seeds: int) -> Iterator[Result]:
    """Yield the result of each seed; ``copies``: of each original, 0 for the set as it is."""
    for seed in range(seeds):
        if copies:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                plant(clean, Path(name, "images"), copies, np.random.default_rng([seed, copies]))
                read(Path(name, "read"), Path(name, "images"))
                yield look(Path(name, "read"), seed)
        else:
            yield look(clean, seed)


def read(folder: Path, source: Path, **params: Any) -> None:
    """Run ``ingest`` into a folder, as the backbone of these benchmarks wants images."""
    folder.mkdir(exist_ok=True)
    ingest.run(
        manifest=folder / "manifest.csv",
        rejects=folder / "rejects.csv",
        duplicates=folder / "duplicates.csv",
        pixels=folder / "pixels",
        data_report=folder / "report.json",
        data_version="",
        params=sampling.resolve(ingest.Params(source=str(source), **params), BACKBONE),
    )


def look(folder: Path, seed: int) -> Result:
    """Split what was read, and look for leaks."""
    split.run(
        manifest=folder / "manifest.csv",
        split=folder / "split.csv",
        split_report=folder / "split.json",
        placements=folder / f"placements-{seed}.csv",
        params=split.Params(seed=seed),
    )
    assignments = load_split(folder / "split.csv")
    thumbnails = pixels.load(folder / "pixels").thumbnails
    start = time.process_time()
    found = leaks.find(thumbnails, assignments)
    cpu_s = time.process_time() - start
    content = found.content(assignments)
    counts = list(content["splits"].values())
    share = sum(c["copies"] for c in counts) / max(sum(c["images"] for c in counts), 1)
    return Result(content["is_above_clean"], share, cpu_s)


def plant(clean: Path, target: Path, copies: int, rng: np.random.Generator) -> None:
    """Write copies of originals that are drawn evenly from all classes."""
    squares = pixels.load(clean / "pixels").array
    rows: dict[str, list[int]] = {}
    for row, entry in enumerate(load_manifest(clean / "manifest.csv")):
        rows.setdefault(entry.label, []).append(row)
    originals = max(FILES // copies // len(rows), 1)
    border = BORDERS[rng.integers(len(BORDERS))]
    for label, members in rows.items():
        (target / label).mkdir(parents=True)
        for row in rng.choice(members, min(originals, len(members)), replace=False):
            for _ in range(copies):
                # Names without order, so that copies do not lie side by side.
                name = f"{rng.integers(2**48):012x}.jpg"
                changed(squares[int(row)], border, rng).save(target / label / name, quality=90)


def changed(square: npt.NDArray[np.uint8], border: str, rng: np.random.Generator) -> Image.Image:
    """Return a copy of an image (S, S, 3) as augmentation tools make it."""
    if rng.random() < 0.5:
        square = square[:, ::-1]
    side = len(square)
    if border != "black":
        around = ((side // 2,) * 2, (side // 2,) * 2, (0, 0))
        square = np.pad(square, around, mode=border)  # type: ignore[call-overload]
    angle, shear = rng.uniform(0, 2 * np.pi), np.tan(np.radians(rng.uniform(-15, 15)))
    cosine, sine = np.cos(angle), np.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]]) @ [[1, shear], [0, 1]]
    linear /= rng.uniform(0.9, 1.15)
    offset = np.full(2, len(square) / 2) - linear @ np.full(2, side / 2)
    matrix = np.column_stack([linear, offset]).ravel().tolist()
    image = Image.fromarray(square).transform(
        (side, side), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )
    gain = rng.uniform(0.75, 1.15)
    return image.point([min(int(level * gain), 255) for level in range(256)] * 3)


if __name__ == "__main__":
    main()
