"""Show what a data set holds: figures (how many, how large, how labelled, how it looks), and words.

Figures are PNG files of stable bytes, drawn without a window system. The words say how a source was
understood: its classes, splits and groups, and what is plainly odd of them. A folder of thumbnails,
an empty cell or a measured value makes a class like any other. Nobody but who made the data set can
tell, and only if somebody shows it to them before anything is trained.
"""

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tlpipe import files
from tlpipe.data.manifest import SPLITS, UNUSED, Assignment, Entry
from tlpipe.sources import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Of the first of these that are installed come the letters which the one before does not have.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "IPAGothic",
    "Arial Unicode MS",
)
_log = logging.getLogger(__name__)


@cache
def fonts() -> dict[str, Path]:
    """Return the fonts of texts that are installed, by name, in the order in which they serve."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return {name: Path(font_manager.findfont(name)) for name in _FONTS if name in there}


@cache
def _letters() -> tuple[frozenset[int], ...]:
    """Return the code points that each of the fonts has."""
    from matplotlib import font_manager

    return tuple(frozenset(font_manager.get_font(path).get_charmap()) for path in fonts().values())


def check_letters(texts: Iterable[str]) -> None:
    """Say once, in a line, that no installed font has some letters of the texts of a picture."""
    letters = {letter for text in texts for letter in text if letter.isprintable()}
    known = frozenset[int]().union(*_letters())
    if missing := sorted(letter for letter in letters if ord(letter) not in known):
        _say_missing("".join(missing[:8]) + ("..." if len(missing) > 8 else ""))


@cache
def _say_missing(letters: str) -> None:
    _log.warning(
        "no installed font has the letters %s: pictures show boxes for them; install one that "
        "has, such as Noto Sans CJK",
        letters,
    )


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; width and height in inches."""
    # The figure alone: pyplot would start a window system where there is one.
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class may be called $x
    matplotlib.rcParams["font.family"] = list(fonts())
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def scale_by_logarithm(axes: "Axes") -> None:
    """Let an x axis go by powers of ten, with plain numbers on it: formulas are not drawn."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def error_bars(
    rows: Sequence[Mapping[str, float]], value: str = "accuracy"
) -> npt.NDArray[np.float64]:
    """Return how far the interval of each of N rows reaches below and above its value, (2, N)."""
    return np.array([(row[value] - row["low"], row["high"] - row[value]) for row in rows]).T


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    from matplotlib.text import Text

    check_letters(found.get_text() for found in figure.findobj(Text) if isinstance(found, Text))
    with files.replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # said already
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine("none")  # or all is drawn twice, and laid out twice
        figure.savefig(temporary, format="png", metadata={"Software": None})


# In pixels: an image's side, the space around it, the height of a line and of the title.
_SIDE, _GAP, _LINE, _TITLE = 168, 12, 19, 38
_LONGEST = 200  # characters of a caption; more cannot be shown anyway


def gallery(
    path: Path,
    squares: Sequence[npt.NDArray[np.uint8] | None],
    captions: Sequence[str],
    *,
    title: str,
    columns: int = 6,
    reading: str = "",
    headings: Sequence[str] = (),
) -> None:
    """Draw images, each above its caption, in rows; with none, the title alone.

    A caption that is too long for two lines loses its middle. Pasted together in Pillow: in
    Matplotlib each image would be axes of their own, which took most of a stage's time.

    Args:
        path: the PNG file to write.
        squares: images (H, H, 3) uint8 RGB; None leaves a place empty.
        captions: one for each image.
        title: of the whole picture.
        columns: images in a row.
        reading: how it is read, below the title.
        headings: what stands above images and those beside them that have none: two lines at most,
            one for each image, if there are any.
    """
    check_letters((title, reading, *captions, *headings))
    small, large = (_Face(size) for size in (15, 19))  # of the fonts of the figures
    rows = -(-len(squares) // columns)
    above = 2 * _LINE + 4 if headings else 0
    across, down = _SIDE + _GAP, above + _SIDE + 2 * _LINE + _GAP
    width = columns * across + _GAP
    words = _wrapped(reading, small, width - 2 * _GAP) if reading else []
    start = _TITLE + len(words) * _LINE + (_GAP if words else 0)
    sheet = Image.new("RGB", (width, start + rows * down + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    large.write(draw, ((sheet.width - large.length(title)) / 2, _TITLE / 2), title, "lm")
    for number, line in enumerate(words):
        small.write(draw, (_GAP, _TITLE + number * _LINE), line, "la")
    for position, (square, caption) in enumerate(zip(squares, captions, strict=True)):
        row, column = divmod(position, columns)
        left, top = _GAP + column * across, start + row * down
        if headings and headings[position]:
            beside = headings[position + 1 : (row + 1) * columns]
            free = next((n for n, other in enumerate(beside) if other), columns - column - 1)
            room = (1 + free) * across - 2 * _GAP
            for number, line in enumerate(headings[position].splitlines()[:2], start=1):
                shown = _cut(line, small, room)
                small.write(draw, (left, top + number * _LINE - 4), shown, "ls")
        if square is None:
            continue
        top += above
        image = Image.fromarray(square).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        sheet.paste(image, (left, top))
        for number, line in enumerate(_lines(caption, small), start=1):
            small.write(draw, (left, top + _SIDE + number * _LINE - 4), line, "ls")
    with files.replacing(path) as temporary:
        sheet.save(temporary, format="PNG", compress_level=1)  # photographs get no smaller by more


class _Face:
    """The fonts in one size, each letter of the first that has it: Pillow itself takes one."""

    def __init__(self, size: int) -> None:
        self._fonts = [ImageFont.truetype(path, size) for path in fonts().values()]

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        for number, letters in groupby(text, self._number):
            yield self._fonts[number], "".join(letters)

    @staticmethod
    def _number(letter: str) -> int:
        return next((n for n, known in enumerate(_letters()) if ord(letter) in known), 0)

    def length(self, text: str) -> float:
        """Return how wide a text is, in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def write(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str
    ) -> None:
        """Draw a text to the right of a place."""
        x, y = place
        for font, run in self._runs(text):
            draw.text((x, y), run, "black", font, anchor=anchor)
            x += font.getlength(run)


def _lines(caption: str, font: _Face) -> list[str]:
    """Break a caption into at most two lines that fit below an image."""
    text = "".join(c if c.isprintable() else " " for c in caption).strip()
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}{text[-_LONGEST // 2 :]}"
    first = text
    while font.length(first) > _SIDE:
        first = first[:-1]
    if first == text:
        return [text]
    if " " in first and text[len(first)] != " ":
        first = first[: first.rindex(" ")]
    return [first, _cut(text[len(first) :].strip(), font, _SIDE)]


def _cut(line: str, font: _Face, width: int) -> str:
    """Return a line of a width in pixels, without its beginning where it is longer."""
    text = "".join(c if c.isprintable() else " " for c in line)
    if font.length(text) <= width:
        return text
    while font.length(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"


def _wrapped(text: str, font: _Face, width: int) -> list[str]:
    """Break a text of plain words into lines of a width in pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.length(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


_COLOURS = {"train": "#4c72b0", "validation": "#dd8452", "test": "#55a868", UNUSED: "#bbbbbb"}
_MOST_CLASSES = 60


def classes(path: Path, assignments: Sequence[Assignment]) -> None:
    """Draw how many images each class has in each split; of many classes the largest."""
    counts: dict[str, dict[str, int]] = {}
    for row in assignments:
        of_class = counts.setdefault(row.label, dict.fromkeys((*SPLITS, UNUSED), 0))
        of_class[row.split] += 1
    labels = sorted(counts, key=lambda label: (-sum(counts[label].values()), label))
    shown = labels[:_MOST_CLASSES]
    figure = new_figure(7, 1.5 + 0.28 * len(shown))
    axes = figure.subplots()
    left = [0] * len(shown)
    for split in (*SPLITS, UNUSED):
        widths = [counts[label][split] for label in shown]
        if any(widths):
            axes.barh(shown, widths, left=left, color=_COLOURS[split], label=split)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel("images")
    figure.legend(loc="outside lower center", ncols=4)
    more = (
        f", the largest {len(shown)} of {len(labels)} classes" if len(shown) < len(labels) else ""
    )
    axes.set_title(f"{len(assignments):,} images by class and split{more}")
    save_figure(figure, path)


def sizes(path: Path, entries: Sequence[Entry]) -> None:
    """Draw the files' widths and heights, and how many there are of each mode and format."""
    figure = new_figure(9, 4)
    sides, kinds = figure.subplots(1, 2, width_ratios=[3, 2])
    sides.scatter([e.width for e in entries], [e.height for e in entries], s=8, alpha=0.4)
    for axis, pixels in (("x", [e.width for e in entries]), ("y", [e.height for e in entries])):
        ticks = size_ticks(min(pixels), max(pixels))
        room = max((max(pixels) / min(pixels)) ** 0.08, 1.01)
        sides.set(**{
            f"{axis}scale": "log",
            f"{axis}lim": (min(pixels) / room, max(pixels) * room),
            f"{axis}ticks": ticks,
            f"{axis}ticklabels": [str(tick) for tick in ticks],
        })  # fmt: skip
    sides.minorticks_off()
    sides.set_xlabel("width, pixels")
    sides.set_ylabel("height, pixels")
    sides.set_title("Size of the files' images")
    counts = Counter(f"{entry.format} {entry.mode}" for entry in entries)
    _bars(kinds, dict(counts.most_common(12)), "Format and mode")
    save_figure(figure, path)


def size_ticks(least: int, most: int) -> list[int]:
    """Return two to six whole numbers of pixels, evenly on a logarithmic axis, for any range.

    Examples:
        >>> size_ticks(28, 28), size_ticks(100, 102), size_ticks(10, 8000)
        ([28], [100, 101, 102], [10, 38, 140, 550, 2100, 8000])
    """
    count = min(6, most - least + 1)
    step = (most / least) ** (1 / max(count - 1, 1))
    # Two digits tell neighbours apart where they differ by a third, all digits where they do not.
    places = -1 if step < 1.3 else 1
    exact = [least * step**number for number in range(count)]
    rounded = [round(x) if places < 0 else round(x, 1 - math.floor(math.log10(x))) for x in exact]
    return sorted({int(x) for x in rounded})


def rejects(path: Path, reasons: Mapping[str, int], duplicates: Mapping[str, int]) -> None:
    """Draw how many files were rejected for which reason, and how many images have a twin."""
    figure = new_figure(9, 1.6 + 0.3 * max(len(reasons), 2))
    left, right = figure.subplots(1, 2)
    _bars(left, reasons, f"Rejected: {sum(reasons.values())}")
    named = {name.replace("_", " "): count for name, count in duplicates.items()}
    _bars(right, named, "Kept, but equal to another image")
    save_figure(figure, path)


def _bars(axes: "Axes", counts: Mapping[str, int], title: str) -> None:
    axes.set_title(title)
    if not any(counts.values()):
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    bars = axes.barh(list(counts), list(counts.values()), height=0.6, color=_COLOURS["train"])
    axes.bar_label(bars, padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("images")


_MOST, _FEW = 12, 3  # classes that are all named; of more, the largest and the smallest
_EXAMPLES = 5
_NONE = frozenset(
    ("", "nan", "none", "null", "na", "n/a", "nil", "undefined", "empty", "-", "?", "#n/a")
)
_NO_CLASS = re.compile(
    r"[_.].*|(.*[-_ .])?(thumb(nail)?s?|cache|backups?)|te?mp", re.IGNORECASE | re.DOTALL
)
_DECIMAL = re.compile(r"[-+]?\d*[.,]\d+(e[-+]?\d+)?", re.IGNORECASE)
_SEVERAL = re.compile(r"\s*[,;|]\s*")


def describe_source(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Yield a line on classes, on given splits, on given groups, and one on each oddity.

    Examples:
        >>> found = [Candidate(f"{label}/{n}.png", "", label) for label in "ab" for n in range(3)]
        >>> list(describe_source(found))
        ['6 images in 2 classes: a 3, b 3']
    """
    classes: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    for candidate in candidates:
        classes[candidate.label] += 1
        splits[candidate.split] += 1
        groups[candidate.group] += 1
    total = classes.total()
    yield f"{total:,} images in {len(classes):,} classes: {counts(classes)}"
    if total > (ungiven := splits.pop("", 0)):
        shown = [f"{split} {splits[split]:,}" for split in SPLITS if splits[split]]
        yield f"given splits: {', '.join(shown + [f'none {ungiven:,}'] * bool(ungiven))}"
    if total > (alone := groups.pop("", 0)):
        left = f"; {alone:,} images have none" if alone else ""
        (largest, most), *_ = groups.most_common(1)
        yield f"{len(groups):,} given groups, the largest is {largest} with {most:,} images{left}"
    yield from _oddities(classes)


def _oddities(classes: Mapping[str, int]) -> Iterator[str]:
    def holds_several(label: str) -> bool:
        parts = _SEVERAL.split(label)
        return len(parts) > 1 and any(part in classes for part in parts)

    kinds: dict[str, Callable[[str], object]] = {
        "stand for no label at all; leave these images out, or label them": (
            lambda label: label.strip().lower() in _NONE
        ),
        "are called like what is kept beside a data set; if they are no classes, take them out, "
        "or read the others by ingest.pattern": _NO_CLASS.fullmatch,
        "are numbers with decimals; a measured value is no class, so make ranges of it": (
            _DECIMAL.fullmatch
        ),
        "hold several labels, of which an image has one here": holds_several,
        "look like UTF-8 that was read in another encoding; save the file as UTF-8": _is_garbled,
    }
    for what, is_odd in kinds.items():
        if odd := {label: count for label, count in classes.items() if is_odd(label)}:
            shown = ", ".join(f"{label!r} ({odd[label]:,})" for label in sorted(odd)[:_EXAMPLES])
            more = ", ..." if len(odd) > _EXAMPLES else ""
            yield f"look at the classes: {shown}{more} {what}"
    total = sum(classes.values())
    if total >= 10 and len(classes) > total / 2:
        yield (
            f"look at the classes: {total:,} images have {len(classes):,} different labels, such "
            f"as {min(classes)!r}; an identifier or a measured value is no class, since what is "
            f"learned of a class takes several images of it"
        )


def _is_garbled(label: str) -> bool:
    if "\N{REPLACEMENT CHARACTER}" in label:
        return True
    for encoding in ("latin-1", "cp1252"):
        with suppress(UnicodeError):
            return label.encode(encoding).decode("utf-8") != label
    return False


def counts(classes: Counter[str]) -> str:
    """Return the classes with their numbers of images; of many, those with most and fewest."""
    if len(classes) <= _MOST:
        return ", ".join(f"{label} {count:,}" for label, count in sorted(classes.items()))
    by_size = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))
    most, fewest = (
        ", ".join(f"{label} {count:,}" for label, count in some)
        for some in (by_size[:_FEW], by_size[-_FEW:])
    )
    return f"the largest are {most}; the smallest {fewest}"
