"""Sets of pictures of all kinds and names, from files to rows of the manifest."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace
from tlpipe.data import pixels
from tlpipe.data.images import FORMATS


def picture(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def squares(workspace: Workspace) -> dict[str, np.ndarray]:
    """Return the stored pixels of each image, as signed numbers, by its path."""
    stored = pixels.load(workspace.path / "artifacts/ingest/pixels").array
    rows = enumerate(workspace.rows("artifacts/ingest/manifest.csv"))
    return {entry["path"]: np.asarray(stored[row]).astype(int) for row, entry in rows}


KINDS = (
    *(("JPEG", "CMYK", "jpg"), ("PNG", "LA", "png"), ("PNG", "P", "png"), ("PNG", "1", "png")),
    *(("JPEG", "L", "jpg"), ("WEBP", "RGBA", "webp"), ("TIFF", "CMYK", "tif")),
    *(("PNG", "I;16", "png"), ("BMP", "RGB", "bmp"), ("GIF", "P", "gif"), ("AVIF", "RGB", "avif")),
)


@pytest.mark.fault("D09")
def test_a_set_of_all_kinds_shows_the_pictures_that_people_see(empty: Workspace) -> None:
    root, expected = empty.path / "set", {}
    for number, label in enumerate(("ant", "bee")):
        for i, (kind, mode, suffix) in enumerate(KINDS):
            image = picture(100 * number + i)
            if mode == "I;16":
                shown = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
            else:
                shown = image.convert(mode)
            put(root / label / f"{i}.{suffix}", encoded(shown, kind))
            if mode not in ("1", "P"):
                colours = image if mode in ("CMYK", "RGB", "RGBA") else image.convert("L")
                expected[f"{label}/{i}.{suffix}"] = colours.convert("RGB")
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {}
    found = squares(empty)
    assert len(found) == 2 * len(KINDS)
    for path, image in expected.items():
        reference = image.resize((341, 256), Image.Resampling.BICUBIC).crop((42, 0, 298, 256))
        assert np.abs(found[path] - np.asarray(reference)).mean() < 8, path
    formats = Counter(row["format"] for row in empty.rows("artifacts/ingest/manifest.csv"))
    assert formats["AVIF"] == 2 and len(formats) == 7


@pytest.mark.fault("D08")
def test_of_pages_the_first_is_the_picture(empty: Workspace) -> None:
    root = empty.path / "set"
    for number, label in enumerate(("ant", "bee")):
        for i in range(6):
            pages = [picture(100 * number + 10 * i + page) for page in range(3)]
            data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
            put(root / "pages" / label / f"{i}.tif", data)
            put(root / "alone" / label / f"{i}.tif", encoded(pages[0], "TIFF"))
    empty.set_source(root / "pages")
    empty.ingest()
    found = squares(empty)
    empty.replace("params.yaml", str(root / "pages"), str(root / "alone"))
    empty.ingest()
    alone = squares(empty)
    assert len(found) == 12
    assert all((found[path] == alone[path]).all() for path in alone)


@pytest.mark.fault("D32")
def test_lines_are_rejected_and_strips_are_read(empty: Workspace) -> None:
    root = empty.path / "set"
    for number, label in enumerate(("ant", "bee")):
        for i in range(8):
            put(root / label / f"{i}.png", encoded(picture(100 * number + i)))
        put(root / label / "strip.png", encoded(picture(100 * number + 20, (1200, 60))))
        put(root / label / "line.png", encoded(picture(100 * number + 21, (2000, 60))))
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {"ant/line.png": "too_thin", "bee/line.png": "too_thin"}
    empty.configure("ingest", max_rejected=0.02)
    said = empty.ingest(code=4)
    assert "2 of 20 images were rejected (too_thin 2), a share of 0.100" in said
    assert "'ant/line.png': 2000 x 60 pixels; one side may be 20 times the other" in said


@pytest.mark.fault("D18")
def test_odd_names_are_read_and_never_become_lines_or_options(empty: Workspace) -> None:
    root = empty.path / "set"
    labels = ("\u00e4rger", "\u65e5\u672c \u8a9e", "10", "2")
    for number, label in enumerate(labels):
        for i in range(6):
            put(root / label / f"{label}_{i}.png", encoded(picture(100 * number + i)))
    odd = ["10/-rf.png", "10/two\nlines.png", "2/a b'c\"$(x).png"]
    for i, name in enumerate(odd):
        put(root / name, encoded(picture(1000 + i)))
    put(root / "10" / "two\nrejected.png", b"no picture")
    empty.set_source(root)
    said = empty.ingest()
    rows = empty.rows("artifacts/ingest/manifest.csv")
    assert {*odd} <= {row["path"] for row in rows} and len(rows) == 27
    assert {row["label"] for row in rows} == {*labels}
    assert empty.rejects() == {"10/two\nrejected.png": "not_image"}
    assert "two\n" not in said


@pytest.mark.fault("D62")
def test_photos_of_telephones_are_never_silently_half_of_the_data(empty: Workspace) -> None:
    root = empty.path / "set"
    for number, label in enumerate(("ant", "bee")):
        for i in range(8):
            put(root / label / f"{i}.jpg", encoded(picture(100 * number + i), "JPEG"))
        for i in range(2):
            put(root / label / f"{i}.avif", encoded(picture(100 * number + 50 + i), "AVIF"))
        for i in range(4):
            put(root / label / f"IMG_{i}.HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
        put(root / label / "a.jxl", b"\xff\x0a" + bytes(100))
    empty.set_source(root)
    empty.configure("evaluate", ood=str(root))
    note = "8 of 30 files are called .heic and cannot be read here: the extra heic (pip"
    assert (note in empty.call("check").stdout) == ("HEIF" not in FORMATS)
    said = empty.ingest()
    assert len(empty.rows("artifacts/ingest/manifest.csv")) == 20
    reasons = Counter(empty.rejects().values())
    assert reasons["format"] == (2 if "HEIF" in FORMATS else 10)
    assert (note in said) == ("HEIF" not in FORMATS)
    empty.configure("ingest", max_rejected=0.02)
    said = empty.ingest(code=4)
    assert "10 of 30 images were rejected" in said
    assert "'ant/IMG_0.HEIC'" in said
