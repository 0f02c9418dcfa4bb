"""Read labels from tables: CSV, TSV or Parquet, as spreadsheets, Kaggle and exporters write them.

Which separator, encoding and columns were taken is said. What a table does not say plainly is an
error that names what was seen and the key to set.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

from tlpipe.errors import DataError, ImageError
from tlpipe.sources import Candidate, Reject, decisions, given_split
from tlpipe.sources.paths import Files, Match, folder_of, in_one_place, some, split_of
from tlpipe.sources.storage import Storage

Role = Literal["path", "label", "split", "group"]
Columns = Mapping[Role, str | None]
SUFFIXES = (".csv", ".tsv", ".parquet")
_NAMES: dict[Role, tuple[str, ...]] = {
    "path": (
        *("path", "file", "filename", "file_name", "filepath", "file_path", "id"),
        *("image", "image_path", "image_name", "image_id", "image_file", "img", "img_path"),
    ),
    "label": ("label", "labels", "class", "class_name", "classname", "category", "target"),
    "split": ("split", "subset"),
    "group": ("group",),
}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Names of columns that may say splits, or what images of one group have in common.
_MAY_BE: dict[Role, re.Pattern[str]] = {
    "split": re.compile(
        r"is_?(train\w*|val(id(ation)?)?|test\w*|hold_?out)|.*split.*|.*(partition|fold).*|(data_?)?set|phase|usage"
    ),
    "group": re.compile(
        r"(patient|subject|person|participant|donor|animal|individual|lesion|case|study|series"
        r"|slide|specimen|video|clip|sequence|session|scene|group|burst|track)s?"
        r"(_?(id|ids|no|nr|number|name|uid))?"
    ),
}
# Columns of a table of boxes: one of these, or both of a pair.
_BOXES = (("bbox",), ("bounding_box",), ("bndbox",), ("box",), ("left", "top"))
_EDGE = re.compile(r"(.*[^a-z0-9])?([xy])_?(min|1)")
# Of a competition: what is to be handed in, with made-up labels.
_SUBMISSION = re.compile("submission", re.IGNORECASE)
_LOOKED_AT = 50


@dataclass(frozen=True)
class Row:
    """A line of a table: the path as it stands there, and what it says of the image."""

    number: int
    path: str
    label: str
    split: str
    group: str


class NotATableError(Exception):
    """Says in half a sentence why a file is not read as a table of labels."""


@dataclass(frozen=True)
class Table:
    """A table of labels: its rows, the split that its name or folder gives, how it was read.

    ``is_decisions``: ``tlpipe label`` wrote it, so that an image without a label was dropped.
    """

    name: str
    rows: tuple[Row, ...]
    split: str
    said: str
    is_decisions: bool = False


@dataclass(frozen=True)
class Found:
    """Tables of a source, and in half a sentence by name why others are none.

    ``files``: what finds the images; None where there is nothing to read.
    """

    tables: tuple[Table, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    files: Files | None = None


def find(storage: Storage, columns: Columns, label_files: str | None) -> Found:
    """Read the tables on top of a source and in folders of splits.

    ``columns``: the names of columns by what they hold, where they are not known ones;
    ``label_files``: a pattern of names, which are then the only ones, in any folder.

    Raises:
        DataError: a table is understood in two ways, or ``columns`` names one that it lacks.
    """
    names = [name for name in storage.names() if _may_be_table(name, label_files)]
    if not names:
        return Found()
    files = Files(storage)
    found, others = [], {}
    for name in names:
        try:
            if label_files is None and _SUBMISSION.search(name):
                raise NotATableError("its name says that it is for handing in answers")
            found.append(_read(storage, name, files, columns))
        except NotATableError as reason:
            others[name] = str(reason)
    return Found(tuple(found), others, files)


def _may_be_table(name: str, label_files: str | None) -> bool:
    if not name.lower().endswith(SUFFIXES):
        return False
    if label_files is not None:
        return fnmatchcase(name, label_files)
    folder = folder_of(name)
    return not folder or ("/" not in folder and given_split(folder) != "")


def read_tables(found: Found, rejects: list[Reject], notes: list[str]) -> list[Candidate]:
    """Return the images that tables name; several tables are one source with given splits.

    Raises:
        DataError: several tables are not one for each split, or a split is no known word.
    """
    assert found.files is not None
    tables, files = found.tables, found.files
    splits = [table.split for table in tables]
    if len(tables) > 1 and ("" in splits or len(set(splits)) < len(splits)):
        raise DataError(
            f"the source holds {len(tables)} tables with path and label: "
            f"{', '.join(table.name for table in tables)}; expected one, or one each named train, "
            f"validation and test. Put a column split into one table, or name those to be read: "
            f"ingest.label_files."
        )
    candidates: list[Candidate] = []
    seen: dict[str, str] = {}
    for table in tables:
        notes.append(f"{table.name}: {table.said}")
        given = table.split if len(tables) > 1 else ""
        matches = [files.find(row.path, table.name) for row in table.rows]
        matches = in_one_place(matches, table.name, [row.label for row in table.rows])
        for row, match in zip(table.rows, matches, strict=True):
            candidate = _candidate(table, row, given, match, rejects)
            if candidate is None:
                continue
            if (before := seen.get(candidate.name)) is not None:
                both = f"row {row.number} of {table.name} names it again"
                reason = "repeated" if before == candidate.label else "conflict"
                text = f"{both}, under {candidate.label}; before, {before}"
                rejects.append(Reject(candidate.name, reason, text))
                continue
            seen[candidate.name] = candidate.label
            candidates.append(candidate)
    if left := files.images_without(seen):
        where = ", ".join(table.name for table in tables)
        notes.append(f"{len(left)} images are in no row of {where} and left out: {some(left)}")
    in_conflict = {reject.path for reject in rejects if reject.reason == "conflict"}
    return [candidate for candidate in candidates if candidate.name not in in_conflict]


def _candidate(
    table: Table, row: Row, given: str, match: Match, rejects: list[Reject]
) -> Candidate | None:
    """Return what a row means, or None where it is rejected."""
    place = f"row {row.number} of {table.name}"
    if table.is_decisions and not row.label:
        rejects.append(Reject(row.path, "dropped", f"{place} takes it out"))
        return None
    if not row.path or not row.label:
        reason = f"{place} has no {'label' if row.path else 'path'}"
        rejects.append(Reject(row.path or f"row {row.number}", "no_label", reason))
        return None
    split = given_split(row.split) or given
    if row.split and not given_split(row.split):
        raise DataError(
            f"{place} has the split {row.split!r}; expected train, validation, test or nothing. "
            f"Change it in the table."
        )
    found = match.files
    if len(found) > 1:
        raise DataError(
            f"{place} names {row.path!r}, which may be {some(found)}; expected one file. Write "
            f"its folder and extension into the table."
        )
    name = found[0] if found else PurePosixPath(row.path).as_posix()
    if not found:
        is_outside = name.startswith("/") or ".." in name.split("/")
        reject = Reject(name, "outside_root", "a path that leads outside the source")
        is_outside = is_outside and not match.near
        rejects.append(reject if is_outside else match.missing(name, place))
        return None
    return Candidate(name=name, file=name, label=row.label, split=split, group=row.group)


def _read(storage: Storage, name: str, files: Files, columns: Columns) -> Table:
    """Read a table.

    Raises:
        NotATableError: it is none of labels.
        DataError: it can be understood in two ways, or lacks a column that was named.
    """
    header, rows, how = _cells(storage, name, files, columns)
    roles = _roles(header, rows, name, files, columns)
    if "label" in roles:
        labels = [row[roles["label"]].strip() for row in rows]
        how += f", labels from {header[roles['label']]!r}"
        unused = _check_unused(header, rows, name, roles, columns)
    else:
        labels = _of_one_hot(header, rows, roles, name)
        how += ", labels from columns of 0 and 1"
        unused = []

    def cell(row: Sequence[str], role: Role) -> str:
        return row[roles[role]].strip() if role in roles else ""

    flagged = _flagged(header[roles["split"]], name) if "split" in roles else {}
    read = tuple(
        Row(
            number,
            cell(row, "path"),
            label,
            flagged.get(cell(row, "split").casefold(), cell(row, "split")),
            cell(row, "group"),
        )
        for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=1)
    )
    how += f", paths from {header[roles['path']]!r}"
    how += f"; not used: {some(list(map(repr, unused)))}" if unused else ""
    is_decisions = tuple(header) == decisions.Decision._fields
    return Table(name, read, split_of(name), f"{len(read)} rows, {how}", is_decisions)


def _flagged(column: str, name: str) -> dict[str, str]:
    """Return the splits that true and false mean in a column such as ``is_valid``, as fastai's.

    Raises:
        DataError: it says what trains, and so not what the rest is for.
    """
    if not (is_ := re.fullmatch(r"is_?(.*)", _plain(column))) or not (split := given_split(is_[1])):
        return {}
    if split == "train":
        raise DataError(
            f"the column {column!r} of {name} says which images train, and not what the others are "
            f"for; expected train, validation and test in a column. Write them into one and name "
            f"it, or say that there is none: ingest.columns: {{split: null}}."
        )
    return {word.casefold(): split if flag else "train" for word, flag in _FLAGS.items()}


def _cells(
    storage: Storage, name: str, files: Files, columns: Columns
) -> tuple[list[str], list[list[str]], str]:
    """Return header, rows and how they were read; every row has as many cells as the header."""
    try:
        data = storage.read(name)
    except ImageError as error:
        raise NotATableError(f"it cannot be read: {error.detail}") from None
    if name.lower().endswith(".parquet"):
        return _of_parquet(data)
    text, encoding = decoded(data)
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    if is_said := re.match(r"sep=(.)\n", text):  # as Excel writes it
        text = text[is_said.end() :]
    first = text.split("\n", 1)[0].strip()
    if not first:
        raise NotATableError("it is empty")
    if first.startswith("#"):
        raise NotATableError(f"its first line is a comment ({first[:60]}); expected the header")
    wanted = {_plain(column) for column in columns.values() if column}
    known = wanted or {word for words in _NAMES.values() for word in words}

    def fit(separator: str) -> tuple[int, int]:
        cells = [_plain(cell) for cell in _split_line(first, separator)]
        return len(known & set(cells)), len(cells)

    separator = is_said[1] if is_said else max(_SEPARATORS, key=fit)
    lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    try:
        rows = [row for row in lines if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise NotATableError(f"line {lines.line_num} cannot be read: {error}") from None
    how = f"separated by {_SEPARATORS.get(separator, separator)}, in {encoding}"
    header = [cell.strip() for cell in rows[0]]
    if not columns and not fit(separator)[0]:
        # The first row may name a file already.
        matches = [files.find(cell.strip(), name) for cell in rows[0]]
        paths = [place for place, match in enumerate(matches) if match.files]
        if len(rows[0]) == 2 and len(paths) == 1:
            header = ["path", "label"] if paths == [0] else ["label", "path"]
            rows.insert(0, header)
            how += ", without a header"
        elif paths:
            raise NotATableError(
                f"its first row names a file ({rows[0][paths[0]].strip()}), so it has no header; "
                f"expected one such as path,label"
            )
    for number, row in enumerate(rows[1:], start=1):
        if len(row) > len(header):
            raise NotATableError(
                f"row {number} has {len(row)} cells, its header {len(header)}; cells that hold "
                f"the separator must stand in quotes"
            )
        row.extend([""] * (len(header) - len(row)))
    return header, rows[1:], how


def _split_line(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:  # who reads all lines says so
        return []


def decoded(data: bytes) -> tuple[str, str]:
    """Return a text and its encoding: of UTF-8, UTF-16 and Windows' Western one.

    Raises:
        NotATableError: it is in none of them.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace"), "UTF-16"
    for start, encoding in ((1, "UTF-16-LE"), (0, "UTF-16-BE")):
        # Half of the bytes of Western letters are zero.
        if (half := data[start:4096:2]) and half.count(0) > len(half) / 2:
            return data.decode(encoding, errors="replace"), f"{encoding} without a byte-order mark"
    try:
        return data.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
    if re.search("[^\0-\x7f\ufffd]", data.decode("utf-8", errors="replace")):
        raise NotATableError(f"line {number} is no UTF-8, and other lines are; save it as UTF-8")
    text = data.decode("cp1252", errors="replace")
    # Words of Western languages do not have so many letters beyond ASCII in a row.
    if odd := re.search("[^\0-\x7f]{3}|\ufffd", text):
        raise NotATableError(
            f"line {number} is no UTF-8, and would read {odd[0]!r} in Windows-1252; save it as "
            f"UTF-8"
        )
    return text, "Windows-1252, as it is no UTF-8"


def _of_parquet(data: bytes) -> tuple[list[str], list[list[str]], str]:
    from pyarrow import ArrowException, parquet, types

    try:
        plain = [
            field.name  # others may hold the images themselves
            for field in parquet.read_schema(io.BytesIO(data))
            if not types.is_nested(field.type) and not types.is_binary(field.type)
        ]
        table = parquet.read_table(io.BytesIO(data), columns=plain)
    except (ArrowException, OSError, ValueError) as error:
        raise NotATableError(f"it is no Parquet file: {error}") from None
    rows = [[_text(value) for value in row.values()] for row in table.to_pylist()]
    return table.column_names, rows, "Parquet"


def _text(value: object) -> str:
    """Return a cell as text; whole numbers that gaps have turned into fractions are whole."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _plain(column: str) -> str:
    return column.strip().casefold().replace(" ", "_").replace("-", "_")


def _roles(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    name: str,
    files: Files,
    columns: Columns,
) -> dict[Role, int]:
    """Return which column holds what.

    Raises:
        NotATableError: there is none for paths, or none for labels.
        DataError: there are several, or not the one that was named.
    """
    plain, roles = [_plain(column) for column in header], dict[Role, int]()
    seen = ", ".join(map(repr, header[:8])) + (" ..." if len(header) > 8 else "")
    for role, words in _NAMES.items():
        if role in columns and columns[role] is None:
            continue
        if given := columns.get(role):
            if _plain(given) not in plain:
                raise DataError(
                    f"{name} has no column {given!r}, which ingest.columns.{role} names; it has "
                    f"{seen}. Change ingest.columns."
                )
            if plain.count(_plain(given)) > 1:
                raise DataError(f"{name} has several columns {given!r}; expected one. Rename one.")
            roles[role] = plain.index(_plain(given))
            continue
        found = [place for place, column in enumerate(plain) if column in words]
        if role == "path" and len(found) > 1:
            found = [
                place
                for place in found
                if any(
                    files.find(row[place].strip(), name).files for row in islice(rows, _LOOKED_AT)
                )
            ] or found
        if len(found) > 1:
            both = " and ".join(repr(header[place]) for place in found)
            is_doubled = len({plain[place] for place in found}) < len(found)
            advice = f"Name it: ingest.columns: {{{role}: {header[found[0]]}}}."
            raise DataError(
                f"{name} has the columns {both}, of which each may be the {role}; expected one. "
                f"{'Rename one.' if is_doubled else advice}"
            )
        if found:
            roles[role] = found[0]
    if "path" not in roles:
        raise NotATableError(
            f"its columns are {seen}, and none is known to hold paths. Name them: ingest.columns: "
            f"{{path: COLUMN, label: COLUMN}}"
        )
    if "label" not in roles and not _one_hot_columns(header, rows, roles):
        raise NotATableError(
            f"its columns are {seen}, and none is known to hold labels. Name it: ingest.columns: "
            f"{{label: COLUMN}}"
        )
    if "label" not in columns and (edges := _edges(plain)):
        raise NotATableError(
            f"its columns {' and '.join(edges)} say that it is a table of boxes; export it as COCO "
            f"or Pascal VOC. If each row labels a whole image, name the column: ingest.columns: "
            f"{{label: COLUMN}}"
        )
    return roles


def _edges(plain: Sequence[str]) -> list[str]:
    """Return the columns that say where a box lies, or nothing."""
    found = [(column, match[2]) for column in plain if (match := _EDGE.fullmatch(column))]
    if {axis for _, axis in found} == {"x", "y"}:
        return [column for column, _ in found]
    if {"x", "y"} <= set(plain) and ({"w", "h"} <= set(plain) or {"width", "height"} <= set(plain)):
        return ["x", "y"]
    return next((list(columns) for columns in _BOXES if set(columns) <= set(plain)), [])


def _check_unused(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    name: str,
    roles: Mapping[Role, int],
    columns: Columns,
) -> list[str]:
    """Return the names of columns that are not used.

    Raises:
        DataError: one may hold splits or groups, by its name and by values that repeat, no other
            column does, and nobody has said that it does not.
    """
    unused = [place for place in range(len(header)) if place not in roles.values()]
    for role, pattern in _MAY_BE.items():
        if role in roles or role in columns:
            continue
        for place in unused:
            column = header[place]
            if not pattern.fullmatch(_plain(column)):
                continue
            values = {row[place].strip() for row in rows} - {""}
            if 1 < len(values) < len(rows):
                is_readable = role == "group" or _flagged(column, name)
                words = "" if is_readable else " with the words train, validation and test in it"
                raise DataError(
                    f"{name} has the column {column!r}, which is called as if it held {role}s "
                    f"(values {some(sorted(values))}) and is not used. Say what it is: "
                    f"ingest.columns: {{{role}: {column}}}{words}, or that it is none: "
                    f"ingest.columns: {{{role}: null}}."
                )
    return [header[place] for place in unused if header[place]]


def _one_hot_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], roles: Mapping[Role, int]
) -> list[int]:
    """Return the columns that hold nothing but 0 and 1, if there are several and no others."""
    rest = [place for place in range(len(header)) if place not in roles.values()]
    are_flags = all(row[place].strip() in _FLAGS for row in rows for place in rest)
    return rest if rows and len(rest) > 1 and are_flags else []


_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "False": False, "True": True}


def _of_one_hot(
    header: Sequence[str], rows: Sequence[Sequence[str]], roles: Mapping[Role, int], name: str
) -> list[str]:
    """Return the label of each row: the column that holds its only 1.

    Raises:
        DataError: a row has several, or none.
    """
    places = _one_hot_columns(header, rows, roles)
    labels = []
    for number, row in enumerate(rows, start=1):
        marked = [header[place] for place in places if _FLAGS[row[place].strip()]]
        if len(marked) != 1:
            raise DataError(
                f"row {number} of {name} marks {len(marked)} classes ({', '.join(marked) or '-'}); "
                f"expected a single 1 in each row: one label an image."
            )
        labels.append(marked[0])
    return labels
