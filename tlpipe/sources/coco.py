"""Read labels from COCO's JSON: files of one image set each, whose boxes become images.

The box may be around a polygon or a mask: run-length encoded, as numbers or compressed.
``pycocotools`` trusts what it is given: runs that do not add up to the mask's size become a box
outside of it, and a text that ends within a number writes beyond its memory, which ends the
process. Here both are rejected with the reason.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from tlpipe.errors import DataError
from tlpipe.sources import UNUSABLE, Edges, Photo, Reject
from tlpipe.sources.paths import Files, Match, in_one_place, some, split_of

_PARTS = ("images", "annotations", "categories")


def reason_against(content: Any) -> str:
    """Return in half a sentence why what a JSON file holds is not read as COCO's, or nothing."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__} and no COCO JSON, which is an object"
    if missing := [part for part in _PARTS if not isinstance(content.get(part), list)]:
        keys = ", ".join(sorted(map(str, content))[:8]) or "-"
        return f"it has the keys {keys}; COCO also has lists of {', '.join(missing)}"
    first = next(iter(content["annotations"]), None)
    if isinstance(first, Mapping) and "segments_info" in first:
        return "it is COCO's panoptic kind, which is seen and not known; instances are read"
    return ""


def is_of_instances(name: str) -> bool:
    """Return whether a file's name says that it is of COCO's instances."""
    return PurePosixPath(name).stem.startswith("instances")


def is_another_kind(name: str, known: Collection[str]) -> bool:
    """Return whether a file is none of instances, and one of the known ones is, for its split."""
    splits = {split_of(other) for other in known if is_of_instances(other)}
    return not is_of_instances(name) and split_of(name) in splits


def chosen(names: Sequence[str], notes: list[str]) -> list[str]:
    """Return which COCO files to read: one, or one for each split; of several kinds, instances.

    Raises:
        DataError: the names do not tell.
    """
    by_split = defaultdict(list)
    for name in names:
        by_split[split_of(name)].append(name)
    if any(len(files) > 1 for files in by_split.values()):
        instances = [name for name in names if is_of_instances(name)]
        if not instances or len(set(map(split_of, instances))) < len(instances):
            raise DataError(
                f"the source holds {len(names)} COCO files, and several for one split: "
                f"{some(names)}; expected one, or one each for train, val and test. Name them: "
                f"ingest.label_files, such as {instances[0] if instances else names[0]}."
            )
        others = [name for name in names if name not in instances]
        notes.append(
            f"several JSON files are there for one split: {some(instances)} are read, "
            f"{some(others)} left out. ingest.label_files names others"
        )
        names = instances
    if len(names) > 1 and (unknown := [name for name in names if not split_of(name)]):
        raise DataError(
            f"the source holds several COCO files, and the name of {unknown[0]} says no split; "
            f"expected train, val or test in each name. Rename it, or name the files to be read: "
            f"ingest.label_files."
        )
    return list(names)


def read(contents: Mapping[str, Any], files: Files, rejects: list[Reject]) -> list[Photo]:
    """Return the photos of COCO files and what is labelled in them.

    Raises:
        DataError: a file name may mean several images, or they lie in several folders.
    """
    photos: dict[str, Photo] = {}
    for file, content in contents.items():
        split = split_of(file) if len(contents) > 1 else ""
        of_id = _photos_by_id(file, content["images"], split, files, photos, rejects)
        names = _names(content["categories"])
        for number, annotation in enumerate(content["annotations"], start=1):
            _add(file, number, annotation, of_id, names, rejects)
    in_conflict = {reject.path for reject in rejects if reject.reason == "conflict"}
    return [photo for photo in photos.values() if photo.file not in in_conflict]


def _photos_by_id(
    file: str,
    images: Sequence[Any],
    split: str,
    files: Files,
    photos: dict[str, Photo],
    rejects: list[Reject],
) -> dict[int | str, Photo | None]:
    """Return the photos by their ids in a file, None for rejected ones; add them to ``photos``."""
    of_id: dict[int | str, Photo | None] = {}
    stated: list[tuple[int | str, str, tuple[int, int] | None]] = []
    for number, image in enumerate(images, start=1):
        match image:
            case {"id": int() | float() | str() as key, "file_name": str(name)}:
                stated.append((_id(key), name, _size(image.get("width"), image.get("height"))))
            case _:
                text = "an image has no id or no file_name"
                rejects.append(Reject(f"{file}, image {number}", "bad_annotation", text))
    matches = in_one_place([files.find(name, file) for _, name, _ in stated], file)
    for (key, name, size), match in zip(stated, matches, strict=True):
        photo = _photo(file, name, split, size, match, photos, rejects)
        before = of_id.setdefault(key, photo)
        if before is not photo:
            for other in filter(None, (before, photo)):
                text = f"the id {key} stands for several images of {file}"
                rejects.append(Reject(other.file, "conflict", text))
    return of_id


def _photo(
    file: str,
    name: str,
    split: str,
    size: tuple[int, int] | None,
    match: Match,
    photos: dict[str, Photo],
    rejects: list[Reject],
) -> Photo | None:
    """Return the photo that a file lists, added to ``photos``, or None where it is missing."""
    if len(match.files) > 1:
        raise DataError(
            f"{file} names {name!r}, which may be {some(match.files)}; expected one file. State "
            f"its folder in file_name."
        )
    if not match.files:
        rejects.append(match.missing(name, file))
        return None
    photo = photos.setdefault(match.files[0], Photo(match.files[0], split, size))
    if (photo.split, photo.size) != (split, size):
        text = f"{file} lists it in another split or size, {split or '-'} and {size}, than "
        text += f"before, {photo.split or '-'} and {photo.size}"
        rejects.append(Reject(photo.file, "conflict", text))
    return photo


def _add(
    file: str,
    number: int,
    annotation: Any,
    of_id: Mapping[int | str, Photo | None],
    names: Mapping[int | str, str],
    rejects: list[Reject],
) -> None:
    """Add what an annotation labels to its photo, or a reject and the region that it is of."""
    place = f"{file}, annotation {number}"
    match annotation:
        case {"id": key, "image_id": int() | float() | str() as image_id}:
            place = f"{file}#{key}"
        case {"image_id": int() | float() | str() as image_id}:
            rejects.append(Reject(place, "bad_annotation", "it has no id"))
            if photo := of_id.get(_id(image_id)):
                photo.occupy(partial(_box, annotation, photo))
            return
        case _:
            is_object = isinstance(annotation, Mapping)
            text = "it has no image_id" if is_object else f"it is {annotation!r}, no object"
            rejects.append(Reject(place, "bad_annotation", text))
            return
    if _id(image_id) not in of_id:
        text = f"its image_id {image_id} is that of no image"
        rejects.append(Reject(place, "missing", text))
        return
    photo = of_id[_id(image_id)]
    if photo is None:
        return  # its photo is rejected
    name = f"{photo.file}#{key}"
    category = annotation.get("category_id")
    label = names.get(_id(category)) if isinstance(category, int | float | str) else None
    if label is None:
        text = f"{file}: its category_id {category!r} is that of no category"
        rejects.append(Reject(name, "no_label", text))
        photo.occupy(partial(_box, annotation, photo))
    elif annotation.get("iscrowd"):
        rejects.append(Reject(name, "crowd", f"one box around many {label}"))
        photo.occupy(partial(_box, annotation, photo))
    else:
        try:
            photo.labels.append((name, label, _box(annotation, photo)))
        except UNUSABLE as error:
            rejects.append(Reject(name, "bad_annotation", f"{label}: {error}"))
            photo.occupied.append(None)


def _box(annotation: Mapping[str, Any], photo: Photo) -> Edges | None:
    """Return the stated box, or that around the polygons or mask; None for the whole photo.

    Raises:
        ValueError: what is there is no box, or is of a picture of another size.
    """
    segmentation = annotation.get("segmentation")
    if box := annotation.get("bbox"):
        left, upper, width, height = (float(number) for number in box)
        return left, upper, left + width, upper + height
    if not segmentation:
        if annotation.get("keypoints"):
            raise ValueError("it has keypoints and no bbox; expected a bbox")
        return None
    if isinstance(segmentation, Mapping):
        size = size_of_mask(segmentation)[::-1]
        if photo.size not in (None, size):
            raise ValueError(f"its mask is of {size} pixels, its image of {photo.size}")
        photo.size = size
    return box_around(segmentation)


def _names(categories: Sequence[Any]) -> dict[int | str, str]:
    """Return the names of categories by id, without ids that stand for two names."""
    names: dict[int | str, set[str]] = defaultdict(set)
    for category in categories:
        match category:
            case {"id": int() | float() | str() as key, "name": str() | int() as name}:
                names[_id(key)].add(str(name).strip())
    return {key: found.pop() for key, found in names.items() if len(found) == 1 and all(found)}


def _id(key: float | str) -> int | str:
    """Return an id as the number that it is, also if it is written as text or with ``.0``."""
    if isinstance(key, str):
        is_number = len(key) < 19 and key.isdecimal() and str(int(key)) == key
        return int(key) if is_number else key
    return int(key) if key == key and abs(key) < 2**63 and int(key) == key else str(key)


def _size(width: Any, height: Any) -> tuple[int, int] | None:
    """Return a stated size, if it is one; 0 stands for not known."""
    if all(isinstance(side, int | float) and 0 < side < 2**31 for side in (width, height)):
        return round(width), round(height)
    return None


def box_around(segmentation: Any) -> Edges:
    """Return left, upper, right and lower edge of what polygons or a mask cover.

    ``segmentation``: polygons as ``[[x, y, x, y, ...], ...]``, or a mask as ``{"size": [height,
    width], "counts": ...}`` with the lengths of runs down the columns, of pixels outside first.

    Raises:
        ValueError: it is neither, or empty.
    """
    if isinstance(segmentation, Mapping):
        height, width = size_of_mask(segmentation)
        counts = segmentation.get("counts")
        runs = _decompressed(counts) if isinstance(counts, str) else counts
        return _around_runs(runs, height, width)
    points: list[float] = []
    for polygon in segmentation if isinstance(segmentation, Sequence) else ():
        if not isinstance(polygon, Sequence) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is no list of at least three pairs x, y")
        points += map(float, polygon)
    if not points or not all(map(math.isfinite, points)):
        raise ValueError("its segmentation is no list of polygons of finite numbers and no mask")
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])


def size_of_mask(mask: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width that a mask states.

    Raises:
        ValueError: it does not.
    """
    match mask.get("size"):
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    raise ValueError(f"its mask has the size {mask.get('size')!r}; expected [height, width]")


def _around_runs(runs: Any, height: int, width: int) -> Edges:
    is_list = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
    if not is_list or sum(runs) != height * width:
        raise ValueError(f"the runs of its mask do not add up to {height} x {width} pixels")
    left, upper, right, lower, end = width, height, 0, 0, 0
    for number, run in enumerate(runs):
        start, end = end, end + run
        if number % 2 == 0 or not run:
            continue
        first, last = start // height, (end - 1) // height
        left, right = min(left, first), max(right, last + 1)
        # A run that goes on in the next column touches the lowest and the highest row.
        upper = min(upper, start % height if first == last else 0)
        lower = max(lower, (end - 1) % height + 1 if first == last else height)
    if right <= left:
        raise ValueError("its mask covers no pixel")
    return left, upper, right, lower


def _decompressed(text: str) -> list[int]:
    """Return the runs of COCO's compressed masks.

    Each number is five bits a character, the lowest first, signed; 32 marks that more follow. From
    the fourth on it is the difference to the one two before (maskApi.c, rleFrString).

    Raises:
        ValueError: the text ends within a number, or has other characters.
    """
    runs: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 60:
            raise ValueError(f"the compressed mask holds {character!r}, which has no meaning there")
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << bits
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = bits = 0
    if bits:
        raise ValueError("the compressed mask ends within a number")
    return runs
