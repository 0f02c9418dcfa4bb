"""Stage ``split``: say for each image whether it trains, validates or tests."""

import csv
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tlpipe import files
from tlpipe.data.folds import deal
from tlpipe.data.manifest import (
    SPLITS,
    UNUSED,
    Assignment,
    Entry,
    load_manifest,
    save_split,
)
from tlpipe.errors import ArtifactError, DataError
from tlpipe.params import Section, check_effect
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
    folds: int | None = Field(
        default=None,
        ge=3,
        le=20,
        description="For small sets, instead of the shares: equal folds, of which one tests and "
        "the next one validates. One run for each split.fold tests every image once.",
    )
    fold: int = Field(default=0, ge=0, description="The fold that tests, counted from 0.")
    small_classes: Literal["refuse", "train"] = Field(
        default="refuse",
        description="What happens to a class too small for every split: 'train' keeps it for "
        "training, unmeasured.",
    )
    leaks: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="What happens where given splits share images: 'drop' leaves those of the "
        "training split unused.",
    )
    seed: int = Field(default=0, ge=0, description="Another seed draws other splits.")

    @model_validator(mode="after")
    def _fold_exists(self) -> "Params":
        if self.fold >= (self.folds or 1):
            raise ValueError(f"split.fold must be below split.folds; {self.fold} is not")
        if self.folds:
            reason = f"split.folds is {self.folds}, of which one tests and one validates"
            check_effect("split", self, ("validation", "test"), reason)
        return self


def run(*, manifest: Path, split: Path, report: Path, params: Params) -> None:
    """Write the split table and its report.

    The table of an earlier run, where it stands, keeps its images where they are.

    Raises:
        DataError: a class has too few distinct images for three splits, or given splits share
            images.
    """
    entries = list(load_manifest(manifest))
    result = assign(entries, params, _earlier(split, report, params))
    assignments = [
        Assignment(e.path, e.label, s, f, e.group, e.sha256, e.box)
        for e, s, f in zip(entries, result.splits, result.folds, strict=True)
    ]
    save_split(split, assignments)
    files.write_json(report, _describe(assignments, result, params))
    counts = Counter(result.splits)
    _log.info(", ".join(f"{name} {counts[name]}" for name in (*SPLITS, UNUSED) if counts[name]))
    if result.leaks:
        _log.info("%s images left unused: their like stands in a held-out split", result.leaks)


Image = tuple[str, str]  # sha256 and box: which image, whatever its path


@dataclass(frozen=True)
class Result:
    """For each image its split and its fold; how many were left out as leaks."""

    splits: list[str]
    folds: list[str]
    leaks: int


def assign(
    entries: Sequence[Entry], params: Params, earlier: Mapping[Image, str] | None = None
) -> Result:
    """Return a split for each image.

    A group is placed by the hash of the seed and its name alone, so that images added later move
    no old one; classes are about evenly spread. Only for a class so small that a split would stay
    empty is its nearest group moved there. What an earlier table says goes before all that: by it,
    an image that joins a group, or fills a class, moves no old one either. Splits that the source
    gives are kept; what they lack is drawn from their training images.

    ``earlier``: of each image that was there before, its split, or its fold where there are folds.

    Raises:
        DataError: as ``run``.
    """
    groups = _Groups(entries, earlier or {})
    if params.folds and any(entry.split for entry in entries):
        raise DataError(
            f"split.folds is {params.folds}, but the source gives splits; expected one of the two. "
            f"Take split.folds out, or the splits."
        )
    leaks = _leaks(entries, groups, params)
    if params.folds:
        groups.place_in_folds(params.folds, params.seed)
        places = {str(fold): "train" for fold in range(params.folds)}
        places[str((params.fold + 1) % params.folds)] = "validation"
        places[str(params.fold)] = "test"
        folds = [groups.of(row, entry) for row, entry in enumerate(entries)]
        splits = [places[fold] for fold in folds]
    else:
        given = {entry.split for entry in entries if entry.split}
        shares = {"test": params.test, "validation": params.validation}
        groups.place_by_hash({s: share for s, share in shares.items() if s not in given}, params)
        folds = [""] * len(entries)
        splits = [
            entry.split if entry.split in ("validation", "test") else groups.of(row, entry)
            for row, entry in enumerate(entries)
        ]
    leaks |= groups.bridges
    splits = [UNUSED if row in leaks else split for row, split in enumerate(splits)]
    _check_classes(entries, splits, params)
    return Result(splits, folds, len(leaks))


class _Groups:
    """The groups of a data set and where each is placed."""

    def __init__(self, entries: Sequence[Entry], earlier: Mapping[Image, str]) -> None:
        self.place: dict[str, str] = {}
        self.labels: dict[str, set[str]] = defaultdict(set)
        self.given: set[str] = set()
        self._members: dict[str, set[str]] = defaultdict(set)
        before: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in entries:
            self.labels[entry.group].add(entry.label)
            self._members[entry.label].add(entry.group)
            if entry.split in ("validation", "test"):
                self.given.add(entry.group)
                if self.place.get(entry.group) != "test":
                    self.place[entry.group] = entry.split
            elif place := earlier.get((entry.sha256, entry.box)):
                before[entry.group][place] += 1
        for group, places in before.items():
            self.place.setdefault(group, min(places, key=lambda p: (-places[p], p)))
        self.fixed = set(self.place)
        # New images that join two old groups of different splits: the old ones stay where they
        # are, as they did without them, and the new ones are left out.
        self.own: dict[int, str] = {}
        self.bridges: set[int] = set()
        for row, entry in enumerate(entries):
            if len(before[entry.group]) > 1:
                if place := earlier.get((entry.sha256, entry.box)):
                    self.own[row] = place
                else:
                    self.bridges.add(row)

    def of(self, row: int, entry: Entry) -> str:
        """Return where an image is placed."""
        return self.own.get(row, self.place[entry.group])

    def place_by_hash(self, shares: Mapping[str, float], params: Params) -> None:
        """Place every group that has no place yet."""
        position = {group: uniform(params.seed, group) for group in self.labels}
        bounds = {}
        threshold = 0.0
        for split, share in shares.items():
            bounds[split] = threshold = threshold + share
        for group in self.labels.keys() - self.place.keys():
            hit = (split for split, bound in bounds.items() if position[group] < bound)
            self.place[group] = next(hit, "train")
        # The rarest first: they have the least choice.
        for label in sorted(self._members, key=lambda label: (len(self._members[label]), label)):
            self._complete(label, ["train", *shares], bounds, position, params)

    def place_in_folds(self, folds: int, seed: int) -> None:
        """Deal the groups of each class over the folds, as evenly as they go."""
        placed = {group: int(place) for group, place in self.place.items()}
        dealt = deal(self._members, folds, seed, placed, of_equal_size=True)
        self.place = {group: str(fold) for group, fold in dealt.items()}

    def _complete(
        self,
        label: str,
        splits: Sequence[str],
        bounds: Mapping[str, float],
        position: Mapping[str, float],
        params: Params,
    ) -> None:
        """Move groups of a small class so that it stands in every split, or at least trains."""
        members = self._members[label]
        free = sorted(members - self.given, key=lambda group: (position[group], group))
        if len(free) < len(splits) and params.small_classes == "train":
            # Its own images all train; of photos that it shares with other classes, one does.
            for group in free:
                if self.labels[group] == {label} and group not in self.fixed:
                    self.place[group] = "train"
            splits = ["train"]
        for split in splits:
            if any(self.place[group] == split for group in members):
                continue
            aim = bounds.get(split, 1.0)
            # To train comes first: what a move takes from another class is put right after it.
            movable = [
                group
                for group in free
                if group not in self.fixed and (split == "train" or self._can_leave(group))
            ]
            if movable:
                nearest = min(movable, key=lambda group: (abs(position[group] - aim), group))
                self.place[nearest] = split
                self.fixed.add(nearest)

    def _can_leave(self, group: str) -> bool:
        """Return whether each of its classes has another group where this one stands."""
        here = self.place[group]
        return all(
            any(other != group and self.place[other] == here for other in self._members[label])
            for label in self.labels[group]
        )


def _earlier(split: Path, report: Path, params: Params) -> dict[Image, str]:
    """Return where an earlier run with the same parameters put its images.

    Only the columns that this needs are asked for, since another version may have written others.

    Raises:
        ArtifactError: there is a table which cannot be read; without it, images would move.
    """
    if not (split.is_file() and report.is_file()):
        return {}
    if files.read_json(report).get("params") != _drawn_by(params):
        return {}
    with files.open_csv(split, "r") as file:
        rows = csv.DictReader(file)
        needed = ("sha256", "box", "split", "fold")
        if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise ArtifactError(
                f"{split} has no column {missing[0]}; expected {', '.join(needed)}. It says where "
                f"images are that must stay there. Put it right, or delete it to draw all anew."
            )
        return {
            (row["sha256"], row["box"]): row["fold"] or row["split"]
            for row in rows
            if row["split"] != UNUSED
        }


def _drawn_by(params: Params) -> dict[str, Any]:
    """Return the parameters that another table would be drawn by."""
    return params.model_dump(include={"validation", "test", "folds", "seed"})


def _leaks(entries: Sequence[Entry], groups: _Groups, params: Params) -> set[int]:
    """Return the rows to leave out, so that no group stands in two of the given splits.

    Raises:
        DataError: there are such rows and ``split.leaks`` does not allow for it.
    """
    leaks = {
        row
        for row, entry in enumerate(entries)
        if entry.group in groups.given and entry.split not in ("", groups.place[entry.group])
    }
    if leaks and params.leaks == "refuse":
        row = min(leaks)
        kind = groups.place[entries[row].group]
        twin = next(e for e in entries if e.group == entries[row].group and e.split == kind)
        raise DataError(
            f"{len(leaks)} images stand in two of the given splits, equal or nearly so: "
            f"{entries[row].path} is in {entries[row].split}, {twin.path} in {kind}; expected "
            f"none, since what was learned would be measured. Remove them, or set split.leaks: "
            f"drop, which leaves the training copies unused."
        )
    return leaks


def _check_classes(entries: Sequence[Entry], splits: Sequence[str], params: Params) -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    distinct: dict[str, set[str]] = defaultdict(set)
    for entry, split in zip(entries, splits, strict=True):
        found[entry.label][split] += 1
        distinct[entry.label].add(entry.group)
    for label, counts in sorted(found.items()):
        needed: Iterable[str] = ("train",)
        keep = ""
        if params.small_classes == "refuse":
            needed = SPLITS
            keep = ", or set split.small_classes: train to keep it unmeasured"
        if missing := [split for split in needed if not counts[split]]:
            raise DataError(
                f"the class {label!r} has {counts.total()} images, {len(distinct[label])} of them "
                f"distinct, and none for {', '.join(missing)}; every class must stand in "
                f"{', '.join(needed)}. Add images, or take the class out{keep}."
            )
    for split in SPLITS:
        if split not in splits:
            raise DataError(f"no image is left for {split}. Add images.")


def _describe(assignments: Sequence[Assignment], result: Result, params: Params) -> dict[str, Any]:
    counts: dict[str, Counter[str]] = {split: Counter() for split in (*SPLITS, UNUSED)}
    for row in assignments:
        counts[row.split][row.label] += 1
    return {
        "params": _drawn_by(params),
        "classes": {split: dict(sorted(found.items())) for split, found in counts.items()},
        "images": {split: found.total() for split, found in counts.items()},
        "leaks": result.leaks,
    }
