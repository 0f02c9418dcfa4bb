"""What DVC knows of source and stages, and what it must not see. DVC is imported here alone."""

import os
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from tlpipe import files
from tlpipe.errors import DataError
from tlpipe.params import read_yaml
from tlpipe.retries import attempt

_IGNORE = ".dvcignore"
_BEGIN = "# DVC cannot read these files; 'tlpipe check --hide' writes this part and takes it back."
_END = "# End of the part that 'tlpipe check --hide' writes."


def stage_paths(stage: str, workspace: Path) -> dict[str, Path]:
    """Return the paths that ``dvc.yaml`` gives to a stage, by the names of its options."""
    command = shlex.split(read_yaml(workspace / "dvc.yaml")["stages"][stage]["cmd"])
    options = zip(command[2::2], command[3::2], strict=True)
    return {name.removeprefix("--").replace("-", "_"): workspace / path for name, path in options}


def data_version(workspace: Path) -> str:
    """Return DVC's hash of what ``ingest`` reads, as ``dvc.lock`` will state it.

    It is empty outside a DVC repository, and where DVC is not installed.

    Raises:
        DataError: there is a repository, and DVC cannot tell.
        StoreError: the store that the source lies in fails.
    """
    try:
        from dvc.exceptions import DvcException, NotDvcRepoError
        from dvc.repo import Repo
    except ImportError:
        return ""

    def ask() -> str:
        with Repo(str(workspace)) as repo:
            source = repo.stage.load_one(str(workspace / "dvc.yaml"), "ingest").deps[0]
            return str(source.get_hash().value or "")

    answers = DvcException, FileNotFoundError, UnicodeEncodeError
    try:
        # A source in a store is listed for it: see sources.remote.
        return attempt(
            ask,
            "DVC's hash of the source",
            failures=(Exception,),
            but=lambda error: isinstance(error, answers),
        )
    except NotDvcRepoError:
        return ""
    except FileNotFoundError as error:
        raise DataError(
            f"ingest.source is not there, so DVC cannot tell its version: {error}. Check "
            f"ingest.source in params.yaml; what DVC tracks comes with 'dvc pull'."
        ) from None
    except UnicodeEncodeError as error:
        raise DataError(
            f"{error.object!r} has a name that is not UTF-8, so DVC cannot tell the version of "
            f"ingest.source. Rename it."
        ) from None
    except DvcException as error:
        raise DataError(
            f"DVC cannot tell the version of ingest.source: {type(error).__name__}: "
            f"{str(error) or '-'}. Without it nobody could say later what a model was trained on. "
            f"'dvc status ingest' shows more; repair what it names, then run again."
        ) from None


def check_hidden(workspace: Path, source: Path, *, hide: bool = False) -> None:
    """Compare what DVC cannot read of the source with what ``.dvcignore`` hides from it.

    DVC hashes the source before ``ingest`` may look at it: it would wait for a pipe for ever, and
    fail at a socket, at a link that leads nowhere or at a file without permission. ``ingest`` still
    rejects each with its reason. A file that can be read again must not stay hidden, since DVC
    would not see it change.

    ``hide``: write the difference into ``.dvcignore``, in a part of its own.

    Raises:
        DataError: they differ and ``hide`` is not set, or ``.dvcignore`` cannot name a file.
    """
    if not (workspace / ".dvc").is_dir():
        return
    root = workspace.resolve()
    own, hidden = _read_ignored(workspace)
    found: dict[str, str] = {}
    unreadable = attempt(lambda: list(_unreadable(source)), str(source)) if source.is_dir() else []
    for path, what in unreadable:
        place = path.parent.resolve() / path.name
        if not place.is_relative_to(root) or not str(path).isprintable():
            raise DataError(
                f"{str(path)!r} is {what}, which DVC cannot read, and {_IGNORE} cannot name it: it "
                f"lies outside the workspace, or its name is not printable. Rename or remove it."
            )
        found["/" + _escaped(place.relative_to(root).as_posix())] = f"{path} is {what}"
    if hide:
        if hidden != list(found):
            part = [_BEGIN, *found, _END] if found else []
            files.write_bytes(
                workspace / _IGNORE, "".join(f"{line}\n" for line in [*own, *part]).encode()
            )
        return
    if missing := [said for line, said in found.items() if line not in {*own, *hidden}]:
        raise DataError(
            f"{missing[0]}, which DVC cannot read, and so are {len(missing) - 1} more; expected "
            f"files. Remove them, or hide them from DVC: 'tlpipe check --hide' names them in "
            f"{_IGNORE}, and ingest rejects each with its reason."
        )
    if again := [line for line in hidden if line not in found]:
        raise DataError(
            f"{_IGNORE} hides {again[0]} and {len(again) - 1} more files that can be read now; "
            f"DVC would not see them change. 'tlpipe check --hide' takes them out."
        )


def readable_but_hidden(workspace: Path) -> list[str]:
    """Return the files that ``check_hidden`` has hidden from DVC and that can be read by now."""
    _, hidden = _read_ignored(workspace)
    paths = [workspace / re.sub(r"\\(.)", r"\1", line[1:]) for line in hidden]
    return [str(path) for path in paths if os.path.lexists(path) and not _why_unreadable(path)]


def _read_ignored(workspace: Path) -> tuple[list[str], list[str]]:
    """Return the lines of ``.dvcignore`` that are the user's, and those of our part of it."""
    path = workspace / _IGNORE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if _BEGIN not in lines:
        return lines, []
    start = lines.index(_BEGIN)
    stop = lines.index(_END, start) if _END in lines[start:] else len(lines)
    return lines[:start] + lines[stop + 1 :], lines[start + 1 : stop]


def _unreadable(source: Path) -> Iterator[tuple[Path, str]]:
    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(source, onerror=fail):
        for name in sorted(names):
            if what := _why_unreadable(Path(folder, name)):
                yield Path(folder, name), what
        subfolders.sort()


def _why_unreadable(path: Path) -> str:
    """Return what keeps DVC from reading a file, or nothing."""
    try:
        str(path).encode()
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        return "a file whose name is not UTF-8"
    except OSError:
        return "a link that leads nowhere"
    if not stat.S_ISREG(mode):
        return "a pipe, a socket or a device"
    return "" if os.access(path, os.R_OK) else "a file without read permission"


def _escaped(path: str) -> str:
    """Return a path as a pattern of ``.gitignore`` that matches nothing else."""
    return "".join(f"\\{c}" if c in "\\*?[]!# " else c for c in path)
