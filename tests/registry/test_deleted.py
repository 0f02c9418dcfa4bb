"""What others delete in MLflow, answers that are lost, accounts that may only read."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Workspace
from tests.proxy import DROP, proxy
from tests.registry.conftest import REGISTER, Said, change_bundle, mlflow_server
from tests.registry.test_moves import Dying, Killed
from tests.registry.test_promotion import aliases, client_of, run_of
from tlpipe import bundle
from tlpipe.registry import moves

pytestmark = pytest.mark.slow
Tlpipe = Callable[..., Said]


def versions(workspace: Workspace) -> list[tuple[int, str]]:
    """Return number and bundle of each version."""
    found = client_of(workspace).search_model_versions("name = 'digits'")
    return sorted((int(v.version), v.tags["tlpipe.bundle"]) for v in found)


def test_a_deleted_version_is_registered_anew_and_is_not_in_production(
    released: Workspace, tlpipe: Tlpipe
) -> None:
    """Whoever deletes the champion takes it out of production: none is put there in its place."""
    digest = bundle.load(released.path / "artifacts/export/bundle").digest
    client_of(released).delete_model_version("digits", "1")
    again = tlpipe(*REGISTER)
    assert again.code == 0
    assert versions(released) == [(2, digest)]
    assert aliases(released) == {"challenger": 2}
    assert len(client_of(released).search_runs(["1"])) == 1
    failed = tlpipe("predict", "x.png")
    assert failed.code == 8
    assert "nothing of digits is in production." in failed.error
    assert "--model digits@challenger" in failed.error


@pytest.mark.fault("R12")
@pytest.mark.parametrize("what", ["version", "run"])
def test_what_was_taken_out_and_deleted_goes_in_by_nobody(
    released: Workspace, tlpipe: Tlpipe, what: str
) -> None:
    """Registered anew it has another number, and is the bundle that somebody rolled back."""
    released.configure("register", promote="auto", gate={})
    first = bundle.load(released.path / "artifacts/export/bundle")
    change_bundle(released, provenance={**first.provenance, "l2": 0.5})
    tlpipe(*REGISTER)
    assert aliases(released)["champion"] == 2
    tlpipe("rollback", "--reason", "worse")
    client = client_of(released)
    if what == "run":
        client.delete_run(run_of(client, 2))
    else:
        client.delete_model_version("digits", "2")
    assert tlpipe(*REGISTER).code == 0
    assert aliases(released)["challenger"] == 3
    assert aliases(released)["champion"] == 1


@pytest.mark.fault("R34")
def test_a_killed_promotion_that_a_hand_took_back_is_not_promoted_again_by_itself(
    released: Workspace, tlpipe: Tlpipe
) -> None:
    first = bundle.load(released.path / "artifacts/export/bundle")
    change_bundle(released, provenance={**first.provenance, "l2": 0.5})
    tlpipe(*REGISTER)
    client = client_of(released)
    judged = moves.seen(client, "digits", client.get_model_version("digits", "2"))
    with pytest.raises(Killed):
        after = moves.tail(client, "digits")
        dying: Any = Dying(client, 3)
        moves.move(dying, "digits", judged, after=after, kind=moves.PROMOTION, why="")
    assert aliases(released)["champion"] == 2
    client.set_registered_model_alias("digits", "champion", "1")
    released.configure("register", promote="auto", gate={"min_test_images": 1})
    for _ in range(2):
        assert tlpipe(*REGISTER).code == 0
        assert aliases(released)["champion"] == 1
    assert tlpipe("promote", "2").code == 0
    assert aliases(released)["champion"] == 2


@pytest.mark.fault("R17")
def test_where_a_hand_points_to_a_damaged_version_the_last_good_one_answers(
    released: Workspace, tlpipe: Tlpipe
) -> None:
    """It is the last that was promoted, not the one before that."""
    released.configure("register", promote="auto", gate={"min_test_images": 1})
    first = bundle.load(released.path / "artifacts/export/bundle")
    change_bundle(released, provenance={**first.provenance, "l2": 0.5})
    tlpipe(*REGISTER)
    assert aliases(released)["champion"] == 2
    released.configure("register", promote="by-hand")
    change_bundle(released, provenance={**first.provenance, "l2": 0.25})
    tlpipe(*REGISTER)
    client = client_of(released)
    client.set_registered_model_alias("digits", "champion", "3")
    stored = client.get_model_version("digits", "3").run_id
    (graph,) = (released.path / "mlartifacts").glob(f"**/{stored}/artifacts/bundle/model.onnx")
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    example = str(released.path / "artifacts/evaluate/examples/0.png")
    said = released.call("predict", example).stderr
    assert "degraded: digits version 3 cannot serve, version 2 does" in said


@pytest.mark.fault("R12")
def test_a_deleted_model_is_registered_anew_and_no_old_move_counts(
    released: Workspace, tlpipe: Tlpipe
) -> None:
    first = bundle.load(released.path / "artifacts/export/bundle")
    client_of(released).delete_registered_model("digits")
    second = change_bundle(released, provenance={**first.provenance, "l2": 0.5})
    tlpipe(*REGISTER)
    assert versions(released) == [(1, second.digest)]
    tags = client_of(released).get_model_version("digits", "1").tags
    assert "champion" not in aliases(released) or tags.get("tlpipe.gate") == "passed"


def test_a_deleted_run_is_made_anew_with_its_version(released: Workspace, tlpipe: Tlpipe) -> None:
    digest = bundle.load(released.path / "artifacts/export/bundle").digest
    client = client_of(released)
    client.delete_run(run_of(client, 1))
    assert tlpipe(*REGISTER).code == 0
    assert versions(released) == [(1, digest), (2, digest)]
    (run,) = client.search_runs(["1"])
    assert client.get_model_version("digits", "2").run_id == run.info.run_id
    assert (released.path / "artifacts/register/receipt.json").exists()
    assert aliases(released) == {"champion": 1, "challenger": 2}


def test_of_two_versions_by_a_repeated_request_one_is_used_ever_after(
    built: Workspace, tlpipe: Tlpipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own client sends a request again after a time-out; both arrive."""
    import mlflow

    create = mlflow.MlflowClient.create_model_version

    def twice(*given: Any, **named: Any) -> Any:
        create(*given, **named)
        return create(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "create_model_version", twice)
        tlpipe(*REGISTER)
    receipt = built.path / "artifacts/register/receipt.json"
    first = receipt.read_bytes()
    champion = aliases(built)
    assert len(versions(built)) == 2
    assert champion["champion"] == champion["challenger"]
    tlpipe(*REGISTER)
    assert receipt.read_bytes() == first
    assert aliases(built) == champion


def test_a_real_server_whose_answers_are_lost_has_one_champion(
    built: Workspace, tlpipe: Tlpipe, fresh_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer to each of two requests, which the client then repeats."""
    lost = {"registered-models/create": False, "model-versions/create": False}

    def fate(_: str, path: str) -> int | None:
        for method, is_lost in lost.items():
            if path.endswith(method) and not is_lost:
                lost[method] = True
                return DROP
        return None

    shutil.copy(fresh_database, built.path / "server.db")
    with (
        mlflow_server(built.path, "sqlite:///server.db", workers=1) as address,
        proxy(address, fate) as between,
    ):
        import mlflow

        monkeypatch.setenv("MLFLOW_TRACKING_URI", between)
        assert tlpipe(*REGISTER).code == 0
        assert all(lost.values())
        receipt = (built.path / "artifacts/register/receipt.json").read_bytes()
        assert tlpipe(*REGISTER).code == 0
        assert (built.path / "artifacts/register/receipt.json").read_bytes() == receipt
        client = mlflow.MlflowClient(address)
        found = client.get_registered_model("digits").aliases
        assert len(set(found.values())) == 1


@contextmanager
def read_only() -> Iterator[None]:
    """Let every connection of SQLite refuse to write, as that of an account that only reads."""
    import sqlalchemy
    from sqlalchemy import event

    def refuse(connection: Any, *_: object) -> None:
        connection.execute("PRAGMA query_only = ON")

    def allow(connection: Any, *_: object) -> None:
        connection.execute("PRAGMA query_only = OFF")

    event.listen(sqlalchemy.Pool, "checkout", refuse)
    event.listen(sqlalchemy.Pool, "checkin", allow)
    try:
        yield
    finally:
        event.remove(sqlalchemy.Pool, "checkout", refuse)
        event.remove(sqlalchemy.Pool, "checkin", allow)


def test_an_account_that_only_reads_sees_history_and_is_answered(
    released: Workspace, tlpipe: Tlpipe
) -> None:
    with read_only():
        assert "promotion" in tlpipe("history").printed
        assert tlpipe("predict", "--json", "artifacts/evaluate/examples/4.png").code == 0
        failed = tlpipe("promote")
        assert failed.code == 8  # before it writes: it is in production already
        failed = tlpipe(*REGISTER)
        assert failed.code == 8
        assert "readonly database" in failed.error


@pytest.mark.fault("R14")
def test_history_writes_nothing(released: Workspace, tlpipe: Tlpipe) -> None:
    client_of(released).delete_registered_model_alias("digits", "champion")
    with read_only():
        printed = tlpipe("history").printed
    assert "promotion" in printed
    assert "now none is in production: its alias was moved in MLflow since." in printed
