"""What commands say where nothing is there, nothing is in production, or something is gone."""

import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import Workspace, free_port
from tests.registry.test_promotion import client_of
from tlpipe import bundle as bundles
from tlpipe import versioning
from tlpipe.errors import ComparisonError, RegistryError, UnreachableError
from tlpipe.registry import local, moves, promotion, tracking
from tlpipe.registry.gate import Bounds, Measured
from tlpipe.training.model import Measured as Validation
from tlpipe.training.model import Step


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose registry holds versions 1 and 2 of a model, without bundles."""
    folder = tmp_path_factory.mktemp("two versions")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with tracking.connection(folder, create=True) as client:
            experiment = tracking.experiment(client, "digits", folder)
            client.create_registered_model("digits")
            for _ in range(2):
                run = client.create_run(experiment)
                place = f"{run.info.artifact_uri}/model"
                client.create_model_version("digits", place, run_id=run.info.run_id)
    return folder


@pytest.fixture
def home(empty: Workspace, two_versions: Path) -> Workspace:
    """A project with a copy of that registry: to make one takes seconds."""
    shutil.copytree(two_versions, empty.path, dirs_exist_ok=True)
    return empty


def put(home: Workspace, number: str) -> None:
    with tracking.connection(home.path) as client:
        seen = moves.seen(client, "digits", client.get_model_version("digits", number))
        after = moves.tail(client, "digits")
        moves.move(client, "digits", seen, after=after, kind=moves.PROMOTION, why="")


@pytest.mark.fault("R60")
def test_where_nothing_is_in_production_the_ways_on_are_named(home: Workspace) -> None:
    said = home.call("predict", "x.png", code=8).stderr
    assert "nothing of digits is in production. Put a version there: 'tlpipe promote'" in said
    assert "--model digits@2" in said
    with tracking.connection(home.path) as client:
        tracking.challenge(client, "digits", "1")
    assert "--model digits@challenger" in home.call("predict", "x.png", code=8).stderr


@pytest.mark.fault("R60")
@pytest.mark.parametrize(
    "command", [("predict", "x.png"), ("models",), ("rebuild", "nosuch@1"), ("show", "nosuch@1")]
)
def test_where_nothing_was_built_a_run_is_advised(
    empty: Workspace, command: tuple[str, ...]
) -> None:
    said = empty.call(*command, code=8).stderr
    assert "'tlpipe run' makes one here; MLFLOW_TRACKING_URI names a shared registry." in said
    assert "what was built" not in said


@pytest.mark.fault("R61")
def test_an_address_of_no_scheme_is_not_called_a_server_that_does_not_run(
    empty: Workspace,
) -> None:
    wrong = Workspace(empty.path, {**empty.env, "MLFLOW_TRACKING_URI": "htp:/x"})
    said = wrong.call("models", code=8).stderr
    assert "htp:/x is no address of a registry: MLflow knows no htp:. Expected http://" in said
    assert "Check that it runs" not in said


@pytest.mark.fault("R71")
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:5000", "127.0.0.1:5000 is no address of a registry. Expected http://HOST:PORT"),
        ("localhost:5000", "MLflow knows no localhost:. Expected http://HOST:PORT"),
        ("./mlruns", "./mlruns is no address of a registry. Expected http://HOST:PORT"),
        ("http:/127.0.0.1", "http:/127.0.0.1 is no address of a registry. Expected http://"),
        ("sqlite:///nowhere/a.db", "nowhere/a.db; an absolute path has four slashes before it"),
    ],
)
def test_an_address_that_cannot_be_one_is_said_to_be_none(
    empty: Workspace, address: str, said: str
) -> None:
    before = empty.names()
    wrong = Workspace(empty.path, {**empty.env, "MLFLOW_TRACKING_URI": address})
    (line,) = wrong.call("models", code=8).stderr.splitlines()
    assert said in line
    assert empty.names() == before


@pytest.mark.fault("R71")
def test_a_server_that_is_down_or_refuses_is_said_to_be_so(empty: Workspace) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    def models(port: int) -> str:
        there = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        }
        asked = Workspace(empty.path, {**empty.env, **there}).call("models", code=8)
        (line,) = asked.stderr.splitlines()
        return line

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = models(server.server_address[1])
        server.shutdown()
    assert "refuses whoever asks (HTTP 401). Give an account that may do this" in said
    assert "Check that" not in said
    said = models(free_port())
    assert "Connection refused" in said
    assert said.endswith("Check that MLflow runs there; then give the same command again.")


@pytest.mark.fault("R62")
def test_status_says_that_the_run_in_production_was_deleted(home: Workspace) -> None:
    put(home, "1")
    client = client_of(home)
    run_id = str(client.get_model_version("digits", "1").run_id)
    assert tracking.of_deleted_run(client, "digits", "1") == ""
    client.delete_run(run_id)
    said = tracking.of_deleted_run(client, "digits", "1")
    assert "the run of digits version 1 was deleted in MLflow" in said
    command = shlex.split(said.partition("Restore it: '")[2].removesuffix("'."))
    home.run("env", *command)
    assert tracking.of_deleted_run(client, "digits", "1") == ""


@pytest.mark.fault("R62")
def test_all_that_was_registered_was_deleted(home: Workspace) -> None:
    put(home, "1")
    client = client_of(home)
    for number in ("1", "2"):
        client.delete_model_version("digits", number)
    assert "all that were registered were deleted in MLflow" in home.call("models").stdout
    assert "which was deleted in MLflow; no other can answer" in home.call("history").stdout
    said = home.call("predict", "x.png", code=8).stderr
    assert "Register what was built: 'dvc repro --force --single-item register'" in said


@pytest.mark.fault("R62")
def test_status_names_a_champion_that_was_deleted(home: Workspace) -> None:
    put(home, "1")
    put(home, "2")
    client = client_of(home)
    client.delete_model_version("digits", "2")
    assert promotion.stands_in(client, "digits") == (
        "digits version 2, which was deleted in MLflow; version 1 answers, until another is "
        "promoted"
    )
    client.delete_model_version("digits", "1")
    assert "; no other can answer" in promotion.stands_in(client, "digits")


@pytest.mark.fault("R69")
@pytest.mark.parametrize("is_settled", [False, True])
def test_what_a_hand_took_out_is_replaced_by_nothing_and_comes_back_first(
    home: Workspace, monkeypatch: pytest.MonkeyPatch, is_settled: bool
) -> None:
    monkeypatch.setattr(tracking, "bundle_of", lambda *_: None)
    put(home, "1")
    put(home, "2")
    client = client_of(home)
    client.delete_registered_model_alias("digits", "champion")
    if is_settled:
        promotion.settle(client, "digits")
    with pytest.raises(RegistryError, match="nothing of digits is in production"):
        tracking.fetch(client, "digits", "champion")
    assert promotion.stands_in(client, "digits") == ""
    assert promotion.rollback(client, "digits").champion == "2"
    client.delete_registered_model_alias("digits", "champion")
    client.delete_model_version("digits", "1")
    assert promotion.rollback(client, "digits").champion == "2"
    client.delete_registered_model_alias("digits", "champion")
    promotion.settle(client, "digits")
    client.delete_model_version("digits", "2")
    # It is deleted after it was taken out: nobody answers in its place.
    with pytest.raises(RegistryError, match=r"no model digits@champion"):
        tracking.fetch(client, "digits", "champion")
    with pytest.raises(RegistryError, match=r"nothing of digits is in production, and no version"):
        promotion.rollback(client, "digits")


@pytest.mark.fault("R69")
@pytest.mark.parametrize("is_settled", [False, True])
def test_a_rollback_passes_versions_that_were_deleted(
    home: Workspace, monkeypatch: pytest.MonkeyPatch, is_settled: bool
) -> None:
    monkeypatch.setattr(tracking, "bundle_of", lambda _, version: version.version)
    client = client_of(home)
    (run,) = client.search_runs(["1"], max_results=1)
    for number in ("1", "2", "3", "4"):
        if int(number) > 2:
            client.create_model_version("digits", f"{run.info.artifact_uri}/x", run.info.run_id)
        put(home, number)
    client.delete_model_version("digits", "3")
    assert promotion.rollback(client, "digits").champion == "2"
    put(home, "4")
    client.delete_model_version("digits", "4")
    if is_settled:
        settled = promotion.settle(client, "digits")
        assert settled is not None
        assert settled.kind == moves.DELETION
    assert "version 2 answers" in promotion.stands_in(client, "digits")
    assert tracking.fetch(client, "digits", "champion").version == "2"
    assert promotion.rollback(client, "digits").champion == "2"


@pytest.mark.fault("R69")
def test_who_stands_in_is_what_was_once_put_in(
    home: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "bundle_of", lambda _, version: version.version)
    put(home, "1")
    put(home, "2")
    client = client_of(home)
    client.set_model_version_tag("digits", "1", moves.BUNDLE_TAG, "f" * 64)
    client.delete_model_version("digits", "2")
    with pytest.raises(RegistryError, match="nothing of digits is in production"):
        tracking.fetch(client, "digits", "champion")


@pytest.mark.fault("R62")
def test_history_says_that_moves_of_a_deleted_model_are_kept(home: Workspace) -> None:
    put(home, "1")
    put(home, "2")
    client = client_of(home)
    client.delete_registered_model("digits")
    client.create_registered_model("digits")
    printed = home.call("history").stdout
    assert "2 moves of a model digits that was deleted in MLflow are not shown" in printed
    assert "digits-history" in printed


@pytest.mark.fault("R63")
def test_a_missing_bundle_is_named_with_its_place(home: Workspace) -> None:
    with tracking.connection(home.path) as client:
        version = tracking.find_version(client, "digits", "1")
        place = f"{local.artifacts(home.path)}/.*/bundle"
        with pytest.raises(RegistryError, match=f"digits version 1 has no bundle at {place}: "):
            tracking.bundle_of(client, version)


@pytest.mark.fault("R63")
def test_artifacts_of_a_shared_registry_that_lie_in_one_project_are_named(
    home: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with tracking.connection(home.path) as client:
        run = client.get_run(str(client.get_model_version("digits", "1").run_id))
        assert tracking.only_here(client, run.info.artifact_uri, home.path) == ""
    elsewhere = tmp_path_factory.mktemp("shared")
    address = f"sqlite:///{elsewhere}/shared.db"
    with tracking.connection(home.path, create=True, address=address) as client:
        place = str(home.path / "mlruns")
        run = client.create_run(client.create_experiment("digits", artifact_location=place))
        where = run.info.artifact_uri
        assert tracking.only_here(client, where, home.path).startswith(place)
        assert tracking.only_here(client, where, elsewhere) == ""


@pytest.mark.fault("R64")
def test_versions_that_cannot_be_compared_are_not_called_failed(
    main_job: Workspace, tmp_path: Path
) -> None:
    bundle = bundles.load(main_job.path / "artifacts/export/bundle")
    nowhere = Measured(tmp_path / "pixels", tmp_path / "manifest", tmp_path / "split")
    with pytest.raises(ComparisonError, match="is not here, so the version cannot be compared"):
        nowhere.check(bundle)
    assert ComparisonError.exit_code == RegistryError.exit_code


@pytest.mark.fault("R64")
def test_the_champion_alone_is_compared_with_nothing(home: Workspace) -> None:
    put(home, "1")
    client = client_of(home)
    with pytest.raises(RegistryError, match="'tlpipe compare digits@1 digits@2'"):
        promotion._registered_rivals(client, "digits", "1", None, Bounds())
    client.delete_model_version("digits", "2")
    with pytest.raises(RegistryError, match="there is no other version yet to compare it with"):
        promotion._registered_rivals(client, "digits", "1", None, Bounds())


@pytest.mark.fault("E32")
def test_what_was_made_without_a_commit_is_said_in_words(tmp_path: Path) -> None:
    plain = Workspace(tmp_path)
    plain.run("git", "init", "-q")
    (tmp_path / "a").write_text("a")
    plain.run("git", "add", "a")
    assert versioning.of_inputs(tmp_path)["git_commit"] == versioning.NO_COMMIT
    who = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    plain.run("git", *who, "commit", "-qm", "a")
    commit = versioning.of_inputs(tmp_path)["git_commit"]
    assert versioning.is_commit(commit)
    (tmp_path / "a").write_text("b")
    changed = versioning.of_inputs(tmp_path)["git_commit"]
    assert changed == f"{commit} with uncommitted changes"
    assert not versioning.is_commit(changed)


def test_live_curves_cost_a_training_little_where_the_server_says_nothing(
    home: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = [0.0], list[float]()
    real = tracking.connection

    @contextmanager
    def silent(workspace: Path) -> Iterator[MlflowClient]:
        asked.append(clock[0])
        clock[0] += 60
        if clock[0] < 1500:
            raise UnreachableError("nobody answers.")
        with real(workspace) as client:
            yield client

    steps = list[Step]()
    with tracking.live_run(home.path, "digits") as log:
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(tracking, "connection", silent)
        for epoch in range(300):
            clock[0] += 5
            steps.append(Step(1 / (epoch + 1), Validation(loss=1.0, accuracy=0.5)))
            log(steps)
    # In 1,500 s of training, three attempts of a minute, and one when it has ended.
    assert len(asked) <= 5
    client = client_of(home)
    (run,) = client.search_runs(["1"], "tags.`tlpipe.kind` = 'training'")
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 300
