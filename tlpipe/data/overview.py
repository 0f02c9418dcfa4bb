"""Say how a source was understood: its classes, splits and groups, and what is plainly odd of them.

A folder of thumbnails, an empty cell or a measured value makes a class like any other. Nobody but
who made the data set can tell, and only if somebody shows it to them before anything is trained.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from tlpipe.data.manifest import SPLITS
from tlpipe.sources.candidates import Candidate

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


def describe(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Yield a line on classes, on given splits, on given groups, and one on each oddity.

    Examples:
        >>> found = [Candidate(f"{label}/{n}.png", "", label) for label in "ab" for n in range(3)]
        >>> list(describe(found))
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
    yield f"{total:,} images in {len(classes):,} classes: {_counts(classes)}"
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


def _counts(classes: Counter[str]) -> str:
    """Return the classes with their numbers of images; of many, those with most and fewest."""
    if len(classes) <= _MOST:
        return ", ".join(f"{label} {count:,}" for label, count in sorted(classes.items()))
    by_size = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))
    most, fewest = (
        ", ".join(f"{label} {count:,}" for label, count in some)
        for some in (by_size[:_FEW], by_size[-_FEW:])
    )
    return f"the largest are {most}; the smallest {fewest}"
