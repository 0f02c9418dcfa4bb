"""Copies planted among 2,000 real photographs."""

import hashlib
import io
import random
import tempfile
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
            end = (int((1 - right) * width), int((1 - lower) * height))
            image = image.crop((int(left * width), int(upper * height), *end))
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
    group = {
        Path(row["path"]).stem: row["group"] for row in empty.rows("artifacts/ingest/manifest.csv")
    }
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


def bursts(folder: Path, count: int, frames: int) -> Thumbnails:
    """Write thumbnails of so many scenes, of which each was shot so many times in a row."""
    generator = np.random.default_rng(0)
    small = []
    for _ in range(count):
        noise = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        scene = Image.fromarray(noise).resize((300, 260), Image.Resampling.BICUBIC)
        for number in range(frames):
            frame = ImageEnhance.Brightness(scene).enhance(1 - 0.3 / frames * (number % 7))
            x, y = generator.integers(0, 12, 2).tolist()
            square = frame.crop((x, y, 300 - y, 260 - x)).resize((256, 256))
            small.append(thumbnail(square if generator.random() < 0.7 else ImageOps.mirror(square)))
    np.save(folder / "thumbnails.npy", np.stack(small))
    return Thumbnails(folder, len(small))


@pytest.mark.fault("D59")
@pytest.mark.parametrize("few", [2**25, 0], ids=["all distances", "a tree"])
@pytest.mark.parametrize(("count", "frames"), [(6, 12), (1, 70)])
def test_pairs_are_those_of_a_new_search_whatever_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int, count: int, frames: int
) -> None:
    """In five steps of additions, in another order of names, and found in both ways."""
    thumbnails = bursts(tmp_path, count, frames)
    generator = np.random.default_rng(1)
    keys = generator.permutation(thumbnails.count).astype(np.uint64)
    expected = set(duplicates.near_pairs(thumbnails, keys=keys))
    assert len(expected) > thumbnails.count
    monkeypatch.setattr(duplicates, "_FEW", few)
    assert set(duplicates.near_pairs(thumbnails, keys=keys)) == expected
    monkeypatch.setattr(duplicates, "_FEW", 2**25)
    step = generator.integers(0, 5, thumbnails.count)
    pairs: list[tuple[int, int]] = []
    for now in range(5):
        found = duplicates.near_pairs(thumbnails, step <= now, step == now, keys=keys, known=pairs)
        pairs = list(found)
        assert len(pairs) == len(set(pairs))
        new = duplicates.near_pairs(thumbnails, step <= now, keys=keys)
        assert sorted(pairs) == sorted(new), now
    assert set(pairs) == expected
    thumbnails.close()
    # The same images under other names: the rows are others, the pairs of images are the same.
    order = generator.permutation(thumbnails.count)
    np.save(tmp_path / "thumbnails.npy", np.load(tmp_path / "thumbnails.npy")[order])
    renamed = Thumbnails(tmp_path, len(order))
    found = duplicates.near_pairs(renamed, keys=keys[order])
    assert {tuple(sorted(order[list(pair)].tolist())) for pair in found} == expected
    renamed.close()


@pytest.mark.fault("D59")
def test_one_more_frame_of_a_pan_changes_the_neighbours_of_some(tmp_path: Path) -> None:
    """Frames far apart do not see each other: so one may list another that has new neighbours."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 255, (12, 40, 3), dtype=np.uint8)
    scene = Image.fromarray(noise).resize((1040, 260), Image.Resampling.BICUBIC)
    starts = np.concatenate([np.arange(0, 240, 3), np.arange(241, 480, 2)])
    frames = [scene.crop((x, 0, x + 300, 260)).resize((256, 256)) for x in starts.tolist()]
    np.save(tmp_path / "thumbnails.npy", np.stack([thumbnail(frame) for frame in frames]))
    thumbnails = Thumbnails(tmp_path, len(frames))
    keys = generator.permutation(len(frames)).astype(np.uint64)
    order = generator.permutation(len(frames))
    step = np.empty(len(frames), np.int64)
    step[order] = np.maximum(np.arange(len(frames)) - (len(frames) - 25), 0)
    pairs: list[tuple[int, int]] = []
    left = 0
    for now in range(int(step.max()) + 1):
        was = pairs
        found = duplicates.near_pairs(thumbnails, step <= now, step == now, keys=keys, known=was)
        pairs = list(found)
        left += len(set(was) - set(pairs))
        assert len(pairs) == len(set(pairs))
        new = duplicates.near_pairs(thumbnails, step <= now, keys=keys)
        assert sorted(pairs) == sorted(new), now
    assert left > 3  # pairs whose place was taken by nearer ones
    thumbnails.close()


@pytest.mark.fault("D59")
def test_of_equally_near_ones_a_tree_takes_the_first_too(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).integers(0, 5, (3000, 8)).astype(np.float64) * 9
    asked = np.arange(0, 3000, 7, dtype=np.int32)
    tables = []
    for few in (2**25, 0):
        monkeypatch.setattr(duplicates, "_FEW", few)
        with tempfile.TemporaryFile() as file:
            duplicates._save_reach(points, asked, file)
            file.seek(0)
            tables.append(np.fromfile(file, np.int32).reshape(len(asked), -1))
    squares = ((points[asked][:, None] - points[None]) ** 2).sum(axis=2)
    nearest = np.argsort(squares, axis=1, kind="stable")[:, : tables[0].shape[1]]
    within = np.take_along_axis(squares, nearest, axis=1) <= duplicates._LOW_REACH
    expected = np.sort(np.where(within, nearest, asked[:, None]), axis=1)
    for table in tables:
        assert (np.sort(table, axis=1) == expected).all()
