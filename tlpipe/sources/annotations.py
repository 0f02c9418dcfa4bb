"""Find annotation files, COCO's JSON and Pascal VOC's XML, and say why others are none."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from tlpipe.errors import ImageError
from tlpipe.sources import coco, voc
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
