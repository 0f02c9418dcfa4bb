"""What others deleted, renamed or made again in MLflow is said before training."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workspace, free_port
from tests.registry.conftest import REGISTER, Said
from tests.registry.test_local import register, registered
from tests.registry.test_promotion import client_of
from tlpipe.errors import RegistryError
from tlpipe.registry import local, moves, promotion, tracking
from tlpipe.registry.register import changed_by_others


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder with one version of the model ``digits``, in production."""
    folder = tmp_path_factory.mktemp("promoted")
    with registered(folder) as client:
        moves.settle(client, "digits")
    return folder


@pytest.fixture
def home(promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Path(shutil.copytree(promoted, tmp_path / "a project"))


def said(home: Path, name: str = "digits") -> list[str]:
    return changed_by_others(workspace=home, name=name)


def error_of(home: Path, name: str = "digits") -> str:
    """Return the error of ``check``; ``register`` does so, too."""
    with pytest.raises(RegistryError) as error:
        said(home, name)
    return str(error.value)


def run_what_helps(text: str) -> None:
    """Run the command that a message ends with."""
    subprocess.run(["sh", "-c", text.rpartition(": '")[2].removesuffix("'.")], check=True)


def test_where_nothing_was_changed_nothing_is_said(home: Path, tmp_path: Path) -> None:
    assert said(home) == []
    assert said(home, "others") == []
    assert said(tmp_path) == []
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
@pytest.mark.fault("R25")
def test_a_deleted_experiment_is_restored_by_the_command_that_is_named(home: Path) -> None:
    with tracking.connection(home) as client:
        client.delete_experiment("1")
    text = error_of(home)
    assert "the experiment digits was deleted in MLflow" in text
    with pytest.raises(RegistryError, match="the experiment digits was deleted in MLflow"):
        register(home)
    run_what_helps(text)
    assert said(home) == []


@pytest.mark.slow
@pytest.mark.fault("R25")
def test_a_renamed_experiment_gets_its_name_back_by_the_command_that_is_named(home: Path) -> None:
    with tracking.connection(home) as client:
        client.rename_experiment("1", "old digits")
    (text,) = said(home)
    assert (
        "the experiment digits was renamed to old digits in MLflow: new runs go to another" in text
    )
    run_what_helps(text)
    assert said(home) == []


@pytest.mark.fault("R25")
def test_an_experiment_that_is_gone_for_good_is_said(home: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(local.address(home), "./mlartifacts")
    with tracking.connection(home) as client:
        run_id = client.get_model_version("digits", "1").run_id
        client.delete_experiment("1")
    store._hard_delete_run(run_id)  # as 'mlflow gc' does
    store._hard_delete_experiment("1")
    (text,) = said(home)
    assert "the run of digits version 1 is gone for good" in text
    assert "Register what was built: 'dvc repro" in text


@pytest.mark.fault("R12")
def test_a_deleted_model_is_said_until_another_is_registered(home: Path) -> None:
    with tracking.connection(home) as client:
        client.delete_registered_model("digits")
    (text,) = said(home)
    assert "the model digits was deleted in MLflow: what digits-history keeps of before" in text
    assert "compared with none of it. Register what was built: 'dvc repro" in text
    register(home)
    (text,) = said(home)
    found = (
        r"deleted in MLflow, and made again 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d.*: what digits-history"
    )
    assert re.search(found, text)
    with tracking.connection(home) as client:
        moves.settle(client, "digits")
    assert said(home) == []


@pytest.mark.fault("R16")
def test_a_deleted_history_is_said(home: Path) -> None:
    with tracking.connection(home) as client:
        client.delete_registered_model("digits-history")
    (text,) = said(home)
    assert "digits-history was deleted in MLflow: version 1 of digits stays in production" in text
    with tracking.connection(home) as client:
        moves.settle(client, "digits")
    assert said(home) == []


@pytest.mark.slow
@pytest.mark.fault("R16")
@pytest.mark.parametrize("again", [False, True])
def test_a_renamed_model_is_named_by_its_old_name_too(home: Path, again: bool) -> None:
    """``again``: somebody has registered another one under the old name since."""
    with tracking.connection(home) as client:
        client.rename_registered_model("digits", "numerals")
        if again:
            client.create_registered_model("digits")
    by_old, by_new = error_of(home), error_of(home, "numerals")
    if not again:
        with (
            tracking.connection(home) as client,
            pytest.raises(RegistryError, match="is called numerals in MLflow now"),
        ):
            promotion.history(client, "digits")
    assert "the model of digits-history is called numerals in MLflow now." in by_old
    assert ("Set register.name: numerals in params.yaml" in by_old) is not again
    assert "numerals was called digits before: what was in production stands in" in by_new
    commands = {
        text.rpartition("Rename that to numerals-history: ")[2] for text in (by_old, by_new)
    }
    assert len(commands) == 1
    run_what_helps(by_new)
    assert "numerals" not in "".join(said(home))
    with tracking.connection(home) as client:
        assert [move.champion for move in moves.history(client, "numerals")] == ["1"]


def test_a_server_that_does_not_answer_stops_no_check(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (text,) = said(home)
    assert "what others changed in the registry is not known: MLflow at http://127.0.0.1" in text


@pytest.mark.slow
@pytest.mark.fault("R25")
def test_check_stops_before_training_where_register_would_after_it(
    released: Workspace, tlpipe: Callable[..., Said]
) -> None:
    assert tlpipe("check").code == 0
    client_of(released).delete_experiment("1")
    for command in (["check"], REGISTER):
        error = tlpipe(*command)
        assert error.code == 8
        assert "the experiment digits was deleted in MLflow" in error.error
    client_of(released).restore_experiment("1")
    client_of(released).delete_registered_model("digits")
    checked = tlpipe("check")
    assert checked.code == 0
    assert "the model digits was deleted in MLflow" in checked.printed
