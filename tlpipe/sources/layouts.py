"""Read labels from folders: which folders are classes, and which are splits or only wrap others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from tlpipe.errors import DataError
from tlpipe.sources.candidates import Candidate, given_split
from tlpipe.sources.paths import is_image
from tlpipe.sources.storage import Storage

_LOOKED_AT = 1000  # files of a folder that may repeat others


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
