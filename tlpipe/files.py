"""Write files so that nothing half-written looks finished, and equal content gives equal bytes.

Locks are the system's own: ``filelock`` opens what it locks to write, and here a scratch folder is
its own lock; nor would it say which process holds a lock, which ``locked`` writes into its file.
"""

import csv
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from tlpipe.errors import ArtifactError, TrainingError

if TYPE_CHECKING:
    import _csv

_NEW, _OLD, _HALF = "new", "old-", "half"


def _host_id() -> str:
    """Return 12 hexadecimal digits that tell this host, as it was started this time, from others.

    Containers on one machine share its boot id but not its name; hosts that share a name, as
    "localhost", have other boot ids.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")  # Linux; elsewhere the name has to do
    boot_id = boot.read_text() if boot.exists() else ""
    return hashlib.sha256(f"{socket.gethostname()}\n{boot_id}".encode()).hexdigest()[:12]


HOST_ID = _host_id()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it into place."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it into place."""
    with _scratch(path) as scratch:
        temporary = scratch / path.name
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success rename it into place whole.

    The folder that stood there before is kept until the new one is complete and on disk. Of several
    writers at once each has a temporary folder of its own; the last one to finish stands.
    """
    with _scratch(path) as scratch:
        new = scratch / _NEW
        new.mkdir()
        yield new
        flush_folder(new)
        for attempt in count():
            # A kill between these two lines leaves both folders: see finish_folder.
            old = scratch / f"{_OLD}{attempt}"
            with suppress(FileNotFoundError):
                path.rename(old)
            try:
                new.rename(path)
                break
            except FileNotFoundError:  # finish_folder of another process was faster
                if not scratch.exists():
                    raise
                if attempt:  # then the new folder may be the one that was moved away above
                    with suppress(OSError):
                        old.rename(path)
                break
            except OSError as error:  # another writer was faster: its folder has to make room
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        _flush(path.parent)


def finish_folder(path: Path) -> None:
    """Put the complete new folder of a killed writer into place; remove nothing.

    A process that was killed between moving the old folder away and the new one into place leaves
    nothing at ``path``, but the complete new folder beside it. This is safe even if the writer is
    alive on another host: a writer that finds its folder in place already is done.
    """
    for scratch in _scratches(path):
        _finish(path, scratch)


def recover_folder(path: Path) -> None:
    """Finish what killed writers began, then remove what those of this host and boot left.

    A writer holds a lock on its scratch folder as long as it lives, but a lock on a folder is known
    to its own kernel only: on NFS it looks free from every other host. So what another host, or
    this one before it was started again, left beside ``path`` is never removed.
    """
    finish_folder(path)
    for scratch in _scratches(path, HOST_ID):
        with suppress(OSError):
            descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path, scratch)
            finally:
                os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush a folder with all that is in it to disk; files with a second name were flushed."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() or (path.is_file() and path.stat().st_nlink == 1):
            _flush(path)


def check_writable(folder: Path) -> None:
    """Make a file's place in a folder and take it away again.

    Raises:
        OSError: it cannot be made.
    """
    with _scratch(folder / "check"):
        pass


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keep others out until the block ends, or the process does: the lock is the system's.

    Raises:
        TrainingError: another process is inside; it is named.
    """

    def error(process: str) -> TrainingError:
        return TrainingError(
            f"{what} runs in {path.parent} already, as process {process or '?'}; expected one at a "
            f"time. Wait for it, or stop it."
        )

    with exclusive(path, error):
        yield


@contextmanager
def exclusive(path: Path, error: Callable[[str], Exception]) -> Iterator[int]:
    """Hold a lock until the last process that has its file descriptor ends; yield that.

    ``error``: gets the number of the process that holds it, as text, and returns what is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise error(file.read().strip()) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until nobody else is inside of such a block for this path, of any process or thread."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("a")
    except PermissionError:
        if not path.exists():
            raise
        file = path.open()  # another user's
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, two spaces of indent and a final newline."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """Return the canonical JSON of ``content``: sorted keys, UTF-8, no NaN, a final newline."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # Names of files may hold bytes that are no UTF-8; as escapes they survive the way back.
    return (text + "\n").encode(errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing; the stage that writes it has not run. Run 'tlpipe run'."
        ) from None
    except (ValueError, OSError) as error:
        raise ArtifactError(
            f"{path} cannot be read as JSON ({error}). Run its stage again: {again(path)}."
        ) from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def again(path: Path) -> str:
    """Say how to run the stage again that writes a file, and no other one."""
    *_, stage = re.findall(r"(?:^|/)artifacts/(\w+)/", path.as_posix()) or ["STAGE"]
    return f"'dvc repro --force --single-item {stage}'"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table (RFC 4180, UTF-8), row by row."""
    with replacing(path) as temporary, open_csv(temporary, "w") as file:
        writer = csv_writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path, header: Sequence[str]) -> Iterator[list[str]]:
    """Return the rows of a CSV table that has exactly the columns ``header``; read one by one.

    Raises:
        ArtifactError: the file is missing or has other columns; or, while they are read, a row has.
    """
    try:
        file = open_csv(path, "r")
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing; the stage that writes it has not run. Run 'tlpipe run'."
        ) from None
    reader = csv.reader(file)
    if (found := next(reader, [])) != list(header):
        file.close()
        raise ArtifactError(f"{path} has the columns {found}; expected {list(header)}.")
    return _rows(path, file, reader, header)


def count_rows(path: Path) -> int:
    """Return how many rows a CSV table has, its header left out."""
    with open_csv(path, "r") as file:
        return max(0, sum(1 for _ in csv.reader(file)) - 1)


def open_csv(path: Path, mode: Literal["r", "w"]) -> TextIO:
    """Open a table's file; names of files may hold bytes that are no UTF-8."""
    return cast(TextIO, path.open(mode, newline="", encoding="utf-8", errors="surrogateescape"))


def csv_writer(file: TextIO) -> "_csv.Writer":
    """Return a writer of rows."""
    # With this line end both of its characters are quoted inside a field.
    return csv.writer(file, lineterminator="\r\n")


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Let a second name stand for a file; copy it where links cannot be made."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def copy_folder(
    source: Path, target: Path, copy: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """Copy the files of a folder, at any depth, into another one, which may be there.

    ``shutil.copytree`` says what failed in an error of its own, of which nobody can tell a full
    disk from a bug.

    ``copy``: what makes one file of another, such as ``link_or_copy``.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            copy(path, place)


def cache_folder(name: str) -> Path:
    """Return a program's folder in this user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name


def kept(place: str, key: str) -> dict[str, Any]:
    """Return what ``keep`` wrote in this place of the user's cache, for this key; else nothing.

    It can be made anew: no home folder, no file, another key and a damaged file are all the same.
    """
    with suppress(ArtifactError, KeyError, RuntimeError):
        found = read_json(cache_folder("tlpipe") / place)
        if found["key"] == key and isinstance(found["content"], dict):
            return dict(found["content"])
    return {}


def keep(place: str, key: str, content: Mapping[str, Any]) -> None:
    """Write for ``kept``; a cache that cannot be written is done without."""
    with suppress(OSError, RuntimeError):
        write_json(cache_folder("tlpipe") / place, {"key": key, "content": content})


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Name the user's cache, and what to do, where it cannot be written.

    Raises:
        ArtifactError: it is read-only, full, or cannot be made.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"the cache {folder} cannot be written: {error.strerror}; expected a folder with room "
            f"for pretrained networks. Set XDG_CACHE_HOME to one."
        ) from None


def _rows(
    path: Path, file: TextIO, reader: Iterable[list[str]], header: Sequence[str]
) -> Iterator[list[str]]:
    with file:
        for number, row in enumerate(reader, start=1):
            if len(row) != len(header):
                raise ArtifactError(
                    f"row {number} of {path} has {len(row)} columns; expected {len(header)}. "
                    f"Run its stage again: {again(path)}."
                )
            yield row


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that nobody else uses; remove it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    scratch, descriptor = _claim(path)
    try:
        yield scratch
    finally:
        _remove(path, scratch)
        os.close(descriptor)


def _claim(path: Path) -> tuple[Path, int]:
    """Make a folder beside ``path`` and lock it: so this host knows that its process lives."""
    while True:
        # Not by tempfile: that would keep what is written from everybody but this user.
        scratch = path.with_name(f".{path.name}.{HOST_ID}-{secrets.token_hex(8)}.partial")
        scratch.mkdir()
        try:
            descriptor = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:
            continue  # somebody took it for left behind before it was locked
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # somebody is about to remove it
        except OSError:
            # No locks in this file system: no other process of this host gets one to remove it.
            return scratch, descriptor
        else:
            if scratch.exists():
                return scratch, descriptor
        os.close(descriptor)


def _scratches(path: Path, host_id: str = "[0-9a-f]{12}") -> list[Path]:
    """Return the scratch folders beside ``path``, of all hosts or of one."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{host_id}-[0-9a-f]{{16}}\.partial")
    return [path.with_name(name) for name in _names(path.parent) if pattern.fullmatch(name)]


def _finish(path: Path, scratch: Path) -> None:
    """Rename the new folder into place if it is complete: the old one was moved away for it."""
    was_moved_away = any(name.startswith(_OLD) for name in _names(scratch))
    with suppress(OSError):
        if was_moved_away and not path.exists():
            (scratch / _NEW).rename(path)


def _remove(path: Path, scratch: Path) -> None:
    """Remove a scratch folder, but not the only complete folder that there is."""
    _finish(path, scratch)
    with suppress(OSError):  # finish_folder must not find it while it is being removed
        (scratch / _NEW).rename(scratch / _HALF)
    shutil.rmtree(scratch, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:  # there is none, or none that can be read: who opens it says so
        return []


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
