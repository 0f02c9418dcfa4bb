"""Find the labelled images of a source: which file, under which label, in which given split."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from tlpipe.errors import DataError
from tlpipe.sources import annotations, builtin, tables
from tlpipe.sources.archives import check_no_archives, open_archive
from tlpipe.sources.candidates import Candidate, Reject, given_split
from tlpipe.sources.remote import Remote, open_remote
from tlpipe.sources.storage import Folder, Storage

Kind = Literal["auto", "folders", "table", "coco", "voc"]


@dataclass(frozen=True)
class Source:
    """What a source holds. ``candidates`` yields them in the order of their names, each time anew.

    ``counts``: of each label, how many images it has before any was opened.
    """

    storage: Storage
    candidates: Callable[[], Iterator[Candidate]]
    rejects: list[Reject] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def is_local(self) -> bool:
        """Whether reading waits for a disk at most, and not for a network."""
        return not isinstance(self.storage, Remote)


@contextmanager
def opened(
    address: str,
    *,
    kind: Kind = "auto",
    pattern: str | None = None,
    background: str | None = None,
    follow_links: bool = False,
) -> Iterator[Source]:
    """Open a source and list its images.

    ``kind``: what the labels are read from; ``auto`` recognises it.
    ``pattern``: for folders, a regular expression that is searched in each name and whose groups
        ``label``, ``split`` and ``group`` say what they match.
    ``background``: for boxes, the label of one region of each photo that no box touches.
    ``follow_links``: whether links of a folder may lead outside of it.

    Raises:
        DataError: the source is missing, of no known kind, or its classes cannot be told apart.
    """
    with ExitStack() as stack:
        if "://" not in address and Path(address).suffix in (".yaml", ".yml"):
            files, candidates = builtin.load(Path(address))
            source = Source(files, partial(iter, candidates))
            stack.enter_context(closing(files))
        else:
            opened_at = _open_storage(address, follow_links=follow_links)
            storage = stack.enter_context(closing(opened_at))
            source = _list(storage, address, kind, pattern, background)
        for candidate in source.candidates():
            source.counts[candidate.label] += 1
        _check_classes(source.counts, address)
        yield source


def _open_storage(address: str, *, follow_links: bool = False) -> Storage:
    """Open a folder, a zip or tar archive, or an address that ``fsspec`` knows (``s3://...``).

    Raises:
        DataError: it does not exist, or is an archive that is damaged or not safe to read.
    """
    if "://" in address:
        return open_remote(address)
    path = Path(address)
    if path.is_dir():
        return Folder(path, follow_links=follow_links)
    if not path.exists():
        raise DataError(
            f"ingest.source {address} does not exist; expected a folder, a zip or tar archive, an "
            f"address like s3://BUCKET/FOLDER, or the YAML file of a built-in data set. "
            f"Change it in params.yaml."
        )
    if not path.is_file():
        raise DataError(f"ingest.source {address} is neither a file nor a folder.")
    return open_archive(path.open("rb"), address)


def _list(
    storage: Storage, address: str, kind: Kind, pattern: str | None, background: str | None
) -> Source:
    by_name_alone = kind == "folders" or pattern is not None
    described = annotations.Found() if by_name_alone else annotations.find(storage)
    rejects: list[Reject] = []
    coco, voc, table = described.coco, described.voc, described.tables
    for name, found, read in (
        ("coco", coco, partial(annotations.read_coco, storage, coco, background)),
        ("voc", voc, partial(annotations.read_voc, storage, voc, background)),
        ("table", table, partial(tables.read_table, storage, table)),
    ):
        if kind == name and not found:
            raise DataError(
                f"ingest.kind is {kind}, but {address} holds no such annotations; expected "
                f"{annotations.EXPECTED[name]}. Change ingest.kind or ingest.source."
            )
        if kind == name or (kind == "auto" and found):
            listed = read(rejects)
            return Source(storage, partial(iter, sorted(listed, key=lambda c: c.name)), rejects)
    if pattern is None:
        check_no_archives(storage, address)
    layout = _given_splits(storage, address) if pattern is None else {}
    search = re.compile(pattern).search if pattern is not None else None
    for folder in storage.folders() if pattern is None else ():
        _check_not_empty(storage, folder, layout)

    def candidates() -> Iterator[Candidate]:
        rejects.clear()
        for name in storage.names():
            found = _by_pattern(name, search(name)) if search else _by_folder(name, layout)
            if isinstance(found, Candidate):
                yield found
            else:
                rejects.append(Reject(name, "no_label", found))

    return Source(storage, candidates, rejects)


def _given_splits(storage: Storage, address: str) -> dict[str, str]:
    """Return the split of each top folder, if they are splits; nothing, if they are classes."""
    folders = storage.folders()
    given = {folder: given_split(folder) for folder in folders}
    if "train" not in given.values():
        return {}
    held_out = {"validation", "test"} & set(given.values())
    if not held_out:
        return {}
    if "" in given.values():
        others = ", ".join(folder for folder, split in given.items() if not split)
        raise DataError(
            f"{address} holds train and held-out folders, and beside them {others}; expected "
            f"splits only, or classes only. Move {others} elsewhere."
        )
    if "test" not in held_out:
        # With no test folder, the held-out one is what the result is measured on.
        given = {folder: split.replace("validation", "test") for folder, split in given.items()}
    return given


def _check_not_empty(storage: Storage, folder: str, layout: dict[str, str]) -> None:
    inner = [f"{folder}/{name}" for name in storage.folders(f"{folder}/")] if layout else [folder]
    for path in inner:
        if not storage.has_files(f"{path}/"):
            raise DataError(f"the class folder {path} is empty. Add images or take the folder out.")


def _by_folder(name: str, layout: dict[str, str]) -> Candidate | str:
    """Return what the folders of a file say of it, or why they say nothing."""
    first, *rest = name.split("/")
    if first in layout and len(rest) > 1:
        return Candidate(name=name, file=name, label=rest[0], split=layout[first])
    if layout or not rest:
        return "it lies in no class folder"
    return Candidate(name=name, file=name, label=first)


def _by_pattern(name: str, match: re.Match[str] | None) -> Candidate | str:
    if match is None:
        return "ingest.pattern does not match its name"
    groups = {key: value or "" for key, value in match.groupdict().items()}
    if not groups["label"]:
        return "ingest.pattern finds no label in its name"
    split, group = given_split(groups.get("split", "")), groups.get("group", "")
    return Candidate(name=name, file=name, label=groups["label"], split=split, group=group)


def _check_classes(counts: Counter[str], address: str) -> None:
    if len(counts) < 2:
        raise DataError(
            f"{address} holds {len(counts)} classes with files ({', '.join(counts) or '-'}); at "
            f"least 2 are needed: one folder per class with images inside, or one label per "
            f"class. Boxes of one class alone need ingest.background."
        )
    seen: dict[str, str] = {}
    for label in sorted(counts):
        if not label.isprintable() or "/" in label:
            raise DataError(
                f"the class {label!r} has a name that is not UTF-8 or not printable. Rename it."
            )
        other = seen.setdefault(label.casefold(), label)
        if other != label:
            raise DataError(
                f"the classes {other!r} and {label!r} differ in upper and lower case only; "
                f"expected one name per class. Merge or rename them."
            )
