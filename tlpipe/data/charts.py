"""Draw what a data set holds: how many, how large, how labelled, how it looks."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe import pictures
from tlpipe.data.manifest import SPLITS, UNUSED, Assignment, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    figure = pictures.new_figure(7, 1.5 + 0.28 * len(shown))
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
    pictures.save(figure, path)


def sizes(path: Path, entries: Sequence[Entry]) -> None:
    """Draw the files' widths and heights, and how many there are of each mode and format."""
    figure = pictures.new_figure(9, 4)
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
    pictures.save(figure, path)


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
    figure = pictures.new_figure(9, 1.6 + 0.3 * max(len(reasons), 2))
    left, right = figure.subplots(1, 2)
    _bars(left, reasons, f"Rejected: {sum(reasons.values())}")
    named = {name.replace("_", " "): count for name, count in duplicates.items()}
    _bars(right, named, "Kept, but equal to another image")
    pictures.save(figure, path)


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
