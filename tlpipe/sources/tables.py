"""Read labels from a table: CSV or Parquet, ``path,label[,split][,group]``."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from tlpipe.errors import DataError, ImageError
from tlpipe.sources.candidates import Candidate, Reject, given_split
from tlpipe.sources.storage import Storage

_COLUMNS = ("path", "label", "split", "group")


def is_table(storage: Storage, name: str) -> bool:
    """Return whether a file is a table with paths and labels."""
    return name.lower().endswith((".csv", ".parquet")) and {"path", "label"} <= set(
        _columns(storage, name)
    )


def read_table(storage: Storage, tables: Sequence[str], rejects: list[Reject]) -> list[Candidate]:
    """Read ``path,label[,split][,group]``; paths are relative to the table, other columns unused.

    Raises:
        DataError: there are several tables, or a split is no known word.
    """
    if len(tables) > 1:
        raise DataError(
            f"the source holds {len(tables)} tables with path and label: {', '.join(tables)}; "
            f"expected one. Put a column split into one table, or move the others elsewhere."
        )
    candidates = []
    seen: dict[str, str] = {}
    for number, row in enumerate(_rows(storage, tables[0]), start=1):
        name, label = PurePosixPath(row["path"]).as_posix(), row["label"].strip()
        if not row["path"] or not label:
            reason = f"row {number} of {tables[0]} has no {'label' if row['path'] else 'path'}"
            rejects.append(Reject(name if row["path"] else f"row {number}", "no_label", reason))
            continue
        split = given_split(row.get("split", ""))
        if row.get("split", "").strip() and not split:
            raise DataError(
                f"row {number} of {tables[0]} has the split {row['split']!r}; expected train, "
                f"validation, test or nothing. Change it in the table."
            )
        if name in seen:
            both = f"row {number} of {tables[0]} names it again"
            reason = "repeated" if seen[name] == label else "conflict"
            rejects.append(Reject(name, reason, f"{both}, under {label}; before, {seen[name]}"))
            continue
        seen[name] = label
        group = row.get("group", "").strip()
        candidates.append(Candidate(name=name, file=name, label=label, split=split, group=group))
    in_conflict = {reject.path for reject in rejects if reject.reason == "conflict"}
    return [candidate for candidate in candidates if candidate.name not in in_conflict]


def _columns(storage: Storage, name: str) -> list[str]:
    try:
        if name.lower().endswith(".parquet"):
            from pyarrow import parquet

            return list(parquet.ParquetFile(io.BytesIO(storage.read(name))).schema_arrow.names)
        first = storage.read(name).decode("utf-8-sig").split("\n", 1)[0]
        return next(csv.reader([first.rstrip("\r")]), [])
    except (ValueError, OSError, csv.Error, ImageError):
        return []


def _rows(storage: Storage, name: str) -> Iterable[Mapping[str, Any]]:
    data = storage.read(name)
    if name.lower().endswith(".parquet"):
        from pyarrow import parquet

        table = parquet.read_table(io.BytesIO(data))
        wanted = [column for column in _COLUMNS if column in table.column_names]
        for row in table.select(wanted).to_pylist():
            yield {key: "" if value is None else str(value) for key, value in row.items()}
        return
    text = io.StringIO(data.decode("utf-8-sig", errors="surrogateescape"), newline="")
    for row in csv.DictReader(text):
        yield {key: value or "" for key, value in row.items() if isinstance(key, str)}
