"""Copies planted among 2,000 real photographs."""

import hashlib
import io
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.fft import dctn

from tests.conftest import Workspace
from tlpipe.data import duplicates
from tlpipe.data.images import Sampling, read_square
from tlpipe.data.pixels import Thumbnails, thumbnail


def changed(data: bytes, kind: str, chance: random.Random) -> bytes:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    width, height = image.size
    quality = 90
    match kind:
        case "re-encoded":
            quality = chance.choice([50, 60, 70, 85])
        case "half":
            image = image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
        case "mirrored":
            image = ImageOps.mirror(image)
        case "cropped":
            left, upper, right, lower = (chance.uniform(0, 0.05) for _ in range(4))
            box = (left * width, upper * height, (1 - right) * width, (1 - lower) * height)
            image = image.crop(tuple(map(int, box)))
        case "brighter":
            image = ImageEnhance.Brightness(image).enhance(chance.choice([0.9, 1.1]))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_low_frequencies_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    blurred = random.integers(0, 256, (5, 8, 8)).repeat(8, 1).repeat(8, 2)
    images = (0.7 * blurred + random.integers(0, 60, (5, 64, 64))).astype(np.uint8)
    small = images.reshape(5, 32, 2, 32, 2).mean((2, 4))
    small -= small.mean((1, 2), keepdims=True)
    small /= np.sqrt((small**2).sum((1, 2), keepdims=True))
    expected = dctn(small, axes=(1, 2), norm="ortho")[:, :6, :6]
    assert np.abs(duplicates.describe(images) - expected).max() < 1e-5


KINDS = ("re-encoded", "half", "mirrored", "cropped", "brighter")


@pytest.fixture(scope="module")
def photographs(shared_data: Callable[[str], Path]) -> list[Path]:
    found = sorted(shared_data("hymenoptera").rglob("*.jpg"))
    found += sorted((shared_data("voc-raccoon") / "images").iterdir())
    found += sorted((shared_data("coco-tiny") / "val2017").iterdir())
    signs = sorted(shared_data("sign-digits").glob("*/*.JPG"))
    return found + random.Random(0).sample(signs, 2000 - len(found))


@pytest.mark.slow
@pytest.mark.fault("D24", "D25")
def test_planted_copies_are_found_and_clean_images_left_alone(
    empty: Workspace, photographs: list[Path], tmp_path: Path
) -> None:
    chance = random.Random(1)
    source = tmp_path / "source"
    # Some of the photographs are there twice: their label depends on their content.
    labels = [hashlib.sha256(path.read_bytes()).hexdigest()[0] for path in photographs]
    for number, path in enumerate(photographs):
        target = source / labels[number] / f"{number:04d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    chosen = chance.sample(range(2000), 100)
    for number in chosen[:50]:
        target = source / labels[number] / f"exact-{number:04d}.jpg"
        target.write_bytes(photographs[number].read_bytes())
    for position, number in enumerate(chosen[50:]):
        copy = changed(photographs[number].read_bytes(), KINDS[position % 5], chance)
        (source / labels[number] / f"near-{number:04d}.jpg").write_bytes(copy)
    empty.set_source(source)
    empty.ingest()
    group = {Path(row["path"]).stem: row["group"] for row in empty.rows("out/manifest.csv")}
    assert len(group) == 2100
    exact = [group[f"exact-{n:04d}"] == group[f"{n:04d}"] for n in chosen[:50]]
    near = [group[f"near-{n:04d}"] == group[f"{n:04d}"] for n in chosen[50:]]
    assert sum(exact) == 50
    assert sum(near) >= 48
    clean = [group[f"{n:04d}"] for n in range(2000)]
    alone = {name for name in clean if clean.count(name) == 1}
    assert sum(name not in alone for name in clean) <= 20


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_copy_is_found(photographs: list[Path], tmp_path: Path, kind: str) -> None:
    sampling = Sampling(short_side_px=256, interpolation="bicubic")
    originals = [path.read_bytes() for path in photographs[::20]]
    chance = random.Random(2)
    copies = [changed(data, kind, chance) for data in originals]
    with ThreadPoolExecutor(2) as pool:
        squares = pool.map(lambda data: read_square(data, sampling)[0], originals + copies)
        small = np.stack([thumbnail(Image.fromarray(square)) for square in squares])
    np.save(tmp_path / "thumbnails.npy", small)
    thumbnails = Thumbnails(tmp_path, len(small))
    pairs = set(duplicates.near_pairs(thumbnails))
    thumbnails.close()
    found = sum((i, i + len(originals)) in pairs for i in range(len(originals)))
    assert found >= 0.96 * len(originals)


def test_images_without_structure_are_like_none(tmp_path: Path) -> None:
    small = np.stack([np.full((64, 64), shade, np.uint8) for shade in (10, 10, 200)])
    np.save(tmp_path / "thumbnails.npy", small)
    thumbnails = Thumbnails(tmp_path, 3)
    assert list(duplicates.near_pairs(thumbnails)) == []
    thumbnails.close()
