"""What Git and DVC know of a workspace: commit, stages, the version of the data, what DVC hides.

DVC is imported here and in ``graph``, which asks it for the graph.
"""

import getpass
import hashlib
import json
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import yaml

from tlpipe import files, graph
from tlpipe.errors import DataError
from tlpipe.sources.storage import attempt

CONSTRAINTS = "constraints.txt"
# What a bundle is made by; ``audit`` only looks, and later stages only judge.
_BEFORE_EXPORT = ("ingest", "split", "embed", "train")
# Written by each run. What ``split`` appends is committed later; split_sha256 of the bundle and the
# run's own split table say what counts of it, and rows of images that are gone do not.
PLACEMENTS = "splits.csv"
_IGNORE = ".dvcignore"
_BEGIN = "# DVC cannot read these files; 'tlpipe check --hide' writes this part and takes it back."
_END = "# End of the part that 'tlpipe check --hide' writes."


def dvc_root(folder: Path) -> Path | None:
    """Return the folder of the DVC repository that a folder lies in, without links, as DVC does.

    A project may lie below it: several share one repository. None: it lies in none.
    """
    here = folder.resolve()
    for path in (here, *here.parents):
        if (path / ".dvc").is_dir():
            return path
        if path.is_mount():
            break
    return None


def data_version(workspace: Path) -> str:
    """Return DVC's hash of what ``ingest`` reads, as ``dvc.lock`` will state it.

    Where it reads more than the source, as decisions, it is the SHA-256 of all their hashes. It is
    empty outside a DVC repository, and where DVC is not installed.

    Raises:
        DataError: there is a repository, and DVC cannot tell.
        StoreError: the store that the source lies in fails.
    """
    try:
        from dvc.dependency import ParamsDependency
        from dvc.exceptions import DvcException, NotDvcRepoError
        from dvc.repo import Repo
    except ImportError:
        return ""

    def ask() -> str:
        with Repo(str(workspace)) as repo:
            deps = repo.stage.load_one(str(workspace / "dvc.yaml"), "ingest").deps
            source, *others = (one for one in deps if not isinstance(one, ParamsDependency))
            found = [str(source.get_hash().value or "")]
            for one in others:
                with suppress(FileNotFoundError):  # ingest says what it is, and stops
                    found.append(str(one.get_hash().value or ""))
            digest = hashlib.sha256("\n".join(found).encode()).hexdigest()
            return digest if others else found[0]

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


def check_hidden(workspace: Path, *sources: Path, hide: bool = False) -> None:
    """Compare what DVC cannot read of the sources with what ``.dvcignore`` hides from it.

    DVC hashes the source before ``ingest`` may look at it: it would wait for a pipe for ever, and
    fail at a socket, at a link that leads nowhere or at a file without permission. ``ingest`` still
    rejects each with its reason. A file that can be read again must not stay hidden, since DVC
    would not see it change.

    ``hide``: write the difference into ``.dvcignore``, in a part of its own.

    Raises:
        DataError: they differ and ``hide`` is not set, or ``.dvcignore`` cannot name a file.
    """
    if dvc_root(workspace) is None:
        return
    root = workspace.resolve()
    own, hidden = _read_ignored(workspace)
    found: dict[str, str] = {}
    unreadable: list[tuple[Path, str]] = []
    for source in filter(Path.is_dir, sources):
        unreadable += attempt(partial(_all_unreadable, source), str(source))
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


def _all_unreadable(source: Path) -> list[tuple[Path, str]]:
    return list(_unreadable(source))


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


NO_COMMIT = "a repository without a commit"  # in place of the commit that something was made from


def describe(workspace: Path) -> dict[str, str]:
    """Return tags for what is known of the workspace: its commit, where that is, its dvc.lock."""
    tags = {}
    if commit := _git(workspace, "rev-parse", "HEAD"):
        tags["tlpipe.git_commit"] = tags["mlflow.source.git.commit"] = commit
        tags["tlpipe.git_changed"] = "true" if _has_changes(workspace) else "false"
    if remote := origin_of(workspace):
        tags["tlpipe.git_remote"] = tags["mlflow.source.git.repoURL"] = without_credentials(remote)
    if folder := _git(workspace, "rev-parse", "--show-prefix"):
        tags["tlpipe.git_folder"] = folder
    lock = workspace / "dvc.lock"
    if lock.is_file():
        tags["tlpipe.dvc_lock_sha256"] = lock_sha256(lock)
    return tags


def other_versions(workspace: Path) -> str:
    """Say which installed packages have other versions than ``constraints.txt`` pins, if any have.

    Packages that are not installed are left out: which are needed depends on what is run.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    path, found = workspace / CONSTRAINTS, []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:  # pip-compile and uv add comments and hashes
            pinned = Requirement(re.sub(r"(^|\s)#.*|\s--hash\S*|\\$", "", line).strip())
        except InvalidRequirement:
            continue
        if pinned.marker is not None and not pinned.marker.evaluate():
            continue
        with suppress(metadata.PackageNotFoundError):
            installed = metadata.version(pinned.name)
            if not pinned.specifier.contains(installed, prereleases=True):
                found.append(f"{pinned.name} {installed} ({pinned.specifier})")
    if not found:
        return ""
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return (
        f"{len(found)} packages are not what {path} pins: {shown}. Other versions may give other "
        f"results. Install the pinned ones: 'make setup', or pip with -c {CONSTRAINTS}."
    )


def of_inputs(workspace: Path) -> dict[str, str]:
    """Return what a bundle says of its origin: the commit, and the hash of all it is made by."""
    commit = _git(workspace, "rev-parse", "HEAD") or ""
    lock = workspace / "dvc.lock"
    if not commit and _git(workspace, "rev-parse", "--git-dir"):
        commit = NO_COMMIT
    elif commit and _has_changes(workspace):
        commit = f"{commit} with uncommitted changes"
    return {
        "git_commit": commit,
        "dvc_lock_sha256": _digest(lock, _BEFORE_EXPORT) if lock.is_file() else "",
    }


def is_commit(text: str) -> bool:
    """Return whether a text is the full name of a commit, and says nothing of changes."""
    return re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def repository_with(workspace: Path, commit: str) -> str:
    """Return the top folder of the workspace's repository if it has a commit, or nothing."""
    if _git(workspace, "cat-file", "-t", commit) != "commit":
        return ""
    return _git(workspace, "rev-parse", "--show-toplevel") or ""


def origin_of(workspace: Path) -> str:
    """Return the address of the workspace's remote ``origin``, or nothing."""
    return _git(workspace, "remote", "get-url", "origin") or ""


def user() -> str:
    """Return who runs this; in a container, it may be somebody without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def without_credentials(address: str) -> str:
    """Return an address, or a text with addresses, without user names and passwords in them."""
    return re.sub(r"//[^/@\s]*@", "//", address)


def lock_sha256(lock: Path) -> str:
    """Return the hash of what ``dvc.lock`` says of every stage before ``register``.

    DVC writes the entry of ``register`` after the stage has ended, so it cannot be part of it.
    """
    return _digest(lock, [name for name in _stages(lock) if name != "register"])


def _digest(lock: Path, names: Iterable[str]) -> str:
    stages = {name: entry for name, entry in _stages(lock).items() if name in names}
    for name, entry in stages.items():
        outs = [out for out in entry.get("outs", ()) if out["path"] != PLACEMENTS]
        stages[name] = {**entry, "outs": outs}
    return hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()


def _stages(lock: Path) -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    return stages


def _has_changes(workspace: Path) -> bool:
    """Return whether a file is not as committed, but for what every run may change.

    That is ``dvc.lock``, and rows that ``split`` has appended to its table. Of files that were
    never committed, those count that a run goes by. Where Git does not answer, nothing is known to
    be as committed.
    """
    status = ("status", "--porcelain", "--untracked-files=no")
    changed = _git(workspace, *status, "--", ".", ":!dvc.lock", f":!{PLACEMENTS}")
    rows = _git(workspace, "diff", "--numstat", "HEAD", "--", PLACEMENTS)  # added, taken away, name
    if changed is None or rows is None:
        return True
    return bool(changed) or (bool(rows) and rows.split()[1] != "0") or _has_uncommitted(workspace)


def _has_uncommitted(workspace: Path) -> bool:
    """Return whether Git does not know a file that a run goes by, and DVC neither.

    That is what DVC reads the graph from, and files of the project that stages read and no stage
    writes. The folders of a source are DVC's to know.
    """
    folder = workspace.absolute()
    names = {graph.PARAMS, graph.FILE, graph.LOCK}
    if (lock := workspace / "dvc.lock").is_file():
        stages = _stages(lock).values()
        written = [PurePath(out["path"]) for stage in stages for out in stage.get("outs", ())]
        reads = {read["path"] for stage in stages for read in stage.get("deps", ())}
        # What is read may lie in a folder that was written.
        names |= {name for name in reads if not any(map(PurePath(name).is_relative_to, written))}
    paths = (Path(os.path.normpath(folder / name)) for name in names)
    known = {path for path in paths if path.is_relative_to(folder) and path.is_file()}
    committed = _git(folder, "ls-files", "-z", "--", *map(str, known))
    if committed is None:
        return True
    unknown = known - {folder / name for name in committed.split("\0")}
    return not all(_is_of_dvc(path, folder) for path in unknown)


def _is_of_dvc(path: Path, folder: Path) -> bool:
    """Return whether a file in the folder, or what it lies in, was added to DVC."""
    inside = path.relative_to(folder)
    added = (inside, *inside.parents[:-1])
    return any((folder / f"{name}.dvc").is_file() for name in added)


def _git(workspace: Path, *arguments: str) -> str | None:
    """Return what Git says; None where it fails, takes too long or is not there."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=workspace, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
