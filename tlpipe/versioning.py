"""What DVC knows of source and stages, and what it must not see. DVC is imported here alone."""

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from tlpipe import files
from tlpipe.errors import DataError
from tlpipe.params import read_yaml

_IGNORE = ".dvcignore"


def stage_paths(stage: str, workspace: Path) -> dict[str, Path]:
    """Return the paths that ``dvc.yaml`` gives to a stage, by the names of its options."""
    command = shlex.split(read_yaml(workspace / "dvc.yaml")["stages"][stage]["cmd"])
    options = zip(command[2::2], command[3::2], strict=True)
    return {name.removeprefix("--").replace("-", "_"): workspace / path for name, path in options}


def data_version(workspace: Path) -> str:
    """Return DVC's hash of what ``ingest`` reads, as ``dvc.lock`` will state it.

    It is empty outside a DVC repository, and where DVC is not installed.
    """
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
    except ImportError:
        return ""
    try:
        with Repo(str(workspace)) as repo:
            source = repo.stage.load_one("dvc.yaml", "ingest").deps[0]
            return str(source.get_hash().value or "")
    except DvcException:
        return ""


def hide_unreadable(workspace: Path, source: Path) -> list[str]:
    """Name in ``.dvcignore`` what DVC cannot read of the source; return what was named.

    DVC hashes the source before ``ingest`` may look at it: it would wait for a pipe for ever, and
    fail at a socket, at a link that leads nowhere or at a file without permission. ``ingest`` still
    reports each.

    Raises:
        DataError: there is such a file, and ``.dvcignore`` cannot name it.
    """
    if not (workspace / ".dvc").is_dir():
        return []
    root = workspace.resolve()
    ignore = workspace / _IGNORE
    known = ignore.read_text(encoding="utf-8").splitlines() if ignore.exists() else []
    found = []
    for path, what in _unreadable(source):
        place = path.parent.resolve() / path.name
        if not place.is_relative_to(root) or not str(path).isprintable():
            raise DataError(
                f"{str(path)!r} is {what}, which DVC cannot read, and {_IGNORE} cannot name it: it "
                f"lies outside the workspace or has control characters. Remove it."
            )
        found.append("/" + _escaped(place.relative_to(root).as_posix()))
    if new := [line for line in found if line not in known]:
        files.write_bytes(ignore, "".join(f"{line}\n" for line in [*known, *new]).encode())
    return new


def _unreadable(source: Path) -> Iterator[tuple[Path, str]]:
    for folder, subfolders, names in os.walk(source):
        for name in sorted(names):
            path = Path(folder, name)
            try:
                mode = path.stat().st_mode
            except OSError:
                yield path, "a link that leads nowhere"
                continue
            if not stat.S_ISREG(mode):
                yield path, "a pipe, a socket or a device"
            elif not os.access(path, os.R_OK):
                yield path, "a file without read permission"
        subfolders.sort()


def _escaped(path: str) -> str:
    """Return a path as a pattern of ``.gitignore`` that matches nothing else."""
    return "".join(f"\\{c}" if c in "\\*?[]!# " else c for c in path)
