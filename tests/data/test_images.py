import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.conftest import INGEST, Workspace
from tlpipe.data.images import FORMATS, Sampling, crop_middle, frame_of, read_square, read_upright
from tlpipe.data.values import Measured
from tlpipe.errors import ImageError

SMALL = Sampling(short_side_px=64, interpolation="bicubic")
# How each format keeps pixels as they are, or nearly so.
BEST: dict[str, dict[str, object]] = {
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int = 200, height: int = 150) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_only_where_that_is_enough() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).resize((1600, 1200)), "JPEG")

    def by_pillow(enough_px: int | None) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        if enough_px is not None:
            image.draft("RGB", (enough_px, enough_px))
        return np.asarray(image.convert("RGB"))

    for enough_px, size in ((128, (200, 150)), (200, (400, 300)), (2000, (1600, 1200))):
        image, header = read_upright(data, enough_px=enough_px)
        assert image.size == size and (header.width, header.height) == (1600, 1200)
        assert (np.asarray(image) == by_pillow(enough_px)).all()
    assert (np.asarray(read_upright(data)[0]) == by_pillow(None)).all()


def reject_reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        read_square(data, SMALL)
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", marks=pytest.mark.fault("D02")),
        pytest.param(b"this is text, not a photo", "not_image", marks=pytest.mark.fault("D03")),
        pytest.param(encoded(photo(), "JPEG")[:2000], "truncated", marks=pytest.mark.fault("D01")),
    ],
)
def test_what_is_no_image_is_an_error_with_its_reason(data: bytes, reason: str) -> None:
    assert reject_reason(data) == reason


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)


@pytest.mark.fault("D04", "D05")
@pytest.mark.parametrize("side", [50_000, 13_000])
def test_too_many_pixels_are_errors_before_decoding(side: int) -> None:
    tracemalloc.start()
    assert reject_reason(_png_header(side, side)) == "too_many_pixels"
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_line_of_pixels_is_an_error_before_it_is_resized() -> None:
    for size in ((1, 3000), (3000, 100)):
        assert reject_reason(encoded(Image.new("RGB", size))) == "too_thin"
    assert read_square(encoded(Image.new("RGB", (2000, 100))), SMALL)[0].shape == (64, 64, 3)


@pytest.mark.fault("D06")
def test_a_wrong_checksum_is_corrupt() -> None:
    data = bytearray(encoded(photo()))
    position = data.index(b"IDAT") + 40
    data[position] ^= 0xFF
    assert reject_reason(bytes(data)) == "corrupt"


@pytest.mark.fault("D09")
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    gray = photo().convert("L")
    if mode == "I;16":
        wide = np.asarray(gray).astype(np.uint16) * 257
        image, kind = Image.fromarray(wide), "PNG"
    else:
        image = (photo() if mode in ("CMYK", "YCbCr", "RGBA", "P") else gray).convert(mode)
        kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    sampling = SMALL.model_copy(update={"value_range": (0.0, 65535.0)})
    pixels, header = read_square(encoded(image, kind), sampling)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert header.mode == mode
    if mode in ("L", "LA", "I;16"):
        expected, _ = read_square(encoded(gray.convert("RGB")), SMALL)
        assert (pixels == expected).all()


@pytest.mark.fault("D60")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_values_of_more_than_8_bits_are_those_of_8_in_their_range(white: int, dtype: type) -> None:
    """As microscopes and X-ray detectors write them."""
    gray = np.asarray(photo().convert("L"))
    deep = Image.fromarray(np.rint(gray.astype(float) * white / 255).astype(dtype))
    sampling = SMALL.model_copy(update={"value_range": (0.0, float(white))})
    found, _ = read_square(encoded(deep, "TIFF"), sampling)
    expected, _ = read_square(encoded(Image.fromarray(gray)), SMALL)
    assert (found == expected).all()


@pytest.mark.fault("D60")
def test_values_beyond_the_range_are_clipped_and_no_number_is_black() -> None:
    values = np.full((80, 80), 0.5, np.float32)
    values[:20], values[20:40], values[40:60] = -np.inf, 7.0, np.nan
    sampling = Sampling(short_side_px=80, interpolation="bicubic", value_range=(-1.0, 1.0))
    found, _ = read_square(encoded(Image.fromarray(values), "TIFF"), sampling)
    assert [int(found[row, 40, 0]) for row in (10, 30, 50, 70)] == [0, 255, 0, 191]


@pytest.mark.fault("D60")
def test_a_picture_without_range_or_contrast_is_an_error() -> None:
    gray = np.asarray(photo().convert("L")).astype(np.float32) / 255
    data = encoded(Image.fromarray(gray), "TIFF")
    assert reject_reason(data) == "value_range"
    with pytest.raises(ImageError, match=r"constant: .* no contrast in the range from 0 to 65535"):
        read_square(data, SMALL.model_copy(update={"value_range": (0.0, 65535.0)}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 250], np.uint16), (0, 255)),
        (np.array([0, 255], np.uint16), (0, 255)),
        (np.array([0, 256], np.uint16), (0, 511)),
        (np.array([3, 4000], np.uint16), (0, 4095)),
        (np.array([0, 65535], np.uint16), (0, 65535)),
        (np.array([-1000, 3000], np.int32), (-1024, 4095)),
        (np.array([0.1, 0.9], np.float32), (0, 1)),
        (np.array([0.0, 1.0], np.float32), (0, 1)),
        (np.array([0.0, 0.01], np.float32), (0, 1 / 64)),
        (np.array([np.nan, -0.5, 1.5, np.inf], np.float32), (-0.5, 2)),
        (np.array([-3.0, -1.0], np.float32), (-4, 0)),
        (np.array([0.0], np.float32), (0, 1)),
        (np.array([np.nan], np.float32), None),
    ],
)
def test_the_range_is_what_the_bits_of_all_values_hold(
    values: np.ndarray, expected: tuple[float, float] | None
) -> None:
    measured = Measured()
    for part in (values[:1], values[1:]):
        measured.add("a.tif", part)
    assert measured.range() == expected


@pytest.mark.fault("D09")
def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (80, 80), (10, 20, 30, 0))
    assert (read_square(encoded(clear), SMALL)[0] == 255).all()


@pytest.mark.fault("D10")
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation: int, kind: str) -> None:
    upright = photo()
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **BEST.get(kind, {}))
    pixels, _ = read_square(data, SMALL)
    expected, _ = read_square(encoded(upright), SMALL)
    assert np.abs(pixels.astype(int) - expected).max() <= (4 if kind == "AVIF" else 0)
    # Boxes are cut from this image, and checked against its size before it is decoded.
    assert frame_of(data).upright == read_upright(data)[0].size == upright.size


def test_the_square_is_pillow_s_resize_and_a_centred_crop() -> None:
    image = photo(333, 150)
    pixels, _ = read_square(encoded(image), SMALL)
    wide = image.resize((int(64 * 333 / 150), 64), Image.Resampling.BICUBIC)
    left = round((wide.width - 64) / 2)
    assert np.abs(pixels.astype(int) - np.asarray(wide)[:, left : left + 64]).max() <= 1
    assert (crop_middle(pixels, 32) == pixels[16:48, 16:48]).all()


def test_a_large_jpeg_read_at_reduced_size_stays_close() -> None:
    data = encoded(photo(2400, 1800), "JPEG", quality=95)
    pixels, header = read_square(data, SMALL)
    assert (header.width, header.height) == (2400, 1800)
    full = Image.open(io.BytesIO(data)).resize((85, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(full)[:, 10:74].astype(int)
    assert np.abs(pixels - expected).max() <= 4


def test_broken_files_from_the_field_never_raise_anything_else(
    shared_data: Callable[[str], Path],
) -> None:
    files = [path for path in sorted(shared_data("badimages").rglob("*")) if path.is_file()]
    reasons = set()
    for path in files:
        try:
            read_square(path.read_bytes(), SMALL)
        except ImageError as error:
            reasons.add(error.reason)
    assert len(files) > 1000
    known = {"empty", "not_image", "format", "truncated", "corrupt", "value_range"}
    assert reasons <= known | {"too_many_pixels", "too_thin"}


@pytest.mark.fault("D07")
@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX", "ICO", "JPEG2000", "SGI"])
def test_other_formats_are_named_and_never_decoded(kind: str) -> None:
    data = encoded(photo(), kind)
    opened = []

    def decode(*given: object) -> ImageFile.ImageFile:
        opened.append(given)
        raise SyntaxError("decoded all the same")

    factory, accepts = Image.OPEN[kind]
    Image.OPEN[kind] = (decode, accepts)
    try:
        assert reject_reason(data) == "format"
    finally:
        Image.OPEN[kind] = (factory, accepts)
    assert not opened


@pytest.mark.fault("D07")
@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"SIMPLE  =                    T", "FITS"),
        (b"8BPS\x00\x01", "PSD"),
        (b"BLP2", "BLP"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL in a container"),
        (b"<svg xmlns=", "SVG"),
    ],
)
def test_formats_are_told_by_their_first_bytes(start: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"format: {name}; expected one of JPEG, PNG"):
        read_square(start + bytes(200), SMALL)


@pytest.mark.fault("D62")
@pytest.mark.skipif("HEIF" in FORMATS, reason="pillow-heif is installed")
@pytest.mark.parametrize("brand", [b"heic\0\0\0\0mif1", b"mif1\0\0\0\0heic", b"msf1\0\0\0\0hevc"])
def test_heic_is_named_with_what_reads_it(brand: bytes) -> None:
    data = b"\0\0\0\x18ftyp" + brand + bytes(200)
    with pytest.raises(
        ImageError,
        match=r"HEIC; expected one of .*, or the extra heic .pip install pillow-heif",
    ):
        read_square(data, SMALL)


@pytest.mark.fault("D62")
@pytest.mark.skipif("HEIF" not in FORMATS, reason="pillow-heif is not installed")
def test_heic_is_read_where_its_plugin_is_installed() -> None:
    data = encoded(photo(), "HEIF", quality=-1, chroma=444)
    pixels, header = read_square(data, SMALL)
    expected, _ = read_square(encoded(photo()), SMALL)
    assert np.abs(pixels.astype(int) - expected).max() <= 4
    assert (header.width, header.height, header.format) == (200, 150, "HEIF")
    assert reject_reason(data[: len(data) // 2]) in ("corrupt", "truncated")


@pytest.mark.fault("D67")
@pytest.mark.parametrize(
    ("plugin", "problem"),
    [
        ("raise ImportError('libheif.so.1: no such file')", "ImportError: libheif.so.1"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module"),
    ],
)
def test_a_broken_plugin_is_not_taken_for_none(
    empty: Workspace, photos: Path, plugin: str, problem: str
) -> None:
    said = with_plugin(empty, photos, plugin, code=1)
    (line,) = [line for line in said.splitlines() if "tlpipe:" in line]
    assert f"pillow-heif is installed and cannot be used: {problem}" in line
    assert "Traceback" not in said


@pytest.mark.fault("D67")
def test_the_version_of_the_plugin_s_library_is_part_of_the_decoder(
    empty: Workspace, photos: Path
) -> None:
    """Pixels of another libheif are not used again."""
    plugin = "def register_heif_opener(): pass\ndef libheif_version(): return '1.99.{}'\n"
    for number in range(2):
        assert "24 decoded" in with_plugin(empty, photos, plugin.format(number), code=0)
        report = json.loads((empty.path / "artifacts/ingest/report.json").read_text())
        assert f"libheif 1.99.{number}" in report["decoder"]
    assert "0 decoded" in with_plugin(empty, photos, plugin.format(1), code=0)


def with_plugin(workspace: Workspace, photos: Path, content: str, code: int) -> str:
    """Run ``ingest`` beside a module pillow_heif of this content; return what it says."""
    folder = workspace.path / "plugin"
    folder.mkdir(exist_ok=True)
    (folder / "pillow_heif.py").write_text(content)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    workspace.configure("ingest", source=str(photos))
    env = {**workspace.env, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return replace(workspace, env=env).run("tlpipe", *INGEST, code=code).stderr


@pytest.mark.fault("D08")
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **BEST.get(kind, {}))
    found = read_square(data, SMALL)[0].astype(int)
    assert np.abs(found - (255, 0, 0)).max() <= (4 if kind == "AVIF" else 0)


@pytest.mark.fault("D29")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(photo(), "BMP")[:60], "truncated"),
        (b"BM" + bytes(30), "corrupt"),
        (b"II*\x00" + struct.pack("<I", 8) + b"\xff" * 40, "corrupt"),
        (b"II*\x00" + struct.pack("<I", 2**31), "corrupt"),
        (b"GIF89a" + b"\x10\x00\x10\x00\xf7", "corrupt"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(8), "corrupt"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 5) + b"IHDR", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"ABC\xff" + bytes(20), "corrupt"),
        (b"\xff\xd8\xff\xe0\x00\x02" + b"\xff\xc0\x00\x03" * 9, "corrupt"),
    ],
)
def test_whatever_a_plugin_raises_becomes_a_reason(data: bytes, reason: str) -> None:
    assert reject_reason(data) == reason


@pytest.mark.fault("D29")
def test_an_image_beyond_the_memory_has_a_reason() -> None:
    program = """
import io, resource, zlib, struct
from tlpipe.data.images import Sampling, read_square
from tlpipe.errors import ImageError
def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
side = 9_900
rows = zlib.compress(bytes(side * 3 + 1) * side, 1)
header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
data = b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
try:
    read_square(data, Sampling(short_side_px=64, interpolation="bicubic"))
except ImageError as error:
    print(error.reason)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "out_of_memory\n", result.stderr


def with_noise(data: bytes, start: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, 30, dtype=np.uint8).tobytes()
    return data[:start] + noise + data[start + 30 :]


@pytest.mark.fault("D56")
def test_what_libtiff_says_and_pillow_lets_pass_is_corrupt(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Fax data that make no sense; and the error stream of the process stays clean."""
    pages = np.random.default_rng(0).integers(0, 255, (20, 20), dtype=np.uint8)
    page = Image.fromarray(pages).resize((300, 300)).convert("1")
    good = encoded(page, "TIFF", compression="group4")
    with Image.open(io.BytesIO(good)) as plain:
        assert (np.asarray(plain) == np.asarray(page)).all()
    assert read_square(good, SMALL)[1].mode == "1"
    bad = with_noise(good, len(good) // 3)
    with Image.open(io.BytesIO(bad)) as plain:
        plain.load()  # no error
    capfd.readouterr()
    with pytest.raises(ImageError, match=r"^corrupt: libtiff says 'Fax4Decode: .* errors more$"):
        read_square(bad, SMALL)
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    packed = encoded(Image.fromarray(noise), "TIFF", compression="tiff_deflate")
    with pytest.raises(ImageError, match=r"^corrupt: libtiff says 'ZIPDecode: Decoding error"):
        read_square(with_noise(packed, len(packed) // 2), SMALL)
    assert read_square(good, SMALL)[1].mode == "1"
    assert capfd.readouterr().err == ""


@pytest.mark.fault("D56")
@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF"])
def test_a_colour_that_is_not_in_the_table_is_corrupt(kind: str) -> None:
    """Decoders draw it black, or as whatever lies behind the table."""
    colours = np.arange(48 * 60, dtype=np.uint8).reshape(48, 60) % 16
    image = Image.fromarray(colours).convert("L")
    image.putpalette(np.random.default_rng(0).integers(0, 255, 48, dtype=np.uint8).tobytes())
    good = encoded(image, kind)
    assert read_square(good, SMALL)[1].mode == "P"
    bad = {"PNG": fewer_in_png, "BMP": fewer_in_bmp, "GIF": fewer_in_gif}[kind](good)
    with Image.open(io.BytesIO(bad)) as plain:
        plain.convert("RGB")  # no error
    with pytest.raises(ImageError, match="corrupt: a pixel has the colour 15 of a table of 8,"):
        read_square(bad, SMALL)


def fewer_in_png(png: bytes) -> bytes:
    """Take the second half of 16 colours away."""
    start = png.index(b"PLTE")
    assert png[start - 4 : start] == (48).to_bytes(4)
    table = png[start : start + 4 + 24]
    return (
        png[: start - 4]
        + (24).to_bytes(4)
        + table
        + zlib.crc32(table).to_bytes(4)
        + png[start + 4 + 48 + 4 :]
    )


def fewer_in_gif(gif: bytes) -> bytes:
    """Take the second half of the colours away from a GIF with a table of 16 (GIF89a, 18)."""
    assert gif[10] & 7 == 3
    return gif[:10] + bytes([gif[10] & ~7 | 2]) + gif[11 : 13 + 24] + gif[13 + 48 :]


def fewer_in_bmp(bmp: bytes) -> bytes:
    """State half of the colours, and take the other half away (BITMAPINFOHEADER, biClrUsed)."""
    start = 14 + int.from_bytes(bmp[14:18], "little")
    count = int.from_bytes(bmp[46:50], "little")
    pixels = int.from_bytes(bmp[10:14], "little") - count // 2 * 4
    short = bmp[: start + count // 2 * 4] + bmp[start + count * 4 :]
    return (
        short[:10]
        + pixels.to_bytes(4, "little")
        + short[14:46]
        + (count // 2).to_bytes(4, "little")
        + short[50:]
    )


def test_pillows_limit_is_that_of_the_program_around(tmp_path: Path) -> None:
    """Reading images changes it for nobody."""
    program = (
        "from PIL import Image\nbefore = Image.MAX_IMAGE_PIXELS\n"
        "from tlpipe.data import images\nprint(before == Image.MAX_IMAGE_PIXELS, before)\n"
    )
    result = Workspace(tmp_path).run("python", "-c", program)
    assert result.stdout.split()[0] == "True"
    assert int(result.stdout.split()[1]) > 0


@pytest.mark.fault("D60")
@pytest.mark.parametrize(("white", "is_usable"), [(65535, True), (32000, True), (4095, False)])
def test_colours_of_16_bits_that_are_dark_in_their_high_byte_are_errors(
    white: int, is_usable: bool
) -> None:
    """Pillow gives no more than that byte."""
    colours = np.asarray(photo(80, 60)).astype(float) / 255 * white
    rows = np.rint(colours).astype(">u2").reshape(60, -1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 80, 60, 16, 2, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + parts
    if is_usable:
        assert read_square(data, SMALL)[0].max() > 100
    else:
        assert reject_reason(data) == "constant"


@pytest.mark.fault("D18")
def test_what_is_logged_of_a_file_does_not_colour_the_terminal(
    empty: Workspace, photos: Path
) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # of five entries, none is there
    (photos / "dark" / "\x1b[31mred\nline.jpg").write_bytes(encoded(photo(), "JPEG", exif=exif))
    empty.set_source(photos)
    said = empty.run("tlpipe", *INGEST).stderr
    (line,) = (line for line in said.splitlines() if "Corrupt EXIF data" in line)
    assert line.startswith(r"dark/\x1b[31mred\nline.jpg: ")
    assert "\x1b" not in said
