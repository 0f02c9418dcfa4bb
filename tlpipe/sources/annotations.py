"""Read labels from annotations: COCO's JSON and Pascal VOC's XML, whose boxes become images."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tlpipe.errors import DataError, ImageError
from tlpipe.sources.candidates import IMAGES, Candidate, Reject, given_split
from tlpipe.sources.storage import Storage

EXPECTED = {
    "table": "a CSV, TSV or Parquet file on top, with columns of paths and labels",
    "coco": "a JSON file with images, annotations and categories, in the folder or in annotations/",
    "voc": "XML files with <annotation>, below the folder",
}


@dataclass(frozen=True)
class Found:
    """The annotation files of a source, by kind: what COCO's hold, the names of the others.

    ``on_top``: the names of all files on top that may be annotations, of these kinds or of others.
    """

    coco: dict[str, Any] = field(default_factory=dict)
    voc: tuple[str, ...] = ()
    on_top: tuple[str, ...] = ()


def find(storage: Storage) -> Found:
    """Find the annotation files: JSON on top or one folder below, XML anywhere."""
    coco, voc, on_top = [], [], []
    for name in storage.names():
        depth, suffix = name.count("/"), name[-8:].lower()
        if depth == 0 and suffix.endswith((".json", ".jsonl", ".xml")):
            on_top.append(name)
        if suffix.endswith(".json") and depth <= 1:
            coco.append(name)
        elif suffix.endswith(".xml"):
            voc.append(name)
    return Found(
        coco={name: content for name in coco if (content := _coco(storage, name))},
        voc=tuple(voc) if voc and _is_voc(storage, voc[0]) else (),
        on_top=tuple(on_top),
    )


def read_coco(
    storage: Storage, files: Mapping[str, Any], background: str | None, rejects: list[Reject]
) -> list[Candidate]:
    """Read COCO JSON: each box is an image of its own; an annotation without a box, the photo.

    Several files are the splits that their names say.

    Raises:
        DataError: the JSON lacks what the format asks for, or the files' names are no splits.
    """
    find_image = _image_finder(storage)
    candidates = []
    for file, content in files.items():
        split = _split_in(file, "COCO files") if len(files) > 1 else ""
        try:
            labels = {category["id"]: str(category["name"]) for category in content["categories"]}
            annotations = defaultdict(list)
            for annotation in content["annotations"]:
                annotations[annotation["image_id"]].append(annotation)
            for image in content["images"]:
                stated = str(image["file_name"])
                name = find_image(stated, PurePosixPath(file).stem)
                if name is None:
                    rejects.append(Reject(stated, "missing", f"{file} names it"))
                    continue
                boxes: list[tuple[str, str, tuple[float, ...] | None]] = []
                for annotation in annotations[image["id"]]:
                    label = labels[annotation["category_id"]]
                    key = f"{name}#{annotation['id']}"
                    if annotation.get("iscrowd"):
                        rejects.append(Reject(key, "crowd", f"one box around many {label}"))
                        continue
                    if box := annotation.get("bbox"):
                        left, upper, width, height = (float(number) for number in box)
                        boxes.append((key, label, (left, upper, left + width, upper + height)))
                    else:
                        boxes.append((key, label, None))
                candidates += _parts(name, split, boxes, background, rejects)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file} is no COCO JSON: {type(error).__name__} {error}; expected images with id "
                f"and file_name, annotations with id, image_id, category_id and bbox, and "
                f"categories with id and name."
            ) from None
    return candidates


def read_voc(
    storage: Storage, files: Sequence[str], background: str | None, rejects: list[Reject]
) -> list[Candidate]:
    """Read Pascal VOC XML, a file a photo, and the splits of ``ImageSets/Main`` where given."""
    find_image = _image_finder(storage)
    splits = _voc_splits(storage)
    candidates: list[Candidate] = []
    for file in files:
        stem = PurePosixPath(file).stem
        try:
            root = _parse_xml(storage.read(file))
            stated = (root.findtext("filename") or "").strip()
            name = find_image(stated, "") or find_image(stem, "")
            if name is None:
                rejects.append(Reject(stated or stem, "missing", f"{file} names it"))
                continue
            boxes: list[tuple[str, str, tuple[float, ...] | None]] = []
            for number, item in enumerate(root.iter("object"), start=1):
                label = (item.findtext("name") or "").strip()
                if not label:
                    rejects.append(Reject(f"{name}#{number}", "no_label", f"{file} names none"))
                    continue
                edges = [float(item.findtext(f"bndbox/{e}") or "nan") for e in _VOC_EDGES]
                # The format counts pixels from 1 and includes the last one.
                box = (edges[0] - 1, edges[1] - 1, edges[2], edges[3])
                boxes.append((f"{name}#{number}", label, box))
        except (ElementTree.ParseError, ValueError, ImageError) as error:
            rejects.append(Reject(file, "bad_annotation", str(error)))
            continue
        candidates += _parts(name, splits.get(stem, ""), boxes, background, rejects)
    return candidates


_VOC_EDGES = ("xmin", "ymin", "xmax", "ymax")


def _parts(
    file: str,
    split: str,
    boxes: Sequence[tuple[str, str, tuple[float, ...] | None]],
    background: str | None,
    rejects: list[Reject],
) -> list[Candidate]:
    """Return one photo's boxes as candidates; annotations without a box name the whole photo."""
    candidates = []
    whole = sorted({label for _, label, box in boxes if box is None})
    if len(whole) > 1:
        rejects.append(Reject(file, "conflict", f"one image under the labels {', '.join(whole)}"))
    elif whole:
        candidates.append(Candidate(name=file, file=file, label=whole[0], split=split))
    sound = []
    for name, label, box in boxes:
        if box is None:
            continue
        left, upper, right, lower = box
        if not all(map(math.isfinite, box)) or right - left < 1 or lower - upper < 1:
            shown = ", ".join(f"{edge:g}" for edge in box)
            rejects.append(Reject(name, "degenerate_box", f"{label}: {shown} has no area"))
            continue
        sound.append((left, upper, right, lower))
        candidates.append(Candidate(name=name, file=file, label=label, split=split, box=sound[-1]))
    if background is not None:
        avoid = tuple(
            (math.floor(left), math.floor(upper), math.ceil(right), math.ceil(lower))
            for left, upper, right, lower in sound
        )
        name = f"{file}#{background}"
        candidates.append(
            Candidate(name=name, file=file, label=background, split=split, avoid=avoid)
        )
    return candidates


def _image_finder(storage: Storage) -> Callable[[str, str], str | None]:
    """Return what finds the file that an annotation means; ``hint`` chooses between equal names."""
    by_name = defaultdict(list)
    for name in storage.names():
        if name.lower().endswith(IMAGES):
            by_name[PurePosixPath(name).name].append(name)
            by_name[PurePosixPath(name).stem].append(name)

    def find_image(stated: str, hint: str) -> str | None:
        path = PurePosixPath(stated.replace("\\", "/"))
        found = by_name.get(path.name, [])
        if len(found) > 1:
            found = [n for n in found if f"/{n}".endswith(f"/{path}")] or found
        if len(found) > 1:
            found = [n for n in found if any(p in hint for p in n.split("/")[:-1])] or found
        if len(found) > 1:
            raise DataError(
                f"an annotation names {stated}, and the source holds {', '.join(found[:3])}; "
                f"expected one. State the folder in the annotation."
            )
        return found[0] if found else None

    return find_image


def _split_in(name: str, what: str) -> str:
    words = "".join(c if c.isalpha() else " " for c in PurePosixPath(name).stem).split()
    if split := next(filter(None, map(given_split, words)), ""):
        return split
    raise DataError(
        f"the source holds several {what}, and the name of {name} says no split; expected train, "
        f"val or test in each name. Rename it, or move it elsewhere."
    )


def _voc_splits(storage: Storage) -> dict[str, str]:
    splits: dict[str, str] = {}
    for name in storage.names():
        path = PurePosixPath(name)
        if path.match("ImageSets/Main/*.txt") and (split := given_split(path.stem)):
            for line in storage.read(name).decode().splitlines():
                if line.strip():
                    splits[line.split()[0]] = split
    return splits


def _coco(storage: Storage, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads(storage.read(name))
    except (ValueError, ImageError, RecursionError):
        return None
    parts = {"images", "annotations", "categories"}
    return content if isinstance(content, dict) and parts <= content.keys() else None


def _is_voc(storage: Storage, name: str) -> bool:
    try:
        return _parse_xml(storage.read(name)).tag == "annotation"
    except (ElementTree.ParseError, ValueError, ImageError):
        return False


def _parse_xml(data: bytes) -> ElementTree.Element:
    """Parse XML that declares no entities: those could grow without bound or name other files."""
    if b"<!" in data.replace(b"<!--", b""):
        raise ValueError("the XML has a document type or entities; expected none")
    return ElementTree.fromstring(data)  # noqa: S314  nothing is declared
