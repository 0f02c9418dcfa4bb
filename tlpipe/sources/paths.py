"""Find the files that tables and annotations name, and the splits that names say."""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from tlpipe.errors import DataError
from tlpipe.sources import IMAGES, Reject, given_split
from tlpipe.sources.storage import Storage


class Match(NamedTuple):
    """What a stated path may mean.

    ``files``: none, one, or those that the path does not tell apart. ``place``: what stands before
    the path in the first one's name, or the head of an absolute path that was cut off. ``kind``:
    how it was found. ``elsewhere``: a file of that name that does not count, or nothing. ``near``:
    of a path that means none, the file that is called nearly so and what is different, or nothing.
    """

    files: list[str] = []  # noqa: RUF012
    place: str = ""
    kind: int = 0
    elsewhere: str = ""
    near: str = ""

    def missing(self, stated: str, by: str) -> Reject:
        """Return the reject of a path that means no file; ``by``: what names it."""
        other = f"; {self.elsewhere} lies elsewhere than its other images" if self.elsewhere else ""
        near = f"; {self.near}" if self.near else ""
        if _ADDRESS.match(stated):
            near = "; that is an address, nothing is fetched from it: download the image"
        return Reject(stated, "missing", f"{by} names it{other}{near}")


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_LOOKED_AT = 50  # files of one name that a missing one may be
_BESIDE, _FROM_SOURCE, _BELOW, _ABSOLUTE = range(4)


class Files:
    """Finds the images that tables and annotations name."""

    def __init__(self, storage: Storage) -> None:
        """List a storage's files."""
        self.names = set(storage.names())
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_end: dict[int, dict[str, list[str]]] = {}
        self._by_loose: dict[str, list[str]] = defaultdict(list)
        self._folders: set[str] = set()  # those with an image at any depth
        for name in self.names:
            if is_image(name):
                self._by_stem[_stem(name)].append(name)
                if (folder := folder_of(name)) not in self._folders:
                    self._folders.update(map(str, [folder, *PurePosixPath(folder).parents]))
        self._splits = {split_of_folders(f"{folder}/") for folder in self._folders}

    def find(self, stated: str, by: str) -> Match:
        r"""Return the files that a path may mean.

        It is looked for as it stands, with ``/`` for ``\``, relative to the folder of the file
        ``by`` that names it and to the source, with a known extension; what is absolute by its
        longest end that is there. Else it is what ends so in the nearest folder above ``by`` that
        holds images. Of several, those in folders of another split than that of ``by`` do not
        count, and neither does a single one where the own split has folders. One path proves
        little: ``in_one_place`` compares those of a whole file.
        """
        path = stated if stated in self.names else stated.replace("\\", "/")
        path = PurePosixPath(path).as_posix()
        folder = folder_of(by)
        if folder and (found := self._at(posixpath.normpath(f"{folder}/{path}"))):
            return Match(found, f"{folder}/", _BESIDE)
        if found := self._at(path):
            return Match(found, "", _FROM_SOURCE)
        parts = path.strip("/").split("/")
        if path.startswith("/") or path[1:3] == ":/":
            for start in range(1, len(parts)):
                if found := self._at("/".join(parts[start:])):
                    return Match(found, "/".join(parts[:start]) + "/", _ABSOLUTE)
            return Match(near=self._near(path))
        root, split = self._root(folder), split_of(by)
        others = {"train", "validation", "test"} - {split} if split in self._splits else set()
        found = [
            name
            for name in self._ends(len(parts)).get(path, ())
            if name.startswith(root) and not (split and split_of_folders(name) in others)
        ]
        above = found[0].rsplit("/", len(parts))[0] if found else ""
        return Match(found, f"{above}/", _BELOW) if found else Match(near=self._near(path))

    def images_without(self, names: Collection[str]) -> list[str]:
        """Return the images that are not among ``names``, in order."""
        return sorted(name for name in self.names - set(names) if is_image(name))

    def _root(self, folder: str) -> str:
        """Return the nearest folder above that holds images, with ``/``; "" for the source."""
        while folder and folder not in self._folders:
            folder = folder_of(folder)
        return f"{folder}/" if folder else ""

    def _near(self, path: str) -> str:
        """Say which file is called like a path but for what eyes hardly see, or nothing."""
        if not self._by_loose:
            for name in sorted(filter(is_image, self.names)):
                for key in {name, _stem(name)}:
                    self._by_loose[_loose(key.rpartition("/")[2])].append(name)
        is_absolute = path.startswith("/") or path[1:3] == ":/"
        for name in self._by_loose.get(_loose(path.rpartition("/")[2]), [])[:_LOOKED_AT]:
            for full in (name, _stem(name)):
                parts = 1 + path.strip("/").count("/")
                if is_absolute:
                    parts = min(parts, 1 + full.count("/"))
                stated, found = ("/".join(one.split("/")[-parts:]) for one in (path, full))
                if (what := _difference(stated, found)) and _loose(stated) == _loose(found):
                    return f"{name} differs only in {what}"
        return ""

    def _ends(self, parts: int) -> dict[str, list[str]]:
        """Return the images deeper than so many parts by these last ones, also without extension.

        Made once for each number: a search among all files of one base name would take the square
        of their number.
        """
        if parts not in self._by_end:
            by_end = self._by_end[parts] = defaultdict(list)
            for name in sorted(filter(is_image, self.names)):
                if name.count("/") >= parts:
                    end = "/".join(name.split("/")[-parts:])
                    for key in {end, _stem(end)}:
                        by_end[key].append(name)
        return self._by_end[parts]

    def _at(self, place: str) -> list[str]:
        return [place] if place in self.names else sorted(self._by_stem.get(place, []))


def in_one_place(
    matches: Sequence[Match], by: str, labels: Sequence[str] | None = None
) -> list[Match]:
    """Return the matches of all paths that one file states, without those that lie elsewhere.

    Another file of the same name must not stand in for a missing one. So all relative paths count
    from one place: the folder of ``by`` if any is found from there, else the source, else a single
    folder below. Of absolute paths, the heads that are cut off must not lie in each other.

    Several folders below count only where they are those of classes: ``labels`` of the matches are
    given, all of a folder are of one label, those of a label lie in folders of one name, no other
    label's do, and all these folders lie in one, or in folders called like splits. What is not
    there then is in none of them.

    Raises:
        DataError: the paths count from several folders.
    """
    relative = [match for match in matches if match.files and match.kind != _ABSOLUTE]
    kind = min((match.kind for match in relative), default=_BESIDE)
    heads = {match.place for match in matches if match.kind == _ABSOLUTE}
    places = {match.place: match for match in reversed(relative) if match.kind == kind}
    if len(places) > 1 and not _are_of_classes(matches, labels):
        shown = [f"{place} ({match.files[0]})" for place, match in sorted(places.items())]
        raise DataError(
            f"{by} names images that lie in several folders: {some(shown)}; expected one folder "
            f"that all its paths count from, since a file of another folder may have the name of "
            f"a missing one. Write the folders into its paths."
        )

    def is_elsewhere(match: Match) -> bool:
        if match.kind == _ABSOLUTE:
            ends = (place for place, letter in enumerate(match.place[:-1], 1) if letter == "/")
            return any(match.place[:end] in heads for end in ends)
        return match.kind != kind

    return [
        Match(elsewhere=match.files[0]) if match.files and is_elsewhere(match) else match
        for match in matches
    ]


def _are_of_classes(matches: Sequence[Match], labels: Sequence[str] | None) -> bool:
    """Return whether the folders that matches lie in are one class's each."""
    if labels is None:
        return False
    places = [
        (PurePosixPath(match.place), label)
        for match, label in zip(matches, labels, strict=True)
        if label and match.files and match.kind == _BELOW
    ]
    parents = {place.parent for place, _ in places}
    if len(parents) > 1 and not all(given_split(parent.name) for parent in parents):
        return False
    pairs = {(place.name, label) for place, label in places}
    folders, classes = ({pair[side] for pair in pairs} for side in (0, 1))
    return len(pairs) == len(folders) == len(classes)


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


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _stem(name: str) -> str:
    return name[: -len(PurePosixPath(name).suffix)] if PurePosixPath(name).suffix else name


_QUOTES = " '\"`\u2018\u2019\u201c\u201d"
# What eyes hardly see, and what takes it away.
_UNSEEN: dict[str, Callable[[str], str]] = {
    "quotes or spaces": lambda path: "/".join(
        part.strip(f"{_QUOTES} ") for part in path.split("/")
    ),
    "Unicode's normal form (NFC and NFD)": lambda path: unicodedata.normalize("NFC", path),
    "upper and lower case": str.casefold,
}


def _loose(path: str, without: str = "") -> str:
    """Return a path without what eyes hardly see, but for one kind of it."""
    for what, take_away in _UNSEEN.items():
        path = path if what == without else take_away(path)
    return path


def _difference(path: str, other: str) -> str:
    """Name what makes paths differ that are one to the eye: each that does so alone."""
    return " and ".join(what for what in _UNSEEN if _loose(path, what) != _loose(other, what))
