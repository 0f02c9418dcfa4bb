"""Stage ``split``: say for each image whether it trains, validates or tests."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field

from tlpipe.data.manifest import SPLITS, Assignment, Entry, load_manifest, save_split
from tlpipe.errors import DataError
from tlpipe.params import Section
from tlpipe.seeds import uniform

_log = logging.getLogger(__name__)


class Params(Section):
    """Which share of each class is held out."""

    validation: float = Field(
        default=0.2, gt=0, lt=0.5, description="Share of the images that tune the training."
    )
    test: float = Field(
        default=0.2,
        gt=0,
        lt=0.5,
        description="Share of the images that measure the result. Given splits go before it.",
    )
    seed: int = Field(default=0, ge=0, description="Another seed draws other splits.")


def run(*, manifest: Path, split: Path, params: Params) -> None:
    """Write the split table.

    Raises:
        DataError: a class has too few distinct images for three splits.
    """
    entries = load_manifest(manifest)
    splits = assign(entries, params)
    assignments = [Assignment(e.path, e.label, s) for e, s in zip(entries, splits, strict=True)]
    save_split(split, assignments)
    counts = Counter(splits)
    _log.info(", ".join(f"{name} {counts[name]}" for name in SPLITS))


def assign(entries: Sequence[Entry], params: Params) -> list[str]:
    """Return a split for each image.

    A group is placed by the hash of the seed and its name alone, so that images added later move
    no old one; classes are about evenly spread. Only in a class so small that a split would stay
    empty is the nearest image moved there, and it may move back when the class has grown.
    Splits that the source gives are kept; what they lack is drawn from their training images.
    """
    given = {entry.split for entry in entries if entry.split}
    shares = {"test": params.test, "validation": params.validation}
    drawn = {split: share for split, share in shares.items() if split not in given}
    placed: dict[str, str] = {}
    for label, members in _by_label(entries).items():
        free = {e.group for e in members if e.split in ("", "train")}
        placed |= _place(free, drawn, params.seed)
        if len(found := {_split_of(entry, placed) for entry in members}) < len(SPLITS):
            missing = ", ".join(split for split in SPLITS if split not in found)
            raise DataError(
                f"the class {label!r} has {len(members)} images, and none for {missing}; every "
                f"class must stand in {', '.join(SPLITS)}. Add images or take the class out."
            )
    return [_split_of(entry, placed) for entry in entries]


def _by_label(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    classes = defaultdict(list)
    for entry in entries:
        classes[entry.label].append(entry)
    return classes


def _place(groups: set[str], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Give each group of one class its split by the number that its name hashes to."""
    position = {group: uniform(seed, group) for group in groups}
    left = sorted(groups, key=lambda group: (position[group], group))
    placed: dict[str, str] = {}
    threshold = 0.0
    for still_empty, (split, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
        threshold += share
        # At least one, and as many left as there are splits without any: a small class would
        # else by chance be measured, or learned, on nothing.
        chosen = [group for group in left if position[group] < threshold] or left[:1]
        chosen = chosen[: max(len(left) - still_empty, 0)]
        placed |= dict.fromkeys(chosen, split)
        left = left[len(chosen) :]
    return placed | dict.fromkeys(left, "train")


def _split_of(entry: Entry, placed: dict[str, str]) -> str:
    return entry.split if entry.split in ("validation", "test") else placed[entry.group]
