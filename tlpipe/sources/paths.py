"""Find the files that tables and annotations name, and the splits that names say."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from tlpipe.sources.candidates import IMAGES, given_split
from tlpipe.sources.storage import Storage


class Files:
    """Finds the images that tables and annotations name."""

    def __init__(self, storage: Storage) -> None:
        """List a storage's files."""
        self.names = set(storage.names())
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_base: dict[str, set[str]] = defaultdict(set)
        self._folders: set[str] = set()  # those with an image at any depth
        for name in self.names:
            if is_image(name):
                self._by_stem[_stem(name)].append(name)
                base = PurePosixPath(name).name
                self._by_base[base].add(name)
                self._by_base[_stem(base)].add(name)
                if (folder := folder_of(name)) not in self._folders:
                    self._folders.update(map(str, [folder, *PurePosixPath(folder).parents]))
        self._splits = {split_of_folders(f"{folder}/") for folder in self._folders}

    def find(self, stated: str, by: str) -> list[str]:
        r"""Return the files that a path may mean: one, or none, or those it does not tell apart.

        It is looked for as it stands, with ``/`` for ``\``, relative to the folder of the file
        ``by`` that names it and to the source, with a known extension; what is absolute by its
        longest end that is there. Else it is what ends so in the nearest folder above ``by`` that
        holds images. Of several, those in folders of another split than that of ``by`` do not
        count, and neither does a single one where the own split has folders.
        """
        path = stated if stated in self.names else stated.replace("\\", "/")
        path = PurePosixPath(path).as_posix()
        folder = folder_of(by)
        for place in (posixpath.normpath(f"{folder}/{path}") if folder else path, path):
            if found := self._at(place):
                return found
        parts = path.strip("/").split("/")
        if path.startswith("/") or path[1:3] == ":/":
            ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
            return next(filter(None, map(self._at, ends)), [])
        root, split = self._root(folder), split_of(by)
        others = {"train", "validation", "test"} - {split} if split in self._splits else set()
        return sorted(
            name
            for name in self._by_base.get(parts[-1], ())
            if name.startswith(root)
            and (f"/{name}".endswith(f"/{path}") or f"/{_stem(name)}".endswith(f"/{path}"))
            and not (split and split_of_folders(name) in others)
        )

    def images_without(self, names: Collection[str]) -> list[str]:
        """Return the images that are not among ``names``, in order."""
        return sorted(name for name in self.names - set(names) if is_image(name))

    def _root(self, folder: str) -> str:
        """Return the nearest folder above that holds images, with ``/``; "" for the source."""
        while folder and folder not in self._folders:
            folder = folder_of(folder)
        return f"{folder}/" if folder else ""

    def _at(self, place: str) -> list[str]:
        return [place] if place in self.names else sorted(self._by_stem.get(place, []))


def is_image(name: str) -> bool:
    """Return whether a file's name ends as an image's does."""
    return name.lower().endswith(IMAGES)


def folder_of(name: str) -> str:
    """Return the folder that a file or folder lies in, without ``/``, or nothing."""
    return name.rpartition("/")[0]


def split_of(name: str) -> str:
    """Return the one split that the words of a file's name say, or else its folders, or nothing.

    Examples:
        >>> split_of("annotations/instances_val2017.json"), split_of("train/_classes.csv")
        ('validation', 'train')
        >>> split_of("train_test_split.csv")
        ''
    """
    words = re.findall("[a-z]+", PurePosixPath(name).stem.lower())
    splits = {*map(given_split, words)} - {""}
    if splits:
        return splits.pop() if len(splits) == 1 else ""
    return split_of_folders(name)


def split_of_folders(name: str) -> str:
    """Return the split that the first folder says which is called like one, or nothing."""
    return next(filter(None, map(given_split, name.split("/")[:-1])), "")


def some(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stem(name: str) -> str:
    return name[: -len(PurePosixPath(name).suffix)] if PurePosixPath(name).suffix else name
