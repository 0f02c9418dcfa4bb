"""Annotation files: COCO's JSON and Pascal VOC's XML found, VOC's read, boxes made candidates.

Pascal VOC has a file for each photo, whose boxes become images. ``defusedxml`` rejects document
types by the same hooks of the standard library's parser; what it adds to these ten lines is a
package whose last release is of 2021.
"""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any
from xml.parsers import expat

from tlpipe.errors import DataError, ImageError
from tlpipe.runtime import uniform
from tlpipe.sources import Candidate, Edges, Photo, Reject, coco, given_split, tables
from tlpipe.sources.paths import Files, Match, folder_of, in_one_place, is_image, some
from tlpipe.sources.storage import Storage

_EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
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
            root = parse_voc(storage.read(name))
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


def parse_voc(data: bytes) -> ElementTree.Element:
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


EXPECTED = {
    "table": "a CSV, TSV or Parquet file on top, with columns of paths and labels",
    "coco": "a JSON file with images, annotations and categories, in the folder or in annotations/",
    "voc": "XML files with <annotation>, below the folder",
}
# So many files of a folder are read at most to find out what they are.
_LOOKED_AT = 50
_DAMAGED = 10
_LINES = 1000
_READ = (*tables.SUFFIXES, ".json", ".jsonl", ".xml")
# What programs keep labels in, also packed, as in labels.csv.gz; or what is packed and called so.
_UNREAD = (
    r"\.(xlsx?|xlsm|xlsb|ods|numbers|mat|npy|npz|pkl|pickle|feather|arrow|orc|avro|h5|hdf5|db"
    r"|sqlite3?|mdb|accdb|dbf|sav|dta|rds|rdata|tfrecords?|rec|idx|ndjson)"
)
_PACKED = r"\.(gz|zip|bz2|xz|zst|7z|rar|tar|tgz)"
_MAY_HOLD_LABELS = re.compile(
    rf"{_UNREAD}({_PACKED})?$|\.(csv|tsv|txt|parquet|jsonl?|xml){_PACKED}$"
    rf"|(label|annotation)[^/]*{_PACKED}$",
    re.IGNORECASE,
)
_TEXT = re.compile(
    r"(^|/)[^./]+$|\.(txt|text|lst|list|dat|data|names|tab|ya?ml|ini)$", re.IGNORECASE
)
_WORD = re.compile(r"""[^\s,;:|='"{}()\[\]]+""")
_CHECKSUM = re.compile("[0-9a-f]{32}", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """The annotation files of a source.

    Attributes:
        coco: what COCO files hold, by name.
        voc: the names of Pascal VOC's files.
        others: in half a sentence by name, why a file that may hold annotations is not read.
    """

    coco: dict[str, Any] = field(default_factory=dict)
    voc: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)


def find(storage: Storage, label_files: str | None, notes: list[str]) -> Found:
    """Find the annotation files: JSON on top or one folder below, XML anywhere.

    ``label_files``: a pattern of names, which are then the only ones.

    Raises:
        DataError: there are several COCO files, and their names do not tell which to read.
    """
    names = [name for name in storage.names() if is_wanted(name, label_files)]
    others: dict[str, str] = {}
    contents = dict[str, Any]()
    # Instances first: a file of another kind beside them may be as large, and is not even parsed.
    files = _json(storage, names, label_files is not None, notes)
    for name in sorted(files, key=lambda name: not coco.is_of_instances(name)):
        if coco.is_another_kind(name, contents):
            contents[name] = None
            continue
        content, reason = _content(storage, name)
        if reason:
            others[name] = reason
        else:
            contents[name] = content
    xml = tuple(_voc(storage, names, others))
    for name in names:
        if "/" not in name and name.lower().endswith(".jsonl"):
            others[name] = "JSON lines are seen and not known; write them as a table"
        elif name in ("data.yaml", "dataset.yaml"):
            others[name] = "it looks like YOLO's, which is seen and not known; export it as COCO"
    read = coco.chosen(sorted(contents), notes)
    return Found({name: contents[name] for name in read}, xml, others)


def is_wanted(name: str, label_files: str | None) -> bool:
    """Return whether a file may hold labels, by the pattern that ``ingest.label_files`` gives."""
    return label_files is None or fnmatchcase(name, label_files)


def may_stand_for(name: str) -> bool:
    """Return whether a file lies where the labels of a whole source do: it must not be ignored."""
    folder = folder_of(name)
    return not folder or folder.lower() in ("annotations", "labels") or given_split(folder) != ""


def unread(
    storage: Storage, roots: Collection[str], labels: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Yield the files that may hold the labels of images in class folders, and half a sentence why.

    ``roots``: the folders that class folders lie in, with ``/``; files in the folders around them,
    on top, in ``annotations/`` and in folders of splits count. ``labels``: the names of class
    folders: a text that names them alone is none of labels.
    """
    names = [
        name
        for name in storage.names()
        if not is_image(name)
        and (may_stand_for(name) or any(root.startswith(f"{folder_of(name)}/") for root in roots))
    ]
    texts = []
    for name in names:
        if _MAY_HOLD_LABELS.search(name):
            yield name, "write what it holds as a table, a CSV, TSV or Parquet file"
        elif name.lower().endswith(_READ) and not may_stand_for(name):
            yield name, f"it does not lie on top; ingest.label_files: {name} reads it"
        elif _TEXT.search(name):
            texts.append(name)
    lines = {name: _words_by_line(storage, name) for name in texts[:_LOOKED_AT]}
    words = {word for found in lines.values() for line in found.values() for word in line}
    images = (PurePosixPath(name).stem for name in storage.names() if is_image(name))
    stems = {stem for stem in images if stem in words}
    for name, found in lines.items():
        if line := _line_naming_images(found, stems - {*labels}, len(labels)):
            yield name, f"it names images ({line[:60]}); write it as a table with path and label"


def _words_by_line(storage: Storage, name: str) -> dict[str, set[str]]:
    """Return the words of each line of a text, of paths the last part; without checksums."""
    try:
        text, _ = tables.decoded(storage.read(name)[: 2**20])
    except (ImageError, tables.NotATableError):
        return {}
    lines = [line.strip() for line in text.splitlines()[:_LINES]]
    return {
        line: {word.rpartition("/")[2] for word in _WORD.findall(line)}
        for line in lines
        if line and not _CHECKSUM.search(line)
    }


def _line_naming_images(
    lines: Mapping[str, Collection[str]], stems: Collection[str], classes: int
) -> str | None:
    """Return the first line that names an image, if most lines do."""
    naming = [
        line for line, words in lines.items() if any(is_image(w) or w in stems for w in words)
    ]
    named = {word for line in naming for word in lines[line]}
    files, others = sum(map(is_image, named)), sum(word in stems for word in named)
    # Of the numbers in a list of classes, some may be images' names.
    has_names = files > 1 or others > classes
    return naming[0] if has_names and 2 * len(naming) >= len(lines) else None


def _json(storage: Storage, names: Sequence[str], is_named: bool, notes: list[str]) -> list[str]:
    """Return the JSON files that may be COCO's; those beside an image of their name are not."""
    found = [name for name in names if name.lower().endswith(".json")]
    if is_named or not found:
        return found
    stems = {_stem(name) for name in storage.names() if is_image(name)}
    beside = [name for name in found if _stem(name) in stems]
    if beside:
        notes.append(
            f"{len(beside)} JSON files beside images of their names are not read: {beside[0]}"
        )
    by_folder = defaultdict(list)
    for name in found:
        if name.count("/") <= 1 and _stem(name) not in stems:
            # Many folders with one file each are as many as one folder with all of them.
            by_folder[folder_of(name) if may_stand_for(name) else "class folders"].append(name)
    kept = []
    for folder, inside in by_folder.items():
        if folder and len(inside) > _LOOKED_AT:
            notes.append(
                f"{len(inside)} JSON files in {folder} are too many to be COCO's and are not "
                f"read: {some(inside)}. ingest.label_files names those that are"
            )
        else:
            kept += inside
    return kept


def _content(storage: Storage, name: str) -> tuple[Any, str]:
    """Return what a JSON file holds, and in half a sentence why it is not COCO's, or nothing."""
    try:
        content = json.loads(storage.read(name))
    except ImageError as error:
        return None, f"it cannot be read: {error.detail}"
    except (ValueError, RecursionError) as error:
        return None, f"it is no JSON: {error}"
    return content, coco.reason_against(content)


def _voc(storage: Storage, names: Sequence[str], others: dict[str, str]) -> list[str]:
    """Return the XML files of the folders in which the first sound one is Pascal VOC's."""
    by_folder = defaultdict(list)
    for name in names:
        if name.lower().endswith(".xml"):
            by_folder[folder_of(name)].append(name)
    found = []
    for inside in by_folder.values():
        reason = ""
        for name in inside[:_DAMAGED]:
            try:
                tag = parse_voc(storage.read(name)).tag
            except (ValueError, ImageError) as error:
                reason = reason or f"it cannot be read: {error}"
                continue
            reason = _reason_against(tag)
            break
        if reason:
            others[inside[0]] = reason
        else:
            found += inside
    return found


def _reason_against(tag: str) -> str:
    if tag == "annotations":
        return "it looks like CVAT's XML, which is seen and not known; export it as COCO"
    return "" if tag == "annotation" else f"it holds <{tag}>; Pascal VOC has <annotation>"


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def candidates(
    photos: Iterable[Photo], background: str | None, rejects: list[Reject]
) -> list[Candidate]:
    """Return the boxes of photos as candidates, and a photo whose label is of the whole of it.

    ``background``: the label of a square in each photo, which touches no stated box, be it
    one that is rejected. Where the region of an annotation is not known, or is the whole photo,
    there is none. It has the side of one of the photo's own boxes, since the class could be told by
    its sharpness otherwise; in a photo without boxes, of a box of the photo that follows it by the
    hash of names, which others that come or go seldom change. That side is in pixels of the picture
    that the other box was drawn in: whether its file is larger or smaller is not known before it is
    read.
    """
    found: list[Candidate] = []
    valid = [(photo, list(_valid_boxes(photo, rejects))) for photo in photos]
    ring = sorted((uniform(0, photo.file), boxes) for photo, boxes in valid if boxes)
    for photo, boxes in valid:
        found += _of_photo(photo, rejects)
        found += (
            Candidate(name, photo.file, label, photo.split, box=box, drawn_in=photo.size)
            for name, label, box in boxes
        )
        if background is not None and _has_room(photo, background, rejects):
            found.append(
                Candidate(
                    name=f"{photo.file}#{background}",
                    file=photo.file,
                    label=background,
                    split=photo.split,
                    avoid=tuple(box for _, _, box in boxes),
                    occupied=_rejected_boxes(photo, boxes),
                    drawn_in=photo.size,
                    side_px=None if boxes else _side_of_next(photo, ring),
                )
            )
    return found


Ring = Sequence[tuple[float, list[tuple[str, str, Edges]]]]


def _side_of_next(photo: Photo, ring: Ring) -> float | None:
    """Return the longer side of a box of the photo that follows; hashes of names pick both."""
    if not ring:
        return None
    place = bisect_left(ring, uniform(0, photo.file), key=itemgetter(0))
    boxes = ring[place % len(ring)][1]
    number = int(uniform(0, f"{photo.file} side of next") * len(boxes))
    _, _, (left, upper, right, lower) = boxes[number]
    return max(right - left, lower - upper)


def _has_room(photo: Photo, background: str, rejects: list[Reject]) -> bool:
    """Return whether each annotation has a region, and none the whole photo; or add a reject."""
    boxes = [*(box for _, _, box in photo.labels), *photo.occupied]
    if all(box is not None and all(map(math.isfinite, box)) for box in boxes):
        return True
    text = "an annotation is of the whole photo, or its region cannot be told"
    rejects.append(Reject(f"{photo.file}#{background}", "no_background", text))
    return False


def _rejected_boxes(photo: Photo, valid: list[tuple[str, str, Edges]]) -> tuple[Edges, ...]:
    """Return the boxes of rejected annotations, with edges in order."""
    taken = {box for _, _, box in valid}
    boxes = [*(box for _, _, box in photo.labels), *photo.occupied]
    return tuple(
        (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
        for box in boxes
        if box is not None and box not in taken
    )


def _of_photo(photo: Photo, rejects: list[Reject]) -> Iterator[Candidate]:
    labels = sorted({label for _, label, box in photo.labels if box is None})
    if len(labels) > 1:
        text = f"one image under the labels {', '.join(labels)}"
        rejects.append(Reject(photo.file, "conflict", text))
    elif labels:
        yield Candidate(name=photo.file, file=photo.file, label=labels[0], split=photo.split)


def _valid_boxes(photo: Photo, rejects: list[Reject]) -> Iterator[tuple[str, str, Edges]]:
    """Yield the boxes that have an area, each name once."""
    seen: dict[str, tuple[str, Edges]] = {}
    for name, label, box in photo.labels:
        if box is None:
            continue
        left, upper, right, lower = box
        if not all(map(math.isfinite, box)) or right - left < 1 or lower - upper < 1:
            text = f"{label}: {', '.join(f'{edge:g}' for edge in box)} has no area"
            if all(-1 <= edge <= 1 for edge in box):
                text += "; if these are shares of the photo's sides, export them in pixels"
            rejects.append(Reject(name, "degenerate_box", text))
        elif name not in seen:
            seen[name] = (label, box)
            yield name, label, box
        else:
            is_equal = seen[name] == (label, box)
            text = f"its id stands there twice; the other one is {seen[name][0]}"
            rejects.append(Reject(name, "repeated" if is_equal else "bad_annotation", text))
