"""Sets with pictures of more than 8 bits: one range for all, whatever came before."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace
from tlpipe.bundle import load
from tlpipe.data import pixels as packed
from tlpipe.data.images import Sampling, read_square
from tlpipe.errors import ImageError
from tlpipe.predict import Predictor
from tlpipe.registry.gate import sampling_of
from tlpipe.sources import storage


def gray(number: int, kind: int) -> np.ndarray:
    """Return (48, 60) uint8: stripes or checks on noise."""
    y, x = np.mgrid[:48, :60]
    lines = np.sin(x / 3) > 0 if kind else np.sin(x / 3) * np.sin(y / 3) > 0
    noise = np.random.default_rng(1000 * kind + number).integers(0, 200, (6, 6), dtype=np.uint8)
    small = Image.fromarray(noise).resize((60, 48), Image.Resampling.BICUBIC)
    drawn: np.ndarray = np.asarray(small) + 55 * lines.astype(np.uint8)
    return drawn


def deep_set(root: Path, white: float, dtype: type, kind: str, images: int = 6) -> Path:
    for number, label in enumerate(("checks", "stripes")):
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            values = gray(i, number) * (white / 255)
            image = Image.fromarray(values.astype(dtype))
            image.save(root / label / f"{i}.{kind}")
    return root


def levels(workspace: Workspace) -> np.ndarray:
    stored = packed.load(workspace.path / "artifacts/ingest/pixels")
    return np.stack([stored.array[row] for row in range(len(stored.array))])


def report(workspace: Workspace) -> dict[str, object]:
    return dict(json.loads((workspace.path / "artifacts/ingest/report.json").read_text()))


def tables(workspace: Workspace) -> dict[str, bytes]:
    """Return the bytes of what ``ingest`` has written, without notes of how files lie."""
    out = workspace.path / "artifacts/ingest"
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {path.name: path.read_bytes() for path in found}


@pytest.mark.fault("D60")
@pytest.mark.parametrize(
    ("white", "dtype", "kind", "expected"),
    [
        (250, np.uint16, "png", [0, 255]),
        (4095, np.uint16, "tif", [0, 4095]),
        (1.0, np.float32, "tif", [0, 1]),
        (0.01, np.float32, "tif", [0, 1 / 64]),
    ],
)
def test_a_set_of_more_than_8_bits_has_a_measured_range(
    empty: Workspace, white: float, dtype: type, kind: str, expected: list[float]
) -> None:
    empty.set_source(deep_set(empty.path / "set", white, dtype, kind))
    said = empty.ingest()
    assert "12 pictures have more than 8 bits, and values from 0 to" in said
    assert f"0 becomes black and {expected[1]:g} white" in said
    assert report(empty)["value_range"] == expected
    assert levels(empty).max() > 150
    assert empty.rejects() == {}
    auto = tables(empty)
    # Stated, it gives the same pixels, and nothing is decoded again.
    empty.configure("ingest", value_range=expected)
    assert "0 decoded" in empty.ingest()
    assert tables(empty) == auto


@pytest.mark.fault("D60")
def test_a_new_picture_that_widens_the_range_changes_all_as_in_a_fresh_run(
    empty: Workspace,
) -> None:
    root = deep_set(empty.path / "set", 250, np.uint16, "png")
    Image.fromarray(gray(77, 0)).save(root / "checks" / "plain.png")
    empty.set_source(root)
    empty.ingest()
    first = tables(empty)
    Image.fromarray(gray(99, 1).astype(np.uint16) * 4).save(root / "stripes" / "new.png")
    assert "13 decoded" in empty.ingest()  # all but the one of 8 bits
    assert report(empty)["value_range"] == [0, 1023]
    grown = tables(empty)
    for path in (empty.path / "artifacts/ingest").iterdir():
        path.rename(empty.path / f"old {path.name}")
    empty.ingest()
    assert tables(empty) == grown
    # Without it, the range is that of the others again.
    (root / "stripes" / "new.png").unlink()
    empty.ingest()
    assert tables(empty) == first
    for path in root.rglob("[0-9]*.png"):
        plain = np.asarray(Image.open(path)).astype(np.uint8)
        path.unlink()
        Image.fromarray(plain).save(path)
    empty.ingest()
    assert report(empty)["value_range"] is None
    assert packed.load(empty.path / "artifacts/ingest/pixels").sampling.value_range is None


@pytest.mark.fault("D60")
def test_another_range_finds_other_near_copies_as_in_a_fresh_run(empty: Workspace) -> None:
    """Two pictures that are alike but for what is beyond white in the second range."""
    root = deep_set(empty.path / "set", 250, np.uint16, "png")
    for kind in (0, 1):
        picture = gray(50, 0).astype(np.uint16)
        picture[:, 30:] = 400 + 3000 * (gray(50, kind)[:, :30] > 100) + 600 * kind
        Image.fromarray(picture).save(root / "checks" / f"beyond {kind}.png")
    empty.set_source(root)
    empty.configure("ingest", value_range=[0, 1023])
    empty.ingest()
    pairs = {(row["path"], row["other"]) for row in empty.rows("artifacts/ingest/duplicates.csv")}
    empty.configure("ingest", value_range=[0, 255])
    empty.ingest()
    now = {(row["path"], row["other"]) for row in empty.rows("artifacts/ingest/duplicates.csv")}
    assert ("checks/beyond 0.png", "checks/beyond 1.png") in now - pairs
    again = tables(empty)
    for path in (empty.path / "artifacts/ingest").iterdir():
        path.rename(empty.path / f"old {path.name}")
    empty.ingest()
    assert tables(empty) == again


@pytest.mark.fault("D60")
def test_pictures_without_contrast_are_rejected_and_a_set_of_them_is_an_error(
    empty: Workspace,
) -> None:
    root = deep_set(empty.path / "set", 4095, np.uint16, "png")
    Image.fromarray(np.full((48, 48), 300, np.uint16)).save(root / "checks" / "flat.png")
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {"checks/flat.png": "constant"}
    # In a stated range that is far too wide, all others are black beside one.
    wild = np.full((48, 48), 1e30, np.float32)
    wild[:9] = 0
    Image.fromarray(wild).save(root / "checks" / "wild.tif")
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 1.0")
    empty.configure("ingest", value_range=[0, 1e30])
    said = empty.ingest(code=4)
    assert "13 pictures of more than 8 bits have no contrast, and 1 images are usable" in said
    assert "no contrast in the range from 0 to 1e+30: they span 1 of 256 levels" in said
    empty.configure("ingest", value_range=[0, 4095])
    empty.ingest()
    assert empty.rejects() == {"checks/flat.png": "constant"}
    empty.configure("ingest", value_range=None)
    Image.fromarray(gray(1, 0)).save(root / "checks" / "plain.png")
    Image.fromarray(gray(1, 1)).save(root / "stripes" / "plain.png")
    empty.ingest()
    assert set(empty.rejects().values()) == {"value_range"}


@pytest.mark.fault("D60")
def test_one_deep_picture_among_others_is_all_that_is_read_twice(
    empty: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = deep_set(empty.path / "set", 255, np.uint8, "png", images=20)
    (root / "checks" / "broken.png").write_bytes((root / "checks" / "1.png").read_bytes()[:600])
    (root / "stripes" / "again.png").write_bytes((root / "stripes" / "2.png").read_bytes())
    Image.fromarray(gray(70, 0).astype(np.uint16) * 16).save(root / "checks" / "5 deep.png")
    opened: Counter[str] = Counter()

    def opening(name: str, *given: Any, **named: Any) -> Any:
        opened[Path(name).name] += 1
        return open(name, *given, **named)  # noqa: PTH123

    empty.set_source(root)
    monkeypatch.setattr(storage, "open", opening, raising=False)
    monkeypatch.setattr(storage, "_SURE_NS", -(10**12))  # both times, however fast this runs
    said = empty.ingest()
    assert "42 images in 2 classes, 1 rejected, 42 decoded" in said
    assert opened["5 deep.png"] == opened["broken.png"] == 2
    assert opened["again.png"] == 1
    assert [opened[f"{i}.png"] for i in range(20)] == [2] * 20  # one of each class
    auto, seen = tables(empty), (empty.path / "artifacts/ingest/.seen.csv").read_bytes()
    assert empty.rejects().keys() == {"checks/broken.png"}
    # As where the range is known from the beginning.
    for path in (empty.path / "artifacts/ingest").iterdir():
        path.rename(empty.path / f"old {path.name}")
    empty.configure("ingest", value_range=[0, 4095])
    empty.ingest()
    assert tables(empty) == auto
    assert (empty.path / "artifacts/ingest/.seen.csv").read_bytes() == seen
    assert not [
        path for path in (empty.path / "artifacts/ingest/pixels").iterdir() if path.is_dir()
    ]


@pytest.mark.fault("D30", "D60")
def test_parts_of_photos_and_their_rejects_are_taken_from_the_first_reading(
    empty: Workspace,
) -> None:
    root = empty.path / "set"
    root.mkdir()
    images, boxes = [], []
    for number in range(8):
        whole = np.kron(gray(number, number % 2), np.ones((4, 4), np.uint8))
        is_deep = number == 5
        Image.fromarray(whole.astype(np.uint16) * 16 if is_deep else whole).save(
            root / f"{number}.png"
        )
        images.append({"id": number, "file_name": f"{number}.png", "width": 240, "height": 192})
        for kind, box in enumerate(([5, 5, 60, 60], [80, 20, 70, 50])):
            boxes.append({"image_id": number, "category_id": kind, "bbox": box})
    # No square is free of this one; that box lies outside of its photo.
    boxes.append({"image_id": 2, "category_id": 0, "bbox": [0, 0, 240, 192]})
    boxes.append({"image_id": 3, "category_id": 1, "bbox": [500, 500, 20, 20]})
    content = {
        "images": images,
        "annotations": [{"id": number, **box} for number, box in enumerate(boxes)],
        "categories": [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}],
    }
    (root / "annotations.json").write_text(json.dumps(content))
    empty.set_source(root, background="nothing")
    empty.ingest()
    auto, rejects = tables(empty), empty.rejects()
    assert set(rejects.values()) == {"box_outside", "no_background"}
    for path in (empty.path / "artifacts/ingest").iterdir():
        path.rename(empty.path / f"old {path.name}")
    empty.configure("ingest", value_range=[0, 4095])
    empty.ingest()
    assert tables(empty) == auto


def odd(root: Path, path: str, value: float, share: float = 0.0) -> None:
    """Give one pixel, or a share of the rows, of a picture another value."""
    values = np.array(Image.open(root / path))
    values[0, 0] = value
    values[: round(share * len(values))] = value
    Image.fromarray(values).save(root / path)


@pytest.mark.fault("D66")
@pytest.mark.parametrize(
    ("white", "dtype", "which", "value", "share"),
    [
        (4095, np.uint16, 1, 65535, 0.0),  # a hot pixel
        (4095, np.uint16, 12, 65535, 0.0),  # of the camera
        (1.0, np.float32, 1, -9999, 0.0),  # a number for 'no data'
        (1.0, np.float32, 12, -9999, 0.3),
        (1.0, np.float32, 1, 1e30, 0.8),
    ],
)
def test_odd_pixels_that_ruin_the_measured_range_are_errors_with_the_file(
    empty: Workspace, white: float, dtype: type, which: int, value: float, share: float
) -> None:
    root = deep_set(empty.path / "set", white, dtype, "tif")
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.tif"))
    for path in paths[:which]:
        odd(root, path, value, share)
    empty.set_source(root)
    said = empty.ingest(code=4)
    named = re.search(r"'(.*)' has the value (\S+), so ingest.value_range: auto makes", said)
    assert named and named[1] in paths[:which] and float(named[2]) == pytest.approx(value)
    assert re.search(r"leaves the median of 12 pictures .* of 256 levels; expected 64 at", said)
    assert not (empty.path / "artifacts/ingest/manifest.csv").exists()
    empty.configure("ingest", value_range=[0, white])
    empty.ingest()


@pytest.mark.fault("D66")
@pytest.mark.parametrize(
    ("white", "dtype"),
    [(1023, np.uint16), (4095, np.uint16), (65535, np.uint16), (1.0, np.float32)],
)
def test_a_dark_set_with_some_bright_pictures_keeps_its_measured_range(
    empty: Workspace, white: float, dtype: type
) -> None:
    """Most reach an eighth of white: less than 64 levels, of a range that is theirs."""
    root = deep_set(empty.path / "set", 0.17 * white, dtype, "tif")
    for label in ("checks", "stripes"):
        values = gray(90, int(label == "stripes")) * (white / 255)
        Image.fromarray(values.astype(dtype)).save(root / label / "bright.tif")
    empty.set_source(root)
    empty.ingest()
    assert report(empty)["value_range"] == [0, white]
    assert empty.rejects() == {}


@pytest.mark.fault("D66")
def test_few_values_of_their_own_are_no_loss(empty: Workspace) -> None:
    """Digits of 17 values, stored as 16 bits."""
    root = deep_set(empty.path / "set", 255, np.uint16, "png")
    for path in root.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 16 * 16).save(path)
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {}


@pytest.mark.fault("D60")
@pytest.mark.parametrize("levels", [31, 32])
def test_gray_needs_as_many_levels_as_colour(levels: int) -> None:
    values = np.zeros((48, 48), np.uint16)
    values[20:] = (levels - 1) * 257
    data = io.BytesIO()
    Image.fromarray(values).save(data, "png")
    seen = Sampling(short_side_px=48, interpolation="bicubic", value_range=(0, 65535))
    if levels < 32:
        with pytest.raises(ImageError, match="span 31 of 256 levels, expected 32 at least"):
            read_square(data.getvalue(), seen)
    else:
        assert read_square(data.getvalue(), seen)[0].max() == 31


@pytest.mark.slow
@pytest.mark.fault("D60")
def test_the_bundle_turns_a_file_into_the_stored_pixels(workspace: Workspace) -> None:
    root = deep_set(workspace.path / "set", 4000, np.uint16, "png", images=10)
    workspace.set_source(root)
    workspace.reproduce("export")
    artifacts = workspace.path / "artifacts"
    bundle = load(artifacts / "export" / "bundle")
    assert bundle.preprocessing.value_range == (0, 4095)
    pixels = packed.load(artifacts / "ingest" / "pixels")
    assert sampling_of(bundle) == pixels.sampling  # by which the gate reads images anew, or not
    stored = pixels.array
    predictor = Predictor(bundle, threads=2)
    table = workspace.rows("artifacts/ingest/manifest.csv")
    for row, entry in enumerate(table):
        answer = predictor.predict((root / entry["path"]).read_bytes())
        assert answer == predictor.name(predictor.scores(stored[row : row + 1])[1][0])
    # The same picture of a quarter of the values is a darker one to this bundle, not the same.
    values = np.asarray(Image.open(root / table[0]["path"])) // 4
    Image.fromarray(values).save(workspace.path / "darker.png")
    seen, _ = read_square((workspace.path / "darker.png").read_bytes(), bundle.preprocessing)
    assert abs(4 * int(seen.max()) - int(stored[0].max())) <= 4


@pytest.mark.parametrize("value", [[1, 0], [0], "full", [0, "x"], 5])
def test_a_range_that_is_none_is_an_error(empty: Workspace, photos: Path, value: object) -> None:
    empty.set_source(photos)
    empty.configure("ingest", value_range=value)
    assert "ingest.value_range" in empty.ingest(code=3)
