import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from tests.conftest import Workspace
from tlpipe.data import leaks
from tlpipe.data.manifest import Assignment
from tlpipe.data.pixels import thumbnail

LABELS = ("a", "b")


def picture(number: int, side: int = 96) -> Image.Image:
    """Draw ellipses at random: as much structure as a photograph, and of no common shape."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), tuple(rng.integers(60, 200, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y = rng.uniform(-0.1, 1.1, 2) * side
        width, height = rng.uniform(0.04, 0.25, 2) * side
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x - width, y - height, x + width, y + height), fill=colour)
    return image


def changed(
    image: Image.Image,
    degrees: float = 0,
    *,
    is_mirrored: bool = False,
    shear: float = 0,
    zoom: float = 1,
    gain: float = 1,
) -> Image.Image:
    """Rotate, mirror, shear (in degrees) and zoom, with black corners; brighten or darken."""
    if is_mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    linear = np.array([[cosine, -sine], [sine, cosine]]) @ [[1, np.tan(np.radians(shear))], [0, 1]]
    linear /= zoom
    middle = np.full(2, image.width / 2)
    matrix = np.column_stack([linear, middle - linear @ middle]).ravel().tolist()
    turned = image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )
    return turned.point([min(int(level * gain), 255) for level in range(256)] * 3)


def copy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change an image as augmentation tools do."""
    return changed(
        image,
        rng.uniform(0, 360),
        is_mirrored=bool(rng.random() < 0.5),
        shear=rng.uniform(-15, 15),
        zoom=rng.uniform(0.9, 1.15),
        gain=rng.uniform(0.7, 1.1),
    )


def planted(originals: int, copies: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """Return the label and the picture of each copy; none is its original."""
    rng = np.random.default_rng(seed)
    return [
        (LABELS[number % 2], copy(picture(number), rng))
        for number in range(originals)
        for _ in range(copies)
    ]


def clean(count: int) -> list[tuple[str, Image.Image]]:
    return [(LABELS[number % 2], picture(number)) for number in range(count)]


def dealt(
    images: list[tuple[str, Image.Image]],
    splits: list[str],
    group: Callable[[int], str] = str,
) -> tuple[npt.NDArray[np.uint8], list[Assignment]]:
    """Return thumbnails and split table of images whose splits are given."""
    thumbnails = np.stack([thumbnail(image) for _, image in images])
    return thumbnails, [
        Assignment(f"{row}.png", label, split, "", group(row), "", "")
        for row, ((label, _), split) in enumerate(zip(images, splits, strict=True))
    ]


def find(
    images: list[tuple[str, Image.Image]],
    group: Callable[[int], str] = str,
    splits: tuple[str, ...] = ("train", "train", "train", "validation", "test"),
) -> tuple[leaks.Found, list[Assignment]]:
    """Look for leaks, with the images dealt out to the splits by chance."""
    order = np.random.default_rng(1).permutation(len(images)).tolist()
    thumbnails, assignments = dealt(images, [splits[i % len(splits)] for i in order], group)
    return leaks.find(thumbnails, assignments), assignments


@pytest.mark.fault("L04")
@pytest.mark.parametrize("copies", [5, 20])
def test_copies_that_share_no_bytes_are_found(copies: int) -> None:
    found, assignments = find(planted(200 // copies, copies))
    content = found.content(assignments)
    assert content["is_above_clean"]
    for split in ("validation", "test"):
        result = content["splits"][split]
        assert result["images"] == 40
        assert result["is_above_clean"]
        assert result["share"] > 0.7
        # The pairs are what they are said to be: copies of one original, one of them in train.
        for pair in found.copies(split):
            assert pair.row // copies == pair.other // copies
            assert (assignments[pair.row].split, assignments[pair.other].split) == (split, "train")
    text = leaks.warning(content)
    assert text.startswith("accuracy promises too much: ")
    assert "(?P<group>...) in ingest.pattern" in text


CHANGES: dict[str, dict[str, Any]] = {
    "rotated a little": {"degrees": 12},
    "rotated": {"degrees": 137},
    "on its head": {"degrees": 180},
    "mirrored": {"is_mirrored": True},
    "mirrored and rotated": {"degrees": 261, "is_mirrored": True},
    "sheared": {"shear": 15},
    "sheared, rotated": {"degrees": -75, "shear": -15},
    "enlarged, rotated": {"degrees": 40, "zoom": 1.15},
    "smaller, darker": {"degrees": 300, "zoom": 0.9, "gain": 0.6},
}


@pytest.mark.fault("L04")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_change_is_seen_through(change: dict[str, Any]) -> None:
    originals = clean(40)
    copies = [(label, changed(image, **change)) for label, image in originals]
    splits = ["train"] * 40 + ["test"] * 40
    found = leaks.find(*dealt([*originals, *copies], splits))
    right = [pair for pair in found.copies("test") if pair.row - 40 == pair.other]
    assert len(right) >= 32
    assert len(found.copies("test")) == len(right)


@pytest.mark.fault("L04")
def test_pictures_that_have_no_copies_raise_no_alarm() -> None:
    found, assignments = find(clean(200))
    content = found.content(assignments)
    assert not content["is_above_clean"]
    assert [result["copies"] for result in content["splits"].values()] == [0, 0]
    assert leaks.describe(content).startswith("0 of 40 validation images and 0 of 40 test images")


@pytest.mark.fault("L04")
def test_copies_of_one_split_are_no_leak() -> None:
    found, assignments = find(planted(40, 5), splits=("train",))
    content = found.content(assignments)
    assert content["splits"]["test"] == {
        "images": 0,
        "copies": 0,
        "share": None,
        "is_above_clean": False,
        "examples": [],
    }
    assert "no held-out image" in leaks.describe(content)


@pytest.mark.fault("L04", "L06")
def test_a_group_in_two_splits_is_a_leak_like_any_other() -> None:
    """`split` keeps groups whole; what it failed to keep must not go unsaid for that."""
    images = planted(40, 5)
    known, _ = find(images, group=lambda row: str(row // 5))
    unknown, _ = find(images)
    assert known.pairs == unknown.pairs
    assert known.is_above_clean("test")


@pytest.mark.fault("L04")
def test_a_few_copies_are_counted_without_an_alarm() -> None:
    images = clean(200)
    rng = np.random.default_rng(2)
    _, assignments = find(images)
    held = [row for row, found in enumerate(assignments) if found.split == "test"]
    train = next(row for row, found in enumerate(assignments) if found.split == "train")
    images[held[0]] = (images[train][0], copy(images[train][1], rng))
    found, _ = find(images)
    assert [(pair.row, pair.other) for pair in found.copies("test")] == [(held[0], train)]
    assert not found.is_above_clean("test")


def test_images_without_structure_are_left_out() -> None:
    flat = [("a", Image.new("RGB", (64, 64), (shade, shade, shade))) for shade in range(20, 220)]
    found, _ = find(flat)
    assert (found.pairs["validation"], found.pairs["test"], found.train_images) == ([], [], 0)


def test_samples_are_bounded_and_taken_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SAMPLE", 10)
    monkeypatch.setattr(leaks, "TRAIN_SAMPLE", 60)
    found, _ = find(planted(40, 5))
    rows = sorted(pair.row for pair in found.pairs["test"])
    assert len(rows) == 10
    assert rows[-1] > 150 > 50 > rows[0]
    assert found.train_images == 60
    # Half of the training images are looked at, and still most have a copy there.
    assert found.is_above_clean("test")


@pytest.mark.fault("L04")
def test_audit_says_what_bytes_do_not_show(
    empty: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    folder = empty.path / "pictures"
    for number, (label, image) in enumerate(planted(24, 5)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / label / f"{number:03d}.png")
    empty.set_source("pictures")
    empty.configure("embed", freeze="all")
    empty.ingest()
    assert len({row["group"] for row in empty.rows("artifacts/ingest/manifest.csv")}) > 100
    empty.call("split")
    empty.embed()
    said = "".join(empty.call("audit").stderr.split())
    assert "accuracypromisestoomuch:" in said
    assert "rotated,mirroredorshearedcopiesoftrainingimages" in said
    assert "Keepthecopiesofanoriginalinonesplit" in said
    assert "warning" in {record.levelname.lower() for record in caplog.records}
    content = json.loads((empty.path / "artifacts/audit/leaks.json").read_text())
    assert content["is_above_clean"]
    example = content["splits"]["test"]["examples"][0]
    originals = [int(Path(example[key]).stem) // 5 for key in ("path", "train")]
    assert originals[0] == originals[1]
    assert shades(empty.path / "artifacts/audit/plots/copies.png") > 20


def shades(path: Path) -> int:
    with Image.open(path) as picture:
        gray: npt.NDArray[np.uint8] = np.asarray(picture.convert("L"))
    return len(np.unique(gray))
