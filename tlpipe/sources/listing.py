"""Find the labelled images of a source: which file, under which label, in which given split."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import merge
from pathlib import Path
from typing import Literal

from tlpipe.errors import DataError
from tlpipe.sources import (
    IMAGES,
    Candidate,
    Reject,
    annotations,
    builtin,
    coco,
    given_split,
    layouts,
    tables,
)
from tlpipe.sources.archives import check_no_archives, open_archive
from tlpipe.sources.decisions import NAME, UNLABELLED, Decisions, written
from tlpipe.sources.paths import Files, is_image, some, split_of_folders
from tlpipe.sources.remote import Remote, open_remote
from tlpipe.sources.storage import Folder, Storage

Kind = Literal["auto", "folders", "table", "coco", "voc"]
# So many times as many images: a class this rare has none to be measured on.
_UNEQUAL = 50
_NONE = Decisions(Path(NAME))


@dataclass(frozen=True)
class Source:
    """What a source holds. ``candidates`` yields them in the order of their names, each time anew.

    ``counts``: of each label, how many images it has before any was opened; ``suffixes``: the same
    of the ends of names, in lower case; ``notes``: what was understood and what was left out, a
    sentence each; ``read_from``: what says the labels; ``has_boxes``: whether an image is a part
    of a photo; ``unlabelled``: where candidates lie whose names begin so, beside the storage;
    ``decisions``: on its images.
    """

    storage: Storage
    candidates: Callable[[], Iterator[Candidate]]
    rejects: list[Reject] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    read_from: str = "folders"
    has_boxes: bool = False
    unlabelled: Storage | None = None
    decisions: Decisions = _NONE

    def read(self, file: str) -> bytes:
        """Return a file's bytes, as a storage does."""
        storage, name = self._at(file)
        return storage.read(name)

    def stamp(self, file: str) -> str:
        """Return what changes when a file does, as a storage does."""
        storage, name = self._at(file)
        return storage.stamp(name)

    def is_added(self, file: str) -> bool:
        """Return whether a file is one of the unlabelled folder."""
        return self.unlabelled is not None and file.startswith(UNLABELLED)

    def _at(self, file: str) -> tuple[Storage, str]:
        if self.unlabelled is not None and self.is_added(file):
            return self.unlabelled, file.removeprefix(UNLABELLED)
        return self.storage, file

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
    columns: tables.Columns | None = None,
    label_files: str | None = None,
    follow_links: bool = False,
) -> Iterator[Source]:
    """Open a source and list its images.

    ``kind``: what the labels are read from; ``auto`` recognises it.
    ``pattern``: for folders, a regular expression that is searched in each name and whose groups
        ``label``, ``split`` and ``group`` say what they match.
    ``background``: for boxes, the label of one region of each photo that no box touches.
    ``columns``: for tables, the names of columns by what they hold.
    ``label_files``: a pattern of the names of the files to read labels from.
    ``follow_links``: whether links of a folder may lead outside of it.

    ``~`` and variables such as ``$HOME`` in a path are expanded.

    Where splits are given and none is called test, the one called validation is: it is what the
    result is measured on, whatever the images' labels are read from.

    Raises:
        DataError: the source is missing, of no known kind, or its classes cannot be told apart.
    """
    address = expanded(address)
    with ExitStack() as stack:
        if is_builtin(address):
            files, candidates = builtin.load(Path(address))
            source = Source(files, partial(iter, candidates), read_from="built-in")
            stack.enter_context(closing(files))
        else:
            opened_at = _open_storage(address, follow_links=follow_links)
            storage = stack.enter_context(closing(opened_at))
            source = _list(storage, address, kind, pattern, background, columns or {}, label_files)
        splits: Counter[str] = Counter()
        has_boxes = False
        for candidate in source.candidates():
            has_boxes |= candidate.box is not None
            source.counts[candidate.label] += 1
            source.suffixes[candidate.file[candidate.file.rfind(".") :].lower()] += 1
            splits[candidate.split] += 1
        source = replace(source, has_boxes=has_boxes)
        _check_classes(source, address)
        source.notes.extend(_unequal(source.counts))
        if splits["train"] and splits["validation"] and not splits["test"]:
            source.notes.append(
                "no split is called test: the one called validation is taken for it"
            )
            source = replace(source, candidates=partial(_validation_as_test, source.candidates))
        yield source


@contextmanager
def unlabelled(address: str, *, follow_links: bool = False) -> Iterator[tuple[Storage, list[str]]]:
    """Open a source whose labels count for nothing; yield it and the names of its images.

    Any folder of images will do, also one without folders in it. ``follow_links``: whether links
    may lead outside of it.

    Raises:
        DataError: the source is missing, or holds no file with an ending of images.
    """
    address = expanded(address)
    with ExitStack() as stack:
        storage: Storage
        if is_builtin(address):
            storage, candidates = builtin.load(Path(address))
            names = {candidate.file for candidate in candidates}
        else:
            storage = _open_storage(address, follow_links=follow_links)
            names = {name for name in storage.names() if is_image(name)}
        stack.enter_context(closing(storage))
        if not names:
            raise DataError(
                f"ingest.source {address} holds no images; expected files that end in "
                f"{', '.join(IMAGES)}."
            )
        yield storage, sorted(names)


@contextmanager
def with_labelled(source: Source, address: str) -> Iterator[Source]:
    """Add those images of an unlabelled folder that the source's decisions give a class.

    Raises:
        DataError: the folder is missing, or its classes and the source's cannot be told apart.
    """
    rows, added = source.decisions.unlabelled(), []
    with ExitStack() as stack:
        try:
            storage, names = stack.enter_context(unlabelled(address))
        except DataError as error:
            text = str(error).replace("ingest.source", "ingest.unlabelled")
            raise type(error)(text) from None
        for name in (UNLABELLED + name for name in names):
            row = rows.get(written(name))
            if row is not None and row.label:
                added.append(Candidate(name, name, row.label))
        counts = source.counts + Counter(candidate.label for candidate in added)
        joined = replace(
            source,
            candidates=lambda: merge(
                source.candidates(), added, key=lambda candidate: candidate.name
            ),
            counts=counts,
            unlabelled=storage,
        )
        _check_classes(joined, f"{address}, with what {source.decisions.path} labels,")
        yield joined


def is_builtin(address: str) -> bool:
    """Return whether it is the YAML file of a built-in data set."""
    return "://" not in address and Path(address).suffix in (".yaml", ".yml")


def expanded(address: str) -> str:
    """Return a path with ``~`` and variables such as ``$HOME`` written out; addresses as they are.

    Examples:
        >>> expanded("photos/~"), expanded("s3://bucket/$HOME")
        ('photos/~', 's3://bucket/$HOME')
    """
    return address if "://" in address else os.path.expandvars(os.path.expanduser(address))  # noqa: PTH111


def check_written_out(address: str, key: str) -> None:
    """Check that DVC understands a path too: it expands nothing in the deps of ``dvc.yaml``.

    Raises:
        DataError: it does not; the message has what to write instead.
    """
    if (full := expanded(address)) != address:
        raise DataError(
            f"{key} is {address}, which DVC would look for as it stands there. Write {full} into "
            f"params.yaml."
        )


def _validation_as_test(candidates: Callable[[], Iterator[Candidate]]) -> Iterator[Candidate]:
    for candidate in candidates():
        yield candidate._replace(split=candidate.split.replace("validation", "test"))


def _unequal(counts: Counter[str]) -> Iterator[str]:
    """Yield what follows where one class has many times the images of another."""
    (many, most), *_, (few, least) = counts.most_common()
    if most >= _UNEQUAL * least:
        yield (
            f"classes are unequal: {many} has {most} images, {few} {least}. Whoever always answers "
            f"{many} is right on {most / counts.total():.1%} of them, so look at the recall of "
            f"each class; of {few}, validation and test hold next to nothing. train.balance lets "
            f"rare classes count as much as others"
        )


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
        tracked = (Path(f"{part}.dvc") for part in (path, *path.parents) if part.name)
        if found := next((file for file in tracked if file.is_file()), None):
            raise DataError(
                f"ingest.source {address} is not here, but DVC has it: run 'dvc pull {found}'."
            )
        raise DataError(
            f"ingest.source {address} does not exist; expected a folder, a zip or tar archive, an "
            f"address like s3://BUCKET/FOLDER, or the YAML file of a built-in data set. "
            f"Change it in params.yaml."
        )
    if not path.is_file():
        raise DataError(
            f"ingest.source {address} is neither a file nor a folder; expected one of both. Change "
            f"it in params.yaml."
        )
    return open_archive(path.open("rb"), address)


def _list(
    storage: Storage,
    address: str,
    kind: Kind,
    pattern: str | None,
    background: str | None,
    columns: tables.Columns,
    label_files: str | None,
) -> Source:
    if pattern is not None:
        search = re.compile(pattern).search
        return _by_name(storage, lambda name: _by_pattern(name, search(name)), [])
    rejects: list[Reject] = []
    notes: list[str] = []
    described, table = annotations.Found(), tables.Found()
    if kind in ("auto", "coco", "voc"):
        described = annotations.find(storage, label_files, notes)
    if kind in ("auto", "table"):
        table = tables.find(storage, columns, label_files)
    found: dict[str, Sequence[str]] = {
        "coco": tuple(described.coco),
        "voc": described.voc,
        "table": [one.name for one in table.tables],
    }
    others = {**described.others, **table.others}
    taken = [name for name, files in found.items() if files and kind in ("auto", name)]
    if len(taken) > 1:
        seen = " and ".join(f"{found[name][0]} ({name})" for name in taken)
        raise DataError(
            f"{address} holds labels of several kinds: {seen}; expected one. Say which count: "
            f"ingest.kind: {taken[0]}, or name the files: ingest.label_files."
        )
    if not taken and (kind in found or (label_files is not None and kind == "auto")):
        seen = "; ".join(f"{name}: {reason}" for name, reason in others.items())
        wanted = annotations.EXPECTED.get(kind, "a table, COCO's JSON or Pascal VOC's XML")
        named = f" called {label_files}" if label_files is not None else ""
        raise DataError(
            f"ingest.kind is {kind}, but {address} holds no such annotations{named}; expected "
            f"{wanted}. {f'Seen: {seen}. ' if seen else ''}Change ingest.kind, "
            f"ingest.label_files or ingest.source."
        )
    if taken:
        notes += _left_out(others)
        if taken == ["table"]:
            listed = tables.read_tables(table, rejects, notes)
        else:
            files = Files(storage)
            if taken == ["coco"]:
                photos = coco.read(described.coco, files, rejects)
            else:
                photos = annotations.read_voc(storage, described.voc, files, rejects)
            bare = sum(not photo.labels for photo in photos)
            left = files.images_without({photo.file for photo in photos})
            notes.append(
                f"labels are read from {some(found[taken[0]])}, of {len(photos)} photos"
                f"{f', {bare} of them without a label' if bare else ''}"
            )
            if left:
                notes.append(f"{len(left)} images are in no annotation and left out: {some(left)}")
            listed = annotations.candidates(photos, background, rejects)
        listed = sorted(_in_folders_of_splits(listed, notes), key=lambda candidate: candidate.name)
        return Source(storage, partial(iter, listed), rejects, notes=notes, read_from=taken[0])
    _check_no_other_labels(
        {name: why for name, why in others.items() if annotations.may_stand_for(name)}, address
    )
    notes += _left_out(others)
    check_no_archives(storage, address)
    layout = layouts.find(storage, address)
    layouts.check_layer(storage, layout, address)
    if kind == "auto":
        labels = {label for root in layout.roots for label in storage.folders(root)}
        _check_no_other_labels(dict(annotations.unread(storage, layout.roots, labels)), address)
    layouts.check_images(storage, layout, address, is_told=kind == "folders")
    nothing = [name for name in storage.names() if layout.read(name) is None]
    if beside := [name for name in nothing if not name.startswith(layout.left_out)]:
        layout.notes.append(f"{len(beside)} files beside the classes are no images: {beside[0]}")
    source = _by_name(storage, layout.read, [*notes, *layout.notes])
    if not layout.left_out and (advice := layouts.advise(source.candidates(), layout.roots)):
        source.notes.append(advice)
    return source


def _left_out(others: Mapping[str, str]) -> Iterator[str]:
    """Yield why files are not read, those with one reason together."""
    for reason in dict.fromkeys(others.values()):
        names = [name for name, why in others.items() if why == reason]
        yield f"{some(names)} left out: {reason}"


def _in_folders_of_splits(listed: list[Candidate], notes: list[str]) -> list[Candidate]:
    """Return the candidates in the splits that their files' folders say, if no other is given."""
    if any(candidate.split for candidate in listed):
        return listed
    splits = [split_of_folders(candidate.file) for candidate in listed]
    if "train" not in splits or len(set(splits)) < 2:
        return listed
    if "" in splits:
        notes.append(
            f"{len(splits) - splits.count('')} of {len(splits)} images lie in folders called like "
            f"splits, and {splits.count('')} do not: such folders count for nothing"
        )
        return listed
    notes.append("the splits are those that the images' folders say")
    return [
        candidate._replace(split=split) for candidate, split in zip(listed, splits, strict=True)
    ]


def _by_name(
    storage: Storage, read: Callable[[str], Candidate | str | None], notes: list[str]
) -> Source:
    """Return the images that are labelled by their names.

    ``read``: returns what a name says, or why it says nothing, or None for what is left out.
    """
    rejects: list[Reject] = []

    def candidates() -> Iterator[Candidate]:
        rejects.clear()
        for name in storage.names():
            found = read(name)
            if isinstance(found, Candidate):
                yield found
            elif found is not None:
                rejects.append(Reject(name, "no_label", found))

    return Source(storage, candidates, rejects, notes=notes)


def _check_no_other_labels(others: Mapping[str, str], address: str) -> None:
    """Raise an error for files that may hold other labels than the names of folders.

    Raises:
        DataError: there is one.
    """
    for name in sorted(others):
        raise DataError(
            f"{address} holds {name}, which may hold the labels but is not read: {others[name]}. "
            f"To take the names of folders for labels, set ingest.kind: folders."
        )


def _by_pattern(name: str, match: re.Match[str] | None) -> Candidate | str:
    if match is None:
        return "ingest.pattern does not match its name"
    groups = {key: value or "" for key, value in match.groupdict().items()}
    if not groups["label"]:
        return "ingest.pattern finds no label in its name"
    word, group = groups.get("split", ""), groups.get("group", "")
    split = given_split(word)
    if word and not split:
        raise DataError(
            f"ingest.pattern finds the split {word!r} in {name}; expected train, validation or "
            f"test. Change the pattern, or the name."
        )
    return Candidate(name=name, file=name, label=groups["label"], split=split, group=group)


def _check_classes(source: Source, address: str) -> None:
    counts = source.counts
    if len(counts) < 2:
        reasons = Counter(reject.reason for reject in source.rejects)
        shown = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        rejected = ""
        if shown:
            path, _, detail = source.rejects[0]
            rejected = f" What was rejected: {shown}; the first is {path!r}: {detail}."
        noted = f" Seen: {'; '.join(source.notes)}." if source.notes else ""
        named = f" ({', '.join(counts)})" if counts else ""
        raise DataError(
            f"{address} holds {len(counts)} classes with files{named}; at "
            f"least 2 are needed: one folder per class with images inside, or one label per "
            f"class. Boxes of one class alone need ingest.background.{rejected}{noted}"
        )
    seen: dict[str, str] = {}
    for label in sorted(counts):
        if not label.isprintable():
            raise DataError(
                f"the class {label!r} has a name that is not UTF-8 or not printable. Rename it."
            )
        other = seen.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label:
            how = "upper and lower case"
            if other.casefold() != label.casefold():
                how = "Unicode's normal form (NFC and NFD)"
            raise DataError(
                f"the classes {other!r} and {label!r} differ in {how} only; expected one name per "
                f"class. Merge or rename them."
            )
