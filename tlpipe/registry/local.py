"""The registry of a project's folder: MLflow's SQLite database, with the artifacts beside it.

MLflow keeps absolute locations of artifacts in its database. A folder that was moved, copied or
mounted elsewhere would go on reading and writing the place that it had before. So whoever opens the
database compares, and rewrites all locations in one transaction where they are of another folder.
"""

import errno
import fcntl
import logging
import os
import random
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from tlpipe import files, graph
from tlpipe.errors import RegistryError
from tlpipe.versioning import dvc_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
# DVC alone would say that nothing has changed: it does not see the registry.
REGISTER = "Register what was built: 'dvc repro --force --single-item register'."
MAKE = "'tlpipe run' makes one here; MLFLOW_TRACKING_URI names a shared registry."
# Where DVC runs the experiments of --temp and --queue, below the project that they come from.
_EXPERIMENTS = (".dvc", "tmp", "exps")
# Where MLflow keeps locations: table, column, which rows. A test looks for others.
_LOCATIONS = (
    ("experiments", "artifact_location", ""),
    ("runs", "artifact_uri", ""),
    ("logged_models", "artifact_location", ""),
    ("model_versions", "source", ""),
    ("model_versions", "storage_location", ""),
    ("trace_tags", "value", "WHERE key = 'mlflow.artifactLocation'"),
)
_CANNOT_BE_WRITTEN = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_PATIENCE_S = 30  # so long somebody else may hold the database


def project(workspace: Path) -> Path:
    """Return the folder whose registry a workspace uses, without links.

    It is the workspace itself, but for an experiment that DVC runs in a temporary folder: there it
    is the same folder of the project that the experiment comes from.
    """
    folder = workspace.resolve()
    for root in folder.parents:
        if root.parts[-3:] == _EXPERIMENTS:
            # Where one repository holds several projects, .dvc may lie above: here as there.
            return root.parents[2] / folder.relative_to(dvc_root(folder) or folder)
    return folder


def database(workspace: Path) -> Path:
    """Return the file of a workspace's registry, which need not exist, without links.

    A link to the database of another folder makes that folder's registry this one's, too.
    """
    return (project(workspace) / DATABASE).resolve()


def artifacts(workspace: Path) -> str:
    """Return the location of what a workspace registers, as MLflow writes it."""
    return database(workspace).with_name(ARTIFACTS).as_uri()


def address(workspace: Path) -> str:
    """Return the address of a workspace's registry, as MLflow takes it."""
    return f"sqlite:///{database(workspace)}?timeout={_PATIENCE_S}"


def state(workspace: Path) -> str | None:
    """Return what any write to the workspace's database changes; None where that is not known.

    SQLite counts its transactions in the file's header (its file format, section 1.3.7), but those
    that lie in a file beside it as yet.
    """
    path = database(workspace)
    if any(path.with_name(f"{path.name}-{beside}").exists() for beside in ("wal", "journal")):
        return None
    try:
        with path.open("rb") as file:
            about, header = os.fstat(file.fileno()), file.read(100)
    except OSError:
        return None
    times = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    return f"{times} {header[24:28].hex()}"


def is_own(workspace: Path, address: str) -> bool:
    """Return whether an address is that of a workspace's registry, however it is written."""
    scheme, _, path = address.partition(":///")
    own = {(workspace / DATABASE).resolve(), database(workspace)}
    return scheme == "sqlite" and Path(path.partition("?")[0]).resolve() in own


def command(client: "MlflowClient", *words: str) -> str:
    """Return a command line for a message, with the registry's address where nobody has set it."""
    where, line = client.tracking_uri, shlex.join(words)
    if not where.startswith("sqlite"):
        return line
    return f"MLFLOW_TRACKING_URI={shlex.quote(where.partition('?')[0])} {line}"


def create(workspace: Path) -> None:
    """Make MLflow's tables under a temporary name: a kill between two of them would be for good.

    Raises:
        RegistryError: there is no folder for it.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = database(workspace)
    if not (home := path.parent).is_dir():
        link = project(workspace) / DATABASE
        if link.is_symlink():
            raise RegistryError(f"{link} leads to {path}, whose folder is missing. Mount it.")
        raise RegistryError(
            f"{workspace.resolve()} is a temporary folder of 'dvc exp run', and there is no {home} "
            f"in the project that it comes from, to register in. Make it, or set "
            f"MLFLOW_TRACKING_URI."
        )
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return  # somebody was faster, and may have registered already
        with files.replacing(path) as temporary:
            temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)
            # A client would give MLflow's default experiment a place below the current folder.
            SqlAlchemyStore(f"sqlite:///{temporary}", str(home / ARTIFACTS))
    finally:
        os.close(descriptor)


@contextmanager
def opened(workspace: Path, *, to_write: bool = False) -> Iterator[str]:
    """Yield the address of the registry that is there, once all its locations are of its folder.

    As long as it is open, nobody who sees the folder under another path rewrites them. Where the
    database cannot be written, the address is that of a temporary copy, which cannot be either.

    Raises:
        RegistryError: there is none, artifacts were left behind, others use it under another path,
            or it is no database, or it shall be written and cannot be.
    """
    path = database(workspace)
    if not path.exists():
        was_built = (project(workspace) / graph.PATHS["receipt"]).exists()
        raise RegistryError(
            f"there is no registry yet: {path} is missing and MLFLOW_TRACKING_URI is not set. "
            f"{REGISTER if was_built else MAKE}"
        )
    with _lock(path) as lock, TemporaryDirectory(prefix="tlpipe-") as name:
        copy = Path(name, path.name)
        try:
            if _settle(path, lock):
                named = address(workspace)
            elif to_write:
                raise RegistryError(
                    f"{path} was made in another folder, so its locations must be rewritten, and "
                    f"it cannot be written. Mount it so that it can be, or set MLFLOW_TRACKING_URI."
                )
            else:
                with closing(_connect(path)) as there, closing(_connect(copy)) as here:
                    there.backup(here)
                _rewrite(copy, path.parent)
                # MLflow takes an address without a driver for a path, and makes its folders.
                named = f"sqlite+pysqlite:///file:{quote(str(copy))}?mode=ro&uri=true"
        except sqlite3.Error as error:
            raise RegistryError(
                f"{path} cannot be used: {error}. Run the same command again when no other process "
                f"is at it. A damaged one comes from a backup, or is moved away."
            ) from error
        yield named


@contextmanager
def _lock(path: Path) -> Iterator[IO[str] | None]:
    """Yield an open lock file, or None where none can be had, such as in what is read-only.

    Its lock is shared by those who see the folder alike; that of ``filelock`` is exclusive.
    """
    lock = None
    with ExitStack() as stack:
        with suppress(OSError):  # read-only, or a file system without locks
            found = stack.enter_context(_opened_lock(path.with_name(f".{path.name}.lock")))
            fcntl.flock(found, fcntl.LOCK_SH)
            lock = found
        yield lock


def _opened_lock(path: Path) -> IO[str]:
    try:
        return path.open("a+")
    except PermissionError:  # another user made it
        return path.open()


def _settle(path: Path, lock: IO[str] | None) -> bool:
    """Make all locations those of its folder, and share the lock of those who use them so.

    Return False where they are not and the database cannot be written.

    Raises:
        RegistryError: artifacts were left behind, or others use it under another path.
    """
    home, deadline = path.parent, time.monotonic() + _PATIENCE_S
    while True:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_SH)
        with closing(_connect(path)) as connection:
            before = _home(connection, home)
        if before in (None, home):
            return True
        if time.monotonic() > deadline:
            raise RegistryError(
                f"another process uses {path} as that of {before}, such as one in a container. "
                f"Wait until it has ended, and run the same command again."
            )
        try:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            count = _rewrite(path, home)
        except BlockingIOError:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(random.uniform(0.05, 0.2))  # noqa: S311 - two who wait go out of step
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            lock = None  # of another user on NFS, which locks for writing what may be written
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _CANNOT_BE_WRITTEN:
                raise
            return False
        else:
            _log.info("the registry came from %s: %d locations are now in %s", before, count, home)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None)


def _home(connection: sqlite3.Connection, here: Path) -> Path | None:
    """Return the folder that has experiments' artifacts beside the database, as it says.

    The first experiment decides, which is made with the database. Others may have been given a
    place elsewhere: they count where artifacts of theirs lie ``here`` now.
    """
    if ("experiments",) in connection.execute("SELECT name FROM sqlite_master").fetchall():
        known = "SELECT experiment_id, artifact_location FROM experiments ORDER BY experiment_id"
        for number, location in connection.execute(known):
            path = _path(location)
            if path is not None and path.name == str(number):  # of those made in MLflow's page
                path = path.parent
            if path is None or path.name != ARTIFACTS:
                continue
            if number == 0 or path.parent == here or _has_artifacts(connection, number, here):
                return path.parent
    return None


def _has_artifacts(connection: sqlite3.Connection, experiment: int, folder: Path) -> bool:
    runs = "SELECT run_uuid FROM runs WHERE experiment_id = ?"
    known = (run for (run,) in connection.execute(runs, (experiment,)))
    return any((folder / ARTIFACTS / run).is_dir() for run in known)


def _path(location: str | None) -> Path | None:
    """Return the absolute path that a location is, None where it is none."""
    if location and location.startswith("file:"):
        location = unquote(urlsplit(location).path)
    return Path(location) if location and location.startswith("/") else None


def _rewrite(path: Path, home: Path) -> int:
    """Let all locations beside the database be in ``home``, all or none; return how many changed.

    Raises:
        RegistryError: artifacts of it lie elsewhere, and not there.
    """
    with closing(_connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        count, old = 0, _home(connection, home)
        if old in (None, home):  # others were faster
            return 0
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        for table, column, rows in _LOCATIONS:
            if table not in tables:  # other versions of MLflow have others
                continue
            known = f"SELECT rowid, {column} FROM {table} {rows}"  # noqa: S608
            for row, location in connection.execute(known).fetchall():
                before = _path(location)
                if before is None or not before.is_relative_to(old / ARTIFACTS):
                    continue
                after = home / before.relative_to(old)
                # Runs need not have artifacts, models do.
                is_expected = table == "logged_models" and not (home / ARTIFACTS).exists()
                is_there = table != "experiments" and before.exists()
                if not after.exists() and (is_expected or is_there):
                    raise RegistryError(
                        f"{path} was made in {old}, and artifacts that it names do not lie in "
                        f"{home / ARTIFACTS}. Bring them along: 'cp -rn "
                        f"{shlex.quote(str(old / ARTIFACTS))} {shlex.quote(str(home))}'."
                    )
                new = after.as_uri() if location.startswith("file:") else str(after)
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))  # noqa: S608
                count += 1
        connection.execute("COMMIT")
    return count
