"""Stage ``split``: say for each image whether it trains, validates or tests."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tlpipe import files
from tlpipe.data import manifest as manifests
from tlpipe.data.manifest import (
    SPLITS,
    UNUSED,
    Assignment,
    Entry,
    load_manifest,
    load_split,
    save_split,
)
from tlpipe.errors import ArtifactError, DataError, ParamsError
from tlpipe.params import Section, check_effect
from tlpipe.resampling import deal
from tlpipe.runtime import uniform
from tlpipe.sources.paths import some

_log = logging.getLogger(__name__)
HELD_OUT = ("test", "validation")
_SHOWN, _LISTED = 5, 100  # examples in a message, and in the report, at most
# A share is off by more than this part of it, and by an image at least. A class whose share is off
# by the second part, or by the first where the whole share is off too, is drawn more evenly.
TOLERANCE, _CLASS_TOLERANCE = 0.25, 0.5


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
    small_classes: Literal["error", "train"] = Field(
        default="error",
        description="What happens to a class too small for every split: 'train' keeps it for "
        "training, unmeasured.",
    )
    leaks: Literal["error", "drop"] = Field(
        default="error",
        description="What happens where given splits share images: 'drop' leaves those of the "
        "training split unused.",
    )
    seed: int = Field(default=0, ge=0, description="Another seed draws other splits.")
    images: int | None = Field(
        default=None,
        ge=1,
        description="Train on so many of the training images at most, and leave the others unused. "
        "Classes keep their shares, and more images contain fewer ones.",
    )
    images_seed: int = Field(
        default=0, ge=0, description="Another seed picks other ones of the training images."
    )

    @model_validator(mode="after")
    def _fold_exists(self) -> "Params":
        if self.images is None:
            check_effect("split", self, ("images_seed",), "split.images is not set")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"split.fold must be below split.folds; {self.fold} is not")
        if self.folds:
            reason = f"split.folds is {self.folds}, of which one tests and one validates"
            check_effect("split", self, ("validation", "test", "leaks"), reason)
        return self


def run(
    *, manifest: Path, split: Path, split_report: Path, placements: Path, params: Params
) -> None:
    """Write the split table and its report; append what is new to ``placements``.

    ``placements`` says where images are already: those stay there. Where it was drawn by other
    parameters, all are drawn anew.

    Raises:
        ArtifactError: ``placements`` cannot be read, has an image in two splits, or has lost rows.
        DataError: a class has too few distinct images for three splits, or given splits share
            images.
    """
    entries = list(load_manifest(manifest))
    earlier = manifests.load_placements(placements, manifests.drawn_by(params.model_dump()))
    _say_what_is_new(entries, earlier, placements)
    result = assign(entries, params, earlier.places)
    assignments = [
        Assignment(e.path, e.label, s, f, e.group, e.sha256, e.box)
        for e, s, f in zip(entries, result.splits, result.folds, strict=True)
    ]
    _check_rows(assignments, earlier, placements, split, split_report)
    shares = _shares(entries, result, params)
    # Images that are gone or set aside keep their rows; what a source gives goes before a row.
    # They are written first: the table of a run that was killed has no image without one.
    aside = {entries[row].sha256 for row in result.aside}
    new = {s: place for s, place in manifests.of_table(assignments).items() if s not in aside}
    manifests.save_placements(placements, replace(earlier, places={**earlier.places, **new}))
    apart = _apart(entries, result, earlier.places)
    if params.images is not None:
        assignments = limited(assignments, params.images, params.images_seed)
    save_split(split, assignments)
    content = _describe(assignments, result, shares, params)
    files.write_json(split_report, {**content, "apart": apart[:_LISTED]})
    counts = Counter(row.split for row in assignments)
    _log.info(", ".join(f"{name} {counts[name]}" for name in (*SPLITS, UNUSED) if counts[name]))
    if dropped := result.leaks - len(result.aside):
        _log.info("%s images left unused: their like stands in a held-out split", dropped)
    if apart:
        shown = [f"{path} ({was}) is like {like} ({place})" for path, was, like, place in apart]
        _log.warning(
            "%s images are left unused, since %s places images like them in another split, as "
            "where branches are merged; held-out ones stay, test before validation: %s",
            *(len(apart), placements, ", ".join(shown[:_SHOWN]) + ", ..." * (len(apart) > _SHOWN)),
        )
    for name, share in shares.items():
        if share["reason"]:
            found, asked = f"{share['realised']:.1%}", f"{share['asked']:.1%}"
            _log.warning(
                "%s has %s of the images instead of %s: %s", name, found, asked, share["reason"]
            )
        if uneven := share["classes"]:
            worst = [f"{c['label']} {c['held_out']} of {c['images']}" for c in uneven[:_SHOWN]]
            _log.warning(
                "%s is off by over a quarter of %s in %s of %s classes: it holds %s%s",
                *(name, f"{share['asked']:.1%}", share["uneven_classes"]),
                *(len({entry.label for entry in entries}), ", ".join(worst)),
                ", ..." if share["uneven_classes"] > _SHOWN else "",
            )


def limited(assignments: Sequence[Assignment], images: int, seed: int) -> list[Assignment]:
    """Leave all but so many training images unused; nothing else changes.

    Each class is walked through in the order of hashes, all of them at the same pace, so that
    classes keep their shares as far as whole images go, and the images for a larger number contain
    those for a smaller one. The first image of each class comes before all second ones.

    Raises:
        ParamsError: there are more classes than that.
    """
    classes: dict[str, list[int]] = defaultdict(list)
    for row in manifests.rows_of(assignments, "train"):
        classes[assignments[row].label].append(row)
    if images < len(classes):
        raise ParamsError(
            f"split.images is {images}; {len(classes)} classes train, and each needs an image. "
            f"Raise it in params.yaml."
        )
    position = {
        row: uniform(seed, f"{assignments[row].sha256} {assignments[row].box}")
        for rows in classes.values()
        for row in rows
    }
    order: list[tuple[float, float, int]] = []
    for rows in classes.values():
        rows.sort(key=lambda row: (position[row], row))
        paces = [-1.0, *((place + 0.5) / len(rows) for place in range(1, len(rows)))]
        order += zip(paces, (position[row] for row in rows), rows, strict=True)
    left = {row for _, _, row in sorted(order)[images:]}
    return [
        assignment._replace(split=UNUSED) if row in left else assignment
        for row, assignment in enumerate(assignments)
    ]


@dataclass(frozen=True)
class Result:
    """For each image its split and its fold; how many were left out as leaks.

    ``aside``: rows of those among them that were placed elsewhere than their like.
    """

    splits: list[str]
    folds: list[str]
    leaks: int
    aside: tuple[int, ...] = ()


def assign(
    entries: Sequence[Entry], params: Params, earlier: Mapping[str, str] | None = None
) -> Result:
    """Return a split for each image.

    A group is placed by the hash of the seed and its name alone, so that images added later move
    no old one; classes are about evenly spread. Only for a class so small that a split would stay
    empty is its nearest group moved there. What an earlier table says goes before all that: by it,
    an image that joins a group, or fills a class, moves no old one either. Of a group that it
    places apart, one split keeps its images, the test split first, and the others are left out.
    Splits that the source gives are kept; what they lack is drawn from their training images.

    ``earlier``: of each image that was there before, its split, or its fold where there are folds.

    Raises:
        DataError: as ``run``.
    """
    groups = _Groups(entries, _standing(entries, earlier or {}))
    if params.folds and any(entry.split for entry in entries):
        raise DataError(
            f"split.folds is {params.folds}, but the source gives splits; expected one of the two. "
            f"Take split.folds out, or the splits."
        )
    leaks = _leaks(entries, groups, params)
    splits, folds = _draw(entries, groups, params)
    leaks |= groups.aside.keys()
    splits = [UNUSED if row in leaks else split for row, split in enumerate(splits)]
    _check_classes(entries, splits, params, earlier or {})
    return Result(splits, folds, len(leaks), tuple(groups.aside))


def _apart(
    entries: Sequence[Entry], result: Result, earlier: Mapping[str, str]
) -> list[tuple[str, str, str, str]]:
    """Return of each image set aside its path and place, and those of one like it that stays."""
    stays: dict[str, int] = {}
    for row, split in enumerate(result.splits):
        if split != UNUSED:
            stays.setdefault(entries[row].group, row)
    pairs = []
    for row in result.aside:
        like = stays[entries[row].group]
        place = result.folds[like] or result.splits[like]
        was = earlier[entries[row].sha256]
        pairs.append((entries[row].path, was, entries[like].path, place))
    return pairs


def _standing(entries: Sequence[Entry], earlier: Mapping[str, str]) -> dict[str, str]:
    """Return the places without those that the source has given another meaning since.

    Where it gives a held-out split now, what it gives to train is not in that one, wherever it was
    drawn into before.
    """
    given = {entry.split for entry in entries if entry.split in HELD_OUT}
    moved = {e.sha256 for e in entries if e.split == "train" and earlier.get(e.sha256) in given}
    return {image: place for image, place in earlier.items() if image not in moved}


def _say_what_is_new(
    entries: Sequence[Entry], earlier: manifests.Placements, placements: Path
) -> None:
    """Say where images are drawn anew that a reader of ``placements`` would think are placed."""
    if earlier.others and not earlier.places:
        _log.warning(
            "no row of %s was drawn by %s, as params.yaml says now: all images are drawn anew, and "
            "the %s rows of other drawings stay",
            *(placements, earlier.drawn_by, len(earlier.others)),
        )
    images = {entry.sha256 for entry in entries}
    known = len(images & earlier.places.keys())
    if earlier.places and known < min(len(images), len(earlier.places)) / 2:
        _log.warning(
            "%s places %s images, of which %s are in the source; the other %s of it are drawn "
            "anew. Files whose bytes changed, as by another encoding, count as new ones",
            *(placements, len(earlier.places), known, len(images) - known),
        )


def _check_rows(
    assignments: Sequence[Assignment],
    earlier: manifests.Placements,
    placements: Path,
    split: Path,
    report: Path,
) -> None:
    """Check that no image moves for want of a row, as far as the last run's table lies here.

    Raises:
        ArtifactError: one would.
    """
    try:
        params = files.read_json(report).get("params", {})
        table = load_split(split) if params.keys() >= set(manifests.DRAWN_BY) else []
    except ArtifactError:
        return  # no run before, or one of another version
    if not table or manifests.drawn_by(params) != earlier.drawn_by:
        return
    before = {row.sha256: row.fold or row.split for row in table if row.split != UNUSED}
    lost = [
        row
        for row in assignments
        if row.sha256 in before and row.sha256 not in earlier.places and row.split != UNUSED
    ]
    moved = [row for row in lost if (row.fold or row.split) != before[row.sha256]]
    if moved:
        first = moved[0]
        raise ArtifactError(
            f"{placements} has no row of {len(lost)} images that {split} has placed, and "
            f"{len(moved)} of them would move, the first is {first.path} from "
            f"{before[first.sha256]} to {first.fold or first.split}; expected the rows of all that "
            f"were ever placed, since none may train that has tested. A merge or an edit may have "
            f"lost them: 'git checkout -- {placements}' takes the file from Git again. To draw "
            f"them anew on purpose, or after a change of branches, delete {split}."
        )


def _draw(
    entries: Sequence[Entry], groups: "_Groups", params: Params, *, fill: bool = True
) -> tuple[list[str], list[str]]:
    """Return split and fold of each image; ``fill``: whether small classes stand in every split."""
    if params.folds:
        groups.place_in_folds(params.folds, params.seed)
        places = {str(fold): "train" for fold in range(params.folds)}
        places[str((params.fold + 1) % params.folds)] = "validation"
        places[str(params.fold)] = "test"
        folds = [groups.aside.get(r) or groups.place[e.group] for r, e in enumerate(entries)]
        return [places[fold] for fold in folds], folds
    groups.place_by_hash(_asked(entries, params), params, fill=fill)
    splits = [
        entry.split if entry.split in HELD_OUT else groups.place[entry.group] for entry in entries
    ]
    return splits, [""] * len(entries)


def _asked(entries: Sequence[Entry], params: Params) -> dict[str, float]:
    """Return the share of each split that is drawn, not given."""
    if params.folds:
        return dict.fromkeys(HELD_OUT, 1 / params.folds)
    given = {entry.split for entry in entries}
    shares = {"test": params.test, "validation": params.validation}
    return {split: share for split, share in shares.items() if split not in given}


class _Groups:
    """The groups of a data set and where each is placed."""

    def __init__(self, entries: Sequence[Entry], earlier: Mapping[str, str]) -> None:
        self.place: dict[str, str] = {}
        self.labels: dict[str, set[str]] = defaultdict(set)
        self.given: set[str] = set()
        self._members: dict[str, set[str]] = defaultdict(set)
        self._images: dict[str, Counter[str]] = defaultdict(Counter)
        before: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in entries:
            self.labels[entry.group].add(entry.label)
            self._members[entry.label].add(entry.group)
            if entry.split in HELD_OUT:
                self.given.add(entry.group)
                if self.place.get(entry.group) != "test":
                    self.place[entry.group] = entry.split
            elif place := earlier.get(entry.sha256):
                before[entry.group][place] += 1
        for group, places in before.items():
            # A test image stays one, whatever joins its group.
            self.place.setdefault(
                group, min(places, key=lambda p: (p != "test", p == "train", -places[p], p))
            )
        self.fixed = set(self.place)
        # Rows of images that were placed elsewhere than their group, and where: they are left out.
        self.aside = {
            row: place
            for row, entry in enumerate(entries)
            if entry.split not in HELD_OUT
            and (place := earlier.get(entry.sha256, self.place.get(entry.group)))
            and place != self.place[entry.group]
        }
        for row, entry in enumerate(entries):
            if entry.split not in HELD_OUT and row not in self.aside:
                self._images[entry.label][entry.group] += 1

    def place_by_hash(self, shares: Mapping[str, float], params: Params, *, fill: bool) -> None:
        """Place every group that has no place yet; ``fill``: then move those of small classes."""
        position = {group: uniform(params.seed, group) for group in self.labels}
        bounds = {}
        threshold = 0.0
        for split, share in shares.items():
            bounds[split] = threshold = threshold + share
        for group in self.labels.keys() - self.place.keys():
            hit = (split for split, bound in bounds.items() if position[group] < bound)
            self.place[group] = next(hit, "train")
        self._even_out(shares, position)
        if not fill:
            return
        # The rarest first: they have the least choice.
        for label in sorted(self._members, key=lambda label: (len(self._members[label]), label)):
            self._complete(label, ["train", *shares], bounds, position, params)

    def place_in_folds(self, folds: int, seed: int) -> None:
        """Deal the groups of each class over the folds, as evenly as they go."""
        placed = {group: int(place) for group, place in self.place.items()}
        dealt = deal(self._members, folds, seed, placed, of_equal_size=True)
        self.place = {group: str(fold) for group, fold in dealt.items()}

    def _even_out(self, shares: Mapping[str, float], position: Mapping[str, float]) -> None:
        """Move groups of classes that hashes alone hold out too much or too little of.

        Between train and the split, in the order of the hashes, as long as that brings the number
        of held-out images nearer to the one asked for.
        """
        everything = sum(map(Counter.total, self._images.values()))
        for split, share in shares.items():
            counts = {
                label: sum(n for group, n in images.items() if self.place[group] == split)
                for label, images in self._images.items()
            }
            total, wanted = sum(counts.values()), share * everything
            is_off = _is_off(total, wanted, TOLERANCE)
            tolerance = TOLERANCE if is_off else _CLASS_TOLERANCE
            for label, images in sorted(self._images.items()):
                count, asked = counts[label], share * images.total()
                if not _is_off(count, asked, tolerance):
                    continue
                here, there, sign = ("train", split, 1) if count < asked else (split, "train", -1)
                for group in sorted(images, key=lambda group: (position[group], group)):
                    after = count + sign * images[group]
                    if (
                        self.place[group] == here
                        and group not in self.fixed
                        and self.labels[group] == {label}
                        and abs(after - asked) < abs(count - asked)
                        # What is right as a whole stays so, whatever one class would have.
                        and (is_off or not _is_off(total + after - count, wanted, TOLERANCE))
                    ):
                        total += after - count
                        self.place[group], count = there, after

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


def _shares(entries: Sequence[Entry], result: Result, params: Params) -> dict[str, dict[str, Any]]:
    """Return of each drawn split the asked and the realised share, and why that is off, or None.

    And in how many classes it is off, the worst first. All is a function of the table: what is
    drawn now and what stood there before give the same.
    """
    drawn = [
        row
        for row, entry in enumerate(entries)
        if entry.split not in HELD_OUT and result.splits[row] != UNUSED
    ]

    def share(splits: Sequence[str], name: str) -> float:
        return sum(splits[row] == name for row in drawn) / len(drawn)

    images = Counter(entries[row].label for row in drawn)
    shares: dict[str, dict[str, Any]] = {}
    for name, asked in _asked(entries, params).items():

        def is_off(splits: Sequence[str], name: str = name, asked: float = asked) -> bool:
            return _is_off(share(splits, name) * len(drawn), asked * len(drawn), TOLERANCE)

        found = Counter(entries[row].label for row in drawn if result.splits[row] == name)
        uneven = sorted(
            (-abs(found[label] / count - asked), label)
            for label, count in images.items()
            if _is_off(found[label], asked * count, TOLERANCE)
        )

        reason = None
        if is_off(result.splits):
            anew, plain = (
                _draw(entries, _Groups(entries, {}), params, fill=fill)[0] for fill in (True, False)
            )
            largest = max(Counter(entry.group for entry in entries).values())
            if result.aside or not is_off(anew):
                reason = "images that were placed earlier stay where they are"
            elif not is_off(plain):
                only_trains = params.small_classes == "train"
                where = "only train" if only_trains else "stand in every split"
                reason = f"classes of few images {where}, whatever the share"
            elif largest > 1:
                reason = f"groups stay whole, and the largest has {largest} images"
            else:
                reason = "the hashes of these images fall so; another split.seed draws anew"
        shares[name] = {
            "asked": asked,
            "realised": share(result.splits, name),
            "reason": reason,
            "uneven_classes": len(uneven),
            "classes": [
                {"label": label, "held_out": found[label], "images": images[label]}
                for _, label in uneven[:_LISTED]
            ],
        }
    return shares


def _is_off(found: float, asked: float, tolerance: float) -> bool:
    """Return whether a number of images is; whole images cannot be nearer than to one."""
    difference = abs(found - asked)
    return difference > tolerance * asked and difference > 1 - 1e-6


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
    if leaks and params.leaks == "error":
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


def _check_classes(
    entries: Sequence[Entry], splits: Sequence[str], params: Params, earlier: Mapping[str, str]
) -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    distinct: dict[str, set[str]] = defaultdict(set)
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for entry, split in zip(entries, splits, strict=True):
        found[entry.label][split] += 1
        distinct[entry.label].add(entry.group)
        if place := earlier.get(entry.sha256):
            rows[entry.label][place] += 1
    needed: Iterable[str] = ("train",)
    keep = ""
    if params.small_classes == "error":
        needed = SPLITS
        keep = ", or set split.small_classes: train to keep it unmeasured"
    if short := [
        label for label, counts in sorted(found.items()) if not all(map(counts.get, needed))
    ]:
        label, *others = short
        missing = [split for split in needed if not found[label][split]]
        more = f" {len(others)} more lack one: {some(others, 5)}." if others else ""
        advice = "Add images"
        if known := rows[label]:
            places = ", ".join(f"{place} {count}" for place, count in sorted(known.items()))
            advice = (
                f"splits.csv places {known.total()} of them ({places}), where they stay. Add "
                f"images that it does not know; or draw all anew by another split.seed; or "
                f"draw these anew: delete their rows there, and the split table of the last run"
            )
        raise DataError(
            f"the class {label!r} has {found[label].total()} images, {len(distinct[label])} of "
            f"them distinct, and none for {', '.join(missing)}; every class must stand in "
            f"{', '.join(needed)}.{more} {advice}; or take the class out{keep}."
        )
    for split in SPLITS:
        if split not in splits:
            raise DataError(f"no image is left for {split}. Add images.")


def _describe(
    assignments: Sequence[Assignment],
    result: Result,
    shares: Mapping[str, Mapping[str, Any]],
    params: Params,
) -> dict[str, Any]:
    counts: dict[str, Counter[str]] = {split: Counter() for split in (*SPLITS, UNUSED)}
    for row in assignments:
        counts[row.split][row.label] += 1
    return {
        "params": params.model_dump(include=set(manifests.DRAWN_BY)),
        "classes": {split: dict(sorted(found.items())) for split, found in counts.items()},
        "images": {split: found.total() for split, found in counts.items()},
        "leaks": result.leaks,
        "shares": shares,
    }
