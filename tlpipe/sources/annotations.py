"""Find annotation files, COCO's JSON and Pascal VOC's XML, and say why others are none."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from tlpipe.errors import ImageError
from tlpipe.sources import coco, tables, voc
from tlpipe.sources.candidates import given_split
from tlpipe.sources.paths import folder_of, is_image, some
from tlpipe.sources.storage import Storage

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
                tag = voc.parse(storage.read(name)).tag
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
