"""Read labels from Pascal VOC's XML: a file a photo, whose boxes become images."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import PurePosixPath
from xml.parsers import expat

from tlpipe.errors import DataError, ImageError
from tlpipe.sources.candidates import Edges, Reject, given_split
from tlpipe.sources.paths import Files, folder_of, some
from tlpipe.sources.photos import Photo
from tlpipe.sources.storage import Storage

_EDGES = ("xmin", "ymin", "xmax", "ymax")


def read(
    storage: Storage, names: Sequence[str], files: Files, rejects: list[Reject]
) -> list[Photo]:
    """Return the photos of XML files, in the splits of ``ImageSets/Main`` where given.

    Raises:
        DataError: a photo may be one of several files, or is in two splits.
    """
    splits = _splits(storage)
    photos: dict[str, Photo] = {}
    for name in names:
        try:
            root = parse(storage.read(name))
        except (ValueError, ImageError) as error:
            rejects.append(Reject(name, "bad_annotation", str(error)))
            continue
        file = _file(name, (root.findtext("filename") or "").strip(), files, rejects)
        if file is None:
            continue
        if file in photos:
            rejects.append(Reject(name, "repeated", f"another annotation describes {file} too"))
            continue
        key = (folder_of(folder_of(name)), PurePosixPath(name).stem)
        photo = photos[file] = Photo(file, splits.get(key, ""), _size(root))
        for number, item in enumerate(root.iter("object"), start=1):
            part = f"{file}#{number}"
            if label := (item.findtext("name") or "").strip():
                photo.labels.append((part, label, _box(item)))
            else:
                rejects.append(Reject(part, "no_label", f"{name} names none"))
    return list(photos.values())


def parse(data: bytes) -> ElementTree.Element:
    """Parse XML without a document type: entities could grow without bound or name other files.

    Raises:
        ValueError: it is no XML, or declares a document type.
    """

    def refuse(*_: object) -> None:
        raise ValueError("the XML has a document type, which may hold entities; expected none")

    builder = ElementTree.TreeBuilder()
    try:
        # By the parser itself, since bytes mean other characters in other encodings.
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = refuse
        parser.EntityDeclHandler = refuse
        parser.StartElementHandler = builder.start
        parser.EndElementHandler = builder.end
        parser.CharacterDataHandler = builder.data
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"it is no XML: {error}") from None
    return builder.close()


def _file(name: str, stated: str, files: Files, rejects: list[Reject]) -> str | None:
    """Return the image that an XML file describes: the one it states, or that of its own name."""
    stem = PurePosixPath(name).stem
    by_name = files.find(stated, name) if stated else []
    by_stem = files.find(stem, name)
    if len(by_name or by_stem) > 1:
        raise DataError(
            f"{name} names {stated or stem!r}, which may be {some(by_name or by_stem)}; expected "
            f"one file. State its folder in <filename>, or move the others elsewhere."
        )
    if by_name and by_stem and by_name != by_stem:
        text = f"it states {by_name[0]}, and {some(by_stem)} is called as it is itself"
        rejects.append(Reject(name, "conflict", text))
        return None
    if not (found := by_name or by_stem):
        rejects.append(Reject(stated or stem, "missing", f"{name} names it"))
        return None
    return found[0]


def _box(item: ElementTree.Element) -> Edges:
    """Return the box of an object; the format counts pixels from 1 and includes the last one."""
    left, upper, right, lower = (_number(item.findtext(f"bndbox/{edge}")) for edge in _EDGES)
    return left - 1, upper - 1, right, lower


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Return the stated width and height, if both are; many programs write 0."""
    width, height = (_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    return (round(width), round(height)) if 0 < min(width, height) < math.inf else None


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
