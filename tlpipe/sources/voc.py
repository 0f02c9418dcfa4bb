"""Read labels from Pascal VOC's XML: a file a photo, whose boxes become images."""

import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from xml.parsers import expat

from tlpipe.errors import DataError, ImageError
from tlpipe.sources.candidates import Edges, Reject, given_split
from tlpipe.sources.paths import Files, Match, folder_of, in_one_place, some
from tlpipe.sources.photos import Photo
from tlpipe.sources.storage import Storage

_EDGES = ("xmin", "ymin", "xmax", "ymax")


def read(
    storage: Storage, names: Sequence[str], files: Files, rejects: list[Reject]
) -> list[Photo]:
    """Return the photos of XML files, in the splits of ``ImageSets/Main`` where given.

    Raises:
        DataError: a photo may be one of several files, or is in two splits, or those that the
            XML files of one folder name lie in several.
    """
    splits = _splits(storage)
    photos: dict[str, Photo] = {}
    matches: dict[str, list[tuple[str, str, Match]]] = defaultdict(list)
    for name in names:
        try:
            root = parse(storage.read(name))
        except (ValueError, ImageError) as error:
            rejects.append(Reject(name, "bad_annotation", str(error)))
            continue
        stated = (root.findtext("filename") or "").strip() or PurePosixPath(name).stem
        match = _match(name, stated, files, rejects)
        if match is None:
            continue
        file = match.files[0]
        if file in photos:
            rejects.append(Reject(name, "repeated", f"another annotation describes {file} too"))
            photos[file].occupied += map(_box, root.iter("object"))
            continue
        matches[folder_of(name)].append((name, stated, match))
        key = (folder_of(folder_of(name)), PurePosixPath(name).stem)
        photo = photos[file] = Photo(file, splits.get(key, ""), _size(root))
        for number, item in enumerate(root.iter("object"), start=1):
            part = f"{file}#{number}"
            if label := (item.findtext("name") or "").strip():
                photo.labels.append((part, label, _box(item)))
            else:
                rejects.append(Reject(part, "no_label", f"{name} names none"))
                photo.occupied.append(_box(item))
    for folder, named in matches.items():
        settled = in_one_place([match for _, _, match in named], f"{folder}/*.xml")
        for (name, stated, before), match in zip(named, settled, strict=True):
            if not match.files:
                del photos[before.files[0]]
                rejects.append(match.missing(stated, name))
    return list(photos.values())


def parse(data: bytes) -> ElementTree.Element:
    """Parse XML without a document type: entities could grow without bound or name other files.

    Raises:
        ValueError: it is no XML, or declares a document type.
    """

    def forbid(*_: object) -> None:
        raise ValueError("the XML has a document type, which may hold entities; expected none")

    builder = ElementTree.TreeBuilder()
    try:
        # By the parser itself, since bytes mean other characters in other encodings.
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = forbid
        parser.EntityDeclHandler = forbid
        parser.StartElementHandler = builder.start
        parser.EndElementHandler = builder.end
        parser.CharacterDataHandler = builder.data
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"it is no XML: {error}") from None
    return builder.close()


def _match(name: str, stated: str, files: Files, rejects: list[Reject]) -> Match | None:
    """Return the image that an XML file describes: the one it states, or that of its own name."""
    stem = PurePosixPath(name).stem
    by_name, by_stem = files.find(stated, name), files.find(stem, name)
    match = by_name if by_name.files else by_stem
    if match.files == by_stem.files:
        match = by_stem  # the names of all XML files tell their place alike
    if len(match.files) > 1:
        raise DataError(
            f"{name} names {stated!r}, which may be {some(match.files)}; expected "
            f"one file. State its folder in <filename>, or move the others elsewhere."
        )
    if by_stem.files and match.files[0] not in by_stem.files:
        text = f"it states {match.files[0]}, and {some(by_stem.files)} is called as it is itself"
        rejects.append(Reject(name, "conflict", text))
        return None
    if not match.files:
        rejects.append(match.missing(stated, name))
        return None
    return match


def _box(item: ElementTree.Element) -> Edges:
    """Return the box of an object; the format counts pixels from 1 and includes the last one."""
    left, upper, right, lower = (_number(item.findtext(f"bndbox/{edge}")) for edge in _EDGES)
    return left - 1, upper - 1, right, lower


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Return the stated width and height, if both are; many programs write 0."""
    width, height = (_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    # A comparison with what is no number is false.
    is_size = 0 < width < 2**31 and 0 < height < 2**31
    return (round(width), round(height)) if is_size else None


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _splits(storage: Storage) -> dict[tuple[str, str], str]:
    """Return the split of each photo by the folder of its set and its name without extension.

    Raises:
        DataError: one is in two.
    """
    splits: dict[tuple[str, str], str] = {}
    for name in storage.names():
        path = PurePosixPath(name)
        if not path.match("ImageSets/Main/*.txt") or not (split := given_split(path.stem)):
            continue
        root = folder_of(folder_of(folder_of(name)))
        for line in storage.read(name).decode(errors="replace").splitlines():
            if not line.strip():
                continue
            photo = line.split()[0]
            if splits.setdefault((root, photo), split) != split:
                raise DataError(
                    f"ImageSets/Main has {photo} in {splits[root, photo]} and in {split}; expected "
                    f"one split. Take it out of {name}, or of the other."
                )
    return splits
