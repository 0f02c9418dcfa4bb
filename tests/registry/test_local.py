"""The registry in a project's folder that is moved, copied or mounted elsewhere."""

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import ROOT, Workspace, free_port, server
from tlpipe.errors import RegistryError
from tlpipe.registry import local, tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

TEXT = "what a run keeps"
KEPT = [".mlflow.db.lock", "mlartifacts", "mlflow.db", "model"]


def register(workspace: Path, name: str = "digits") -> None:
    """Register what is smaller than a bundle: a run with a file, a model of it, a version."""
    with tracking.connection(workspace, create=True) as client:
        run = client.create_run(tracking.experiment(client, name, workspace)).info
        client.log_text(run.run_id, TEXT, "kept/text.txt")
        model = client.create_logged_model(run.experiment_id, source_run_id=run.run_id)
        client.log_model_artifacts(model.model_id, str(made(workspace / "model")))
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"models:/{model.model_id}"
        version = client.create_model_version(name, source, run.run_id, model_id=model.model_id)
        client.set_registered_model_alias(name, "champion", version.version)


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "graph.txt").write_text(TEXT)
    return folder


def location_of(client: "MlflowClient", experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return found.artifact_location


def texts(workspace: Path, name: str = "digits") -> list[str]:
    """Return what each version's run and the version itself hold, read as all commands do."""
    from mlflow.artifacts import download_artifacts

    with tracking.connection(workspace) as client:
        found = []
        for version in client.search_model_versions(f"name = '{name}'"):
            kept = tracking.artifact(client, version.run_id, "kept/text.txt")
            found.append(kept.read_text() if kept else "")
            model = download_artifacts(f"models:/{name}/{version.version}")
            found.append(Path(model, "graph.txt").read_text())
    return found


def mentions(workspace: Path, folder: Path) -> list[str]:
    """Return where in the whole database a folder is written, as a path or as a part of a URI."""
    found = []
    with closing(sqlite3.connect(workspace / "mlflow.db")) as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            rows = database.execute(f'SELECT * FROM "{table}"')
            for row in rows.fetchall():
                for column, value in zip(rows.description, row, strict=True):
                    text = str(value)
                    if f"{folder}/" in text or f"{folder.as_uri()}/" in text:
                        found.append(f"{table}.{column[0]}: {text}")
    return found


@contextmanager
def registered(folder: Path) -> Iterator[Any]:
    """Register a version in a folder's own registry; yield a client of that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        register(folder)
        with tracking.connection(folder) as client:
            yield client


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder with one version and a trace: MLflow takes seconds to make a database."""
    import mlflow

    folder = tmp_path_factory.mktemp("made")
    with registered(folder) as client, warnings.catch_warnings(action="ignore"):
        trace = client.start_trace("asked", experiment_id="1")
        client.end_trace(trace.trace_id)
        mlflow.flush_trace_async_logging()
    assert "trace_tags.value" in "".join(mentions(folder, folder))
    return folder


@pytest.fixture
def home(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with one version, of a name that has to be quoted in a URI."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = Path(shutil.copytree(made_once, tmp_path / "Blüten 100%25 #1"))
    with local.opened(folder):
        pass
    assert mentions(folder, made_once) == []
    monkeypatch.chdir(tmp_path)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fault("R20")
def test_a_moved_folder_reads_and_writes_where_it_is(home: Path, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere" / "Früchte 50%"
    there.parent.mkdir()
    home.rename(there)
    assert texts(there) == [TEXT, TEXT]
    register(there)
    register(there, "flowers")
    assert (texts(there), texts(there, "flowers")) == ([TEXT] * 4, [TEXT] * 2)
    assert not home.exists()
    assert mentions(there, home) == []
    there.rename(home)  # as a mount that comes and goes
    assert (texts(home), texts(home, "flowers")) == ([TEXT] * 4, [TEXT] * 2)
    assert mentions(home, there) == []


@pytest.mark.fault("R20")
@pytest.mark.parametrize("place", ["copy", "Blüten 100%25 #1/copy"])
def test_a_copy_owns_itself_and_the_original_stays_as_it_is(
    home: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "kept").mkdir()
    copy = Path(shutil.copytree(home, tmp_path / "kept" / "copy"))
    if (tmp_path / place).is_relative_to(home):
        copy = copy.rename(tmp_path / place)
    before = {path: found for path, found in contents(home).items() if copy not in path.parents}
    register(copy)
    shutil.rmtree(copy / "mlartifacts/models")
    after = {path: found for path, found in contents(home).items() if copy not in path.parents}
    assert after == before
    assert texts(home) == [TEXT, TEXT]
    assert not [row for row in mentions(copy, home) if str(copy) not in row and "copy" not in row]


@pytest.mark.fault("R20")
def test_a_project_inside_of_a_moved_one_keeps_its_own_place(home: Path, tmp_path: Path) -> None:
    inner = home / "inner"
    inner.mkdir()
    for name in ("mlflow.db", ".mlflow.db.lock", "mlartifacts"):
        (home / name).rename(inner / name)
    assert texts(inner) == [TEXT, TEXT]
    for name in ("mlflow.db", ".mlflow.db.lock", "mlartifacts"):
        (inner / name).rename(home / name)
    assert texts(home) == [TEXT, TEXT]
    assert mentions(home, inner) == []


@pytest.mark.fault("R20")
def test_other_locations_stay_and_those_of_a_server_come_along(home: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    os.chdir(home)  # where 'make ui' starts a server, which keeps plain paths
    store = SqlAlchemyStore(local.address(home), "./mlartifacts")
    number = store.create_experiment("of the page")
    os.chdir(tmp_path)
    known = {
        "bucket": "s3://bucket/mlartifacts",
        "server": "mlflow-artifacts:/1",
        "disk": f"{tmp_path}/disk/runs",
    }
    client = MlflowClient(local.address(home))
    for name, location in known.items():
        client.create_experiment(name, location)
    there = home.rename(tmp_path / "there")
    with tracking.connection(there) as client:
        assert location_of(client, "of the page") == f"{there}/mlartifacts/{number}"
        for name, location in known.items():
            assert location_of(client, name) == location


@pytest.mark.fault("R20")
def test_a_folder_behind_a_link_is_one_place(home: Path, tmp_path: Path) -> None:
    """So is a database behind one, which keeps the place of the folder that it lies in."""
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(home)
    other.mkdir()
    (other / "mlflow.db").symlink_to(home / "mlflow.db")
    before = (home / "mlflow.db").read_bytes()
    assert texts(link) == texts(other) == texts(home) == [TEXT, TEXT]
    assert (home / "mlflow.db").read_bytes() == before


@pytest.mark.fault("R20")
def test_two_folders_that_share_a_database_share_its_place(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow.db").symlink_to(home / "mlflow.db")
    register(other, "flowers")
    register(home)
    assert (texts(other, "flowers"), texts(home)) == ([TEXT] * 2, [TEXT] * 4)
    assert mentions(home, other) == []
    there = home.rename(tmp_path / "there")
    (other / "mlflow.db").unlink()
    (other / "mlflow.db").symlink_to(there / "mlflow.db")
    assert (texts(other, "flowers"), texts(there)) == ([TEXT] * 2, [TEXT] * 4)


@pytest.mark.fault("R20")
@pytest.mark.parametrize("is_mounted", [True, False])
def test_experiments_with_a_place_of_their_own_keep_it(
    home: Path, tmp_path: Path, is_mounted: bool
) -> None:
    disk = tmp_path / "disk/mlartifacts"
    beside = (home / "pictures").as_uri()  # in the folder, and no artifact of the registry
    with tracking.connection(home) as client:
        client.create_experiment("large", disk.as_uri())
        client.create_experiment("beside", beside)
    register(home, "large")
    before = mentions(home, disk.parent)
    assert texts(home, "large") == [TEXT, TEXT] and any("logged_models" in row for row in before)
    there = home.rename(tmp_path / "there")
    away = disk if is_mounted else disk.rename(tmp_path / "away")
    assert texts(there) == [TEXT, TEXT]
    assert mentions(there, disk.parent) == before
    with tracking.connection(there) as client:
        assert location_of(client, "beside") == beside
    away.rename(disk)
    assert texts(there, "large") == [TEXT, TEXT]


@pytest.mark.fault("R20")
@pytest.mark.parametrize("is_ours", [True, False])
def test_without_the_first_experiment_artifacts_beside_the_database_decide(
    home: Path, tmp_path: Path, is_ours: bool
) -> None:
    """As in a database that a server made, or that 'mlflow gc' has cleaned."""
    disk = tmp_path / "disk"
    there = home.rename(tmp_path / "there")
    with closing(sqlite3.connect(there / "mlflow.db")) as database, database:
        database.execute(
            "UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0' "
            "WHERE experiment_id = 0"
        )
        if not is_ours:
            database.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = 1",
                ((disk / "mlartifacts").as_uri(),),
            )
            database.execute("UPDATE runs SET experiment_id = 0")
    with local.opened(there):
        pass
    assert bool(mentions(there, disk)) is not is_ours
    assert bool(mentions(there, home)) is not is_ours


@pytest.mark.parametrize("address", ["sqlite:///mlflow.db", "sqlite:///{home}/mlflow.db"])
def test_a_registry_that_is_named_by_its_address_is_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    there = home.rename(tmp_path / "there")
    monkeypatch.chdir(there)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(home=there))
    register(there, "flowers")
    assert texts(there, "flowers") == texts(there) == [TEXT, TEXT]
    assert mentions(there, home) == []
    assert sorted(path.name for path in there.iterdir()) == sorted(KEPT)


@pytest.mark.fault("R21")
def test_artifacts_that_were_left_behind_are_asked_for(home: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(home / "mlflow.db", there)
    asked = r"do not lie in .* Bring them along: 'cp -rn "
    with pytest.raises(RegistryError, match=asked) as said:
        texts(there)
    hidden = home.rename(tmp_path / "hidden")
    with pytest.raises(RegistryError, match=asked):
        texts(there)
    hidden.rename(home)
    assert (there / "mlflow.db").read_bytes() == (home / "mlflow.db").read_bytes()
    command = str(said.value).partition("along: '")[2].removesuffix("'.")
    subprocess.run(["sh", "-c", command], check=True)
    assert texts(there) == [TEXT, TEXT]


@pytest.mark.fault("R21")
def test_what_an_older_release_wrote_into_the_place_before_is_asked_for(
    home: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "copy"))
    register(home)
    shutil.copy(home / "mlflow.db", copy)  # as if the second version had been made in the copy
    with pytest.raises(RegistryError, match="Bring them along") as said:
        register(copy)
    assert mentions(copy, copy) == []
    command = str(said.value).partition("along: '")[2].removesuffix("'.")
    subprocess.run(["sh", "-c", command], check=True)
    assert texts(copy) == [TEXT] * 4


@pytest.mark.slow
@pytest.mark.fault("R20")
def test_the_pages_of_a_moved_folder_show_what_is_there(home: Path, tmp_path: Path) -> None:
    import mlflow

    there = Workspace(home.rename(tmp_path / "there"))
    for name in ("params.yaml", "tlpipe.lock.yaml"):  # a project
        shutil.copy(ROOT / name, there.path)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with server(there, "tlpipe", "ui", "--port", str(port), ready=f"{address}/health"):
        register(there.path)  # beside it
        client = mlflow.MlflowClient(address)
        found = client.search_model_versions("name = 'digits'")
        runs = [version.run_id for version in found if version.run_id]
        kept = [client.list_artifacts(run, "kept")[0].path for run in runs]
        assert kept == ["kept/text.txt"] * 2
    assert mentions(there.path, home) == []


# Opens the registry of a folder, in a process of its own; may be killed at a statement.
OPENING = """
import os, signal, sys
from pathlib import Path
from tlpipe.registry import local

folder, statement = Path(sys.argv[1]), sys.argv[2]
connect = local._connect

def traced(path):
    connection = connect(path)
    def trace(text):
        if statement and text.startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)
    connection.set_trace_callback(trace)
    return connection

local._connect = traced
with local.opened(folder) as address:
    print(address, flush=True)
    sys.stdin.read()
"""


def opening(folder: Path, statement: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", OPENING, str(folder), statement],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.fault("R20")
@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE runs", "UPDATE model_versions", "COMMIT"])
def test_a_kill_while_locations_are_rewritten_leaves_all_or_none(
    home: Path, tmp_path: Path, statement: str
) -> None:
    there = home.rename(tmp_path / "there")
    with opening(there, statement) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert mentions(there, there) == []
    assert texts(there) == [TEXT, TEXT]
    assert mentions(there, home) == []


@pytest.mark.fault("R20")
def test_of_several_that_open_a_moved_folder_at_once_all_may(home: Path, tmp_path: Path) -> None:
    there = home.rename(tmp_path / "there")
    processes = [opening(there) for _ in range(6)]
    ends = [process.communicate("") for process in processes]
    assert [out.strip() for out, _ in ends] == [local.address(there)] * 6, ends
    assert texts(there) == [TEXT, TEXT]


@pytest.mark.fault("R20")
def test_a_file_system_without_locks_is_used_without(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    there = home.rename(tmp_path / "there")
    assert texts(there) == [TEXT, TEXT]
    register(there)
    assert texts(there) == [TEXT] * 4


@pytest.mark.fault("R35")
def test_another_address_of_the_registry_alone_counts_for_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.db"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{other}")
    register(home)
    assert texts(home) == [TEXT] * 4
    assert not other.exists()
    assert os.environ["MLFLOW_REGISTRY_URI"] == f"sqlite:///{other}"


def test_an_address_of_nothing_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a variable that compose.yaml passes on and nobody has set."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert not tracking.is_there(tmp_path)


@pytest.mark.fault("R22")
def test_nobody_takes_a_registry_from_who_uses_it_under_another_path(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in a container and one outside would."""
    monkeypatch.setattr(local, "_PATIENCE_S", 0.5)
    with local.opened(home):
        there = home.rename(tmp_path / "there")
        with pytest.raises(RegistryError, match=r"another process uses .* Wait until it has ended"):
            texts(there)
        assert mentions(there, there) == []
    assert texts(there) == [TEXT, TEXT]


# Mounts the first folder at the second one, read-only, for what runs behind it.
MOUNTED = (
    'mount --bind "$1" "$2" && mount -o remount,bind,ro "$2" && cd "$2" && shift 2 && exec "$@"'
)


def mounted(home: Path, place: Path, program: str) -> "subprocess.CompletedProcess[str]":
    """Run a Python program in a folder that is mounted elsewhere; skip where that is forbidden."""
    alone = ["unshare", "--mount", "--map-root-user"]
    try:
        subprocess.run([*alone, "mount", "--bind", home, place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this account may not mount")
    command = [*alone, "sh", "-c", MOUNTED, "sh", str(home), str(place), sys.executable]
    return subprocess.run([*command, "-W", "ignore", "-c", program], capture_output=True, text=True)


@pytest.mark.fault("R23")
def test_a_folder_that_is_mounted_elsewhere_to_read_is_read_and_not_written(
    home: Path, tmp_path: Path
) -> None:
    place = tmp_path / "mounted 100%"
    place.mkdir()
    before = contents(home)
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.registry.test_local import register, texts
from tlpipe.errors import RegistryError
print(texts(Path()))
try:
    register(Path())
except RegistryError as error:
    print(error)
"""
    hidden = f"import os; os.chdir('/'); os.chdir({str(place)!r})\n" + program
    result = mounted(home, place, hidden)
    assert result.returncode == 0, result.stderr
    read, error = result.stdout.splitlines()
    assert read == str([TEXT, TEXT])
    assert "was made in another folder" in error
    assert "cannot be written. Mount it so that it can be" in error
    assert contents(home) == before


@pytest.mark.parametrize("content", [b"", b"no database"])
def test_a_file_that_is_no_database_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    if content:
        with pytest.raises(
            RegistryError, match=r"cannot be used: file is not a database. Run the same"
        ):
            texts(tmp_path)
    else:
        with local.opened(tmp_path) as address:  # MLflow fills it
            assert address == local.address(tmp_path)
