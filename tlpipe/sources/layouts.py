"""Read labels from folders: which folders are classes, and which are splits or only wrap others.

Names that share a prefix are noticed: a patient, a series or a video that must stay in one split.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

from tlpipe.errors import DataError
from tlpipe.sources import Candidate, given_split
from tlpipe.sources.paths import folder_of, is_image, some
from tlpipe.sources.storage import Storage

# What follows the class folder, the coarsest first. What does not match belongs to no group.
_FORMS = {
    "the folder inside of its class": r"(?:(?P<group>[^/]+)/)?",
    "what its name begins with": r"(?:.*/)?(?:(?P<group>[^-_. /]+)[-_. ][^/]+\.[^./]+$)?",
    "its name up to the last separator": r"(?:.*/)?(?:(?P<group>[^/]+)[-_. ][^-_. /]+\.[^./]+$)?",
    "its name up to the number": r"(?:.*/)?(?:(?P<group>[^/]*[^/\d])\d+\.[^./]+$)?",
}
LEAST_GROUPS = 6
_LEAST_MATCHED, _MOST_OF_ONE = 0.9, 1 / 3  # of all images
_FEW = 10_000  # names after which a form that makes groups of one is given up


def advise(candidates: Iterable[Candidate], roots: Mapping[str, str]) -> str | None:
    """Return a sentence on names that share prefixes, with the pattern that groups by them.

    ``roots``: the folders whose folders are classes, and the split of each, as in ``Layout``. A
    prefix that all images of a class have says nothing, nor does one that nearly all images have,
    nor one of a single image.
    """
    start = pattern_of_folders(roots)
    if start is None:
        return None
    forms = [_Form(what, re.compile(start + rest)) for what, rest in _FORMS.items()]
    count = 0
    for count, candidate in enumerate(candidates, start=1):
        for form in forms:
            form.add(candidate)
        if count % _FEW == 0:
            forms = [form for form in forms if len(form.groups) <= form.groups.total() / 2]
    for form in forms:
        if form.makes_groups(count):
            return form.advice()
    return None


@dataclass
class _Form:
    """One way to read a group from a name, and what it finds."""

    what: str
    pattern: re.Pattern[str]
    groups: Counter[str] = field(default_factory=Counter)
    of_label: dict[str, set[str]] = field(default_factory=dict)
    example: tuple[str, str] = ("", "")
    _last: tuple[str, str] = ("", "")

    def add(self, candidate: Candidate) -> None:
        """Count the group of one more image."""
        some = self.of_label.setdefault(candidate.label, set())
        match = self.pattern.search(candidate.name)
        group = match["group"] if match else None
        if not group:
            return
        self.groups[group] += 1
        if len(some) < 2:
            some.add(group)
        if not self.example[0] and group == self._last[0]:
            self.example = self._last[1], candidate.name
        self._last = group, candidate.name

    def makes_groups(self, images: int) -> bool:
        """Return whether the groups look like such, and not like numbers or classes."""
        groups, matched = len(self.groups), self.groups.total()
        several = sum(len(some) > 1 for some in self.of_label.values())
        return (
            groups >= max(LEAST_GROUPS, len(self.of_label))
            and matched >= max(_LEAST_MATCHED * images, 2 * groups)
            and max(self.groups.values()) <= _MOST_OF_ONE * images
            and 2 * several >= len(self.of_label)
            and bool(self.example[0])
        )

    def advice(self) -> str:
        """Return what to do."""
        one, other = self.example
        pattern = self.pattern.pattern.replace("'", "''")
        return (
            f"{self.groups.total()} images share {len(self.groups)} prefixes, as {one} and {other} "
            f"do, and no group is given. If images of one prefix show the same thing (a patient, a "
            f"series, a video), splits by chance leak; keep them together by {self.what}: "
            f"ingest.pattern: '{pattern}'"
        )


def pattern_of_folders(roots: Mapping[str, str]) -> str | None:
    """Return a pattern that reads the label, and the split, from the folders; None if none can."""
    if list(roots.values()) == [""]:
        (root,) = roots
        return f"^{re.escape(root)}(?P<label>[^/]+)/"
    words, tops, depths = [], set(), set()
    for root, split in roots.items():
        parts = root.split("/")[:-1]
        place = next((i for i, part in enumerate(parts) if given_split(part) == split), None)
        if place is None:
            return None
        words.append(re.escape(parts[place]))
        tops.add("".join(f"{re.escape(part)}/" for part in parts[:place]))
        depths.add(len(parts) - place - 1)
    if len(tops) != 1 or len(depths) != 1:
        return None
    return f"^{tops.pop()}(?P<split>{'|'.join(words)})/{'[^/]+/' * depths.pop()}(?P<label>[^/]+)/"


_LOOKED_AT = 1000  # files of a folder that may repeat others
_NEARLY_ALL = 0.9
_DESCRIBE = (".txt", ".json", ".xml", ".csv", ".caption", ".yaml")


@dataclass(frozen=True)
class Layout:
    """Where class folders lie.

    Attributes:
        roots: folders whose folders are classes, with ``/`` at the end, or empty for the source
            itself; and the split of each, or an empty one.
        left_out: folders, with ``/``, that hold nothing of their own.
        notes: what a reader of the log should know.
    """

    roots: Mapping[str, str]
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def read(self, name: str) -> Candidate | str | None:
        """Return what the folders of a file say of it, or why they say nothing.

        None for what is left out: copies, and what is no image and beside the classes.
        """
        if name.startswith(self.left_out):
            return None
        for root, split in self.roots.items():
            if name.startswith(root) and "/" in (rest := name[len(root) :]):
                label = rest.partition("/")[0]
                return Candidate(name=name, file=name, label=label, split=split)
        return "it lies in no class folder" if is_image(name) else None


def find(storage: Storage, address: str) -> Layout:
    """Find the class folders: on top, in folders of splits, or inside folders that only wrap them.

    Raises:
        DataError: a class folder is empty, or folders look like splits and like classes.
    """
    top, notes = _unwrapped(storage, ""), list[str]()
    if top:
        notes.append(f"classes are the folders inside of {top}")
    folders = storage.folders(top)
    splits = {folder: given_split(folder) for folder in folders}
    inside = {folder: storage.folders(f"{top}{folder}/") for folder in folders}
    if len({*splits.values()}) > 1 and all(splits.values()):
        has_train = any(split == "train" for split in splits.values())
        if not has_train or not all(inside.values()):
            raise DataError(
                f"{address} holds the folders {', '.join(folders)}, which are called like splits, "
                f"and {'some hold no class folders' if has_train else 'none is for training'}; "
                f"expected train beside validation or test, with a folder for each class inside. "
                f"Say what folders mean: ingest.pattern."
            )
    if not any(split == "train" and inside[folder] for folder, split in splits.items()):
        for folder in folders:
            _check_not_empty(storage, f"{top}{folder}")
        return Layout({top: ""}, notes=notes)
    others = [folder for folder, split in splits.items() if not split]
    left_out = tuple(f"{top}{folder}/" for folder in others if _repeats(storage, top, folder))
    if left_out:
        notes.append(f"{', '.join(left_out)} repeats what lies beside it, and is left out")
    others = [folder for folder in others if f"{top}{folder}/" not in left_out]
    is_held_out = {"validation", "test"} & set(splits.values())
    if others and (is_held_out or any(_are_alike(inside, splits, folder) for folder in others)):
        raise DataError(
            f"{address} holds the split folders "
            f"{', '.join(folder for folder, split in splits.items() if split)}, and beside them "
            f"{', '.join(others)}; expected splits only (train, validation, test), or classes "
            f"only. Rename or move {', '.join(others)}, or say what folders mean: ingest.pattern."
        )
    if not is_held_out:
        for folder in folders:
            _check_not_empty(storage, f"{top}{folder}")
        return Layout({top: ""}, notes=notes)
    roots = {}
    for folder, split in splits.items():
        if split:
            root = _unwrapped(storage, f"{top}{folder}/")
            if root != f"{top}{folder}/":
                notes.append(f"classes of {folder} are the folders inside of {root}")
            roots[root] = split
            for label in storage.folders(root):
                _check_not_empty(storage, f"{root}{label}")
    return Layout(roots, left_out, notes)


def check_layer(storage: Storage, layout: Layout, address: str) -> None:
    """Check that class folders do not all hold the same folders: then these look like the classes.

    Dates, batches and folds are such folders, or splits by unknown words.

    Raises:
        DataError: they do.
    """
    for root in layout.roots:
        tops = layer = storage.folders(root)
        shared: list[str] = []
        depth = 0
        while below := _shared(storage, root, layer):
            shared, depth = below, depth + 1
            layer = [f"{top}/{name}" for top in layer for name in storage.folders(f"{root}{top}/")]
        if not depth:
            continue
        outer = pattern_of_folders(layout.roots) or "^(?P<label>[^/]+)/"
        group = "(?P<group>[^/]+)/" if len(tops) >= LEAST_GROUPS else "[^/]+/"
        label = "(?P<label>[^/]+)/"
        inner = outer.replace(label, group + "[^/]+/" * (depth - 1) + label)
        words = [top for top in tops if given_split(top)]
        renamed = f" If they are splits, as {words[0]}, call the others so too." if words else ""
        raise DataError(
            f"{address} holds {len(tops)} folders in place of classes ({some(tops)}), and nearly "
            f"each holds the same folders ({some(shared)}); expected one layer of class folders. "
            f"If {some(shared)} are the classes, set ingest.pattern: '{inner}'; if {some(tops)} "
            f"are, ingest.pattern: '{outer}'.{renamed}"
        )


def _shared(storage: Storage, root: str, layer: Sequence[str]) -> list[str]:
    """Return the names of at least two folders that lie in nearly all of a layer's, or nothing.

    A folder with images of its own is a class, whatever folders lie beside them.
    """
    inside = [set(storage.folders(f"{root}{folder}/")) for folder in layer]
    counts = Counter(name for names in inside for name in names)
    shared = {name for name, count in counts.items() if 2 * count > len(layer)}
    alike = sum(len(names & shared) >= max(2, len(names) / 2) for names in inside)
    if len(layer) < 2 or alike < _NEARLY_ALL * len(layer):
        return []
    folders = {f"{root}{folder}" for folder in layer}
    has_images = {folder_of(name) for name in storage.names() if is_image(name)} & folders
    return [] if len(has_images) > (1 - _NEARLY_ALL) * len(layer) else sorted(shared)


def check_images(storage: Storage, layout: Layout, address: str, *, is_told: bool) -> None:
    """Check that folders taken for classes hold images, and nothing that may label each image.

    ``is_told``: whether somebody has said that the folders are classes; each must hold an image
    still.

    Raises:
        DataError: one holds mostly other files, or most of its images have a file of their name
            beside them. Files without an ending may be images; where somebody has said it, so may
            those with an unknown one.
    """
    images, others, described = (Counter[str]() for _ in range(3))
    example: dict[tuple[str, bool], str] = {}
    for _, group in groupby(storage.names(), key=lambda name: name.rpartition(".")[0] or name):
        names = list(group)
        found = layout.read(names[0])
        if not isinstance(found, Candidate):
            continue
        label, rest = found.label, [name for name in names if _is_other(name, known=is_told)]
        images[label] += len(names) - len(rest)
        others[label] += len(rest)
        if rest:
            example.setdefault((label, False), rest[0])
        if len(names) > len(rest) and (twins := [name for name in rest if _is_other(name)]):
            described[label] += len(names) - len(rest)
            example.setdefault((label, True), twins[0])
    for label, count in others.items():
        is_described = 2 * described[label] > images[label] and not is_told
        if is_described:
            what = f"{images[label]} images, {described[label]} of them beside a file of their name"
        elif count > images[label] and not (is_told and images[label]):
            what = f"{images[label]} images and {count} other files"
        else:
            continue
        shown = f", such as {example[label, is_described]}"
        told = "" if is_told or not images[label] else ", or set ingest.kind: folders"
        raise DataError(
            f"{address}: the folder {label} would be a class, and holds {what}{shown}; expected "
            f"images. If such files hold the labels, export them as COCO, Pascal VOC or a table. "
            f"If not, move them away{told}."
        )


def _is_other(name: str, *, known: bool = True) -> bool:
    """Return whether a file is no image by its ending; ``known``: and one that describes images."""
    if known:
        return name.lower().endswith(_DESCRIBE)
    return not is_image(name) and "." in name.rpartition("/")[2]


def _unwrapped(storage: Storage, root: str) -> str:
    """Return the folder that holds several, or files: one that holds a single one only wraps it."""
    while True:
        folders = storage.folders(root)
        if len(folders) != 1 or not storage.folders(inner := f"{root}{folders[0]}/"):
            return root
        on_top = (name for name in storage.names() if name.startswith(root))
        if any(is_image(name) and "/" not in name[len(root) :] for name in on_top):
            return root
        root = inner


def _are_alike(inside: Mapping[str, list[str]], splits: Mapping[str, str], folder: str) -> bool:
    """Return whether a folder has the same folders inside as a training split."""
    trains = [inside[name] for name, split in splits.items() if split == "train"]
    return bool(inside[folder]) and any(set(inside[folder]) & set(of_train) for of_train in trains)


def _repeats(storage: Storage, top: str, folder: str) -> bool:
    """Return whether every file of a folder lies beside it too, under the same name and bytes."""
    under = f"{top}{folder}/"
    names = [name for name in storage.names() if name.startswith(under) and is_image(name)]
    known = set(storage.names())
    twins = {name: top + name[len(under) :] for name in names}
    return (
        bool(names)
        and all(
            twin in known and storage.read(name) == storage.read(twin)
            for name, twin in islice(twins.items(), _LOOKED_AT)
        )
        and known.issuperset(twins.values())
    )


def _check_not_empty(storage: Storage, folder: str) -> None:
    if not storage.has_files(f"{folder}/"):
        raise DataError(f"the class folder {folder} is empty. Add images or take the folder out.")
