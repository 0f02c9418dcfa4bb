"""Answers of the registry in a project's folder that are not asked twice."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Workspace
from tests.registry.test_local import register
from tlpipe import code_digest
from tlpipe.errors import RegistryError
from tlpipe.registry import local, tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder with one version of the model ``digits``."""
    folder = tmp_path_factory.mktemp("registered")
    register(folder)
    return folder


@pytest.fixture
def home(registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    workspace = Path(shutil.copytree(registered, tmp_path / "project"))
    with local.opened(workspace):  # its locations become those of this folder
        pass
    return workspace


@pytest.fixture
def champion() -> Callable[[Path], str]:
    """Ask which version is in production; ``asked`` counts how often the registry was."""

    def ask(client: "MlflowClient") -> str:
        champion.asked += 1  # type: ignore[attr-defined]
        return str(client.get_registered_model("digits").aliases["champion"])

    def champion(workspace: Path) -> str:
        return str(tracking.remembered(workspace, "champion", ask))

    champion.asked = 0  # type: ignore[attr-defined]
    return champion


OTHERS = """
import mlflow
client = mlflow.MlflowClient("sqlite:///mlflow.db")
client.set_registered_model_alias("digits", "champion", "1")
"""


@pytest.mark.fault("R68")
def test_a_registry_is_asked_again_once_anybody_has_written_to_it(
    home: Path, champion: Callable[[Path], str]
) -> None:
    register(home)
    assert [champion(home), champion(home)] == ["2", "2"]
    assert champion.asked == 1  # type: ignore[attr-defined]
    subprocess.run([sys.executable, "-c", OTHERS], cwd=home, check=True, capture_output=True)
    assert champion(home) == "1"
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute("UPDATE registered_model_aliases SET version = 2")
    assert champion(home) == "2"


def test_what_others_write_while_it_is_asked_is_not_taken_for_known(
    home: Path, champion: Callable[[Path], str]
) -> None:
    register(home)

    def ask(client: "MlflowClient") -> str:
        found = str(client.get_registered_model("digits").aliases["champion"])
        with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
            database.execute("UPDATE registered_model_aliases SET version = 1")
        return found

    assert tracking.remembered(home, "champion", ask) == "2"
    assert champion(home) == "1"


def test_an_answer_is_that_of_the_code_that_asked(
    home: Path, champion: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    champion(home)
    monkeypatch.setattr(code_digest, "versions", lambda *_: {"mlflow": "99"})
    champion(home)
    monkeypatch.setattr(code_digest, "of_closure", lambda *_: "other")
    champion(home)
    assert champion.asked == 3  # type: ignore[attr-defined]


def test_a_transaction_that_is_not_ended_is_asked_past(
    home: Path, champion: Callable[[Path], str]
) -> None:
    champion(home)
    (home / "mlflow.db-journal").touch()
    champion(home)
    assert champion.asked == 2  # type: ignore[attr-defined]


def test_writes_that_lie_beside_the_database_count(
    home: Path, champion: Callable[[Path], str]
) -> None:
    """As long as SQLite keeps them in a write-ahead log, the database's file is as it was."""
    register(home)
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        database.execute("PRAGMA journal_mode = WAL")
        assert champion(home) == "2"
        with database:
            database.execute("UPDATE registered_model_aliases SET version = 1")
        assert champion(home) == "1"


def test_a_copied_project_has_answers_of_its_own(
    home: Path, tmp_path: Path, champion: Callable[[Path], str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    register(other)
    register(other)
    assert [champion(home), champion(other), champion(home)] == ["1", "2", "1"]
    assert champion.asked == 2  # type: ignore[attr-defined]


def test_what_is_raised_and_what_others_serve_is_asked_each_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, champion: Callable[[Path], str]
) -> None:
    def refuse(_: "MlflowClient") -> str:
        raise RegistryError("no")

    for _ in range(2):
        with pytest.raises(RegistryError, match="no"):
            tracking.remembered(home, "refused", refuse)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert [champion(elsewhere), champion(elsewhere)] == ["1", "1"]
    assert champion.asked == 2  # type: ignore[attr-defined]


def test_a_cache_that_cannot_be_written_or_read_is_done_without(
    home: Path, tmp_path: Path, champion: Callable[[Path], str]
) -> None:
    champion(home)
    (kept,) = (tmp_path / "cache" / "tlpipe" / "registry").iterdir()
    kept.write_text("{")
    assert champion(home) == "1"
    kept.unlink()
    kept.mkdir()
    assert champion(home) == "1"
    assert champion.asked == 3  # type: ignore[attr-defined]


def test_what_the_next_run_asks_needs_no_mlflow(built: Workspace) -> None:
    built.call("register")
    without = "import sys; sys.modules['mlflow'] = None; from tlpipe.cli import main; main()"
    assert "alias challenger, champion" in built.run("python", "-c", without, "summary").stdout
    built.run("python", "-c", without, "check")
    # It has asked for the labels of the champion, when it misses what it trains on.
    said = built.run("python", "-c", without, "train", code=6).stderr
    assert "activations/index.json is missing" in said and "not known" not in said
