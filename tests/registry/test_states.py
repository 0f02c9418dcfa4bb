"""What commands say where nothing is there, nothing is in production, or something is gone."""

from pathlib import Path

import pytest

from tests.conftest import Workspace
from tests.registry.test_promotion import client_of
from tlpipe import bundle as bundles
from tlpipe import versioning
from tlpipe.errors import ComparisonError, RegistryError
from tlpipe.registry import local, moves, promotion, tracking
from tlpipe.registry.gate import Bounds, Measured


@pytest.fixture
def home(empty: Workspace) -> Workspace:
    """A project whose registry holds versions 1 and 2 of a model, without bundles."""
    with tracking.connection(empty.path, create=True) as client:
        experiment = tracking.experiment(client, "digits", empty.path)
        client.create_registered_model("digits")
        for _ in range(2):
            run = client.create_run(experiment)
            place = f"{run.info.artifact_uri}/model"
            client.create_model_version("digits", place, run_id=run.info.run_id)
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
        run_id = str(client.get_model_version("digits", "1").run_id)
        assert tracking.only_here(client, run_id, home.path) == ""
    elsewhere = tmp_path_factory.mktemp("shared")
    address = f"sqlite:///{elsewhere}/shared.db"
    with tracking.connection(home.path, address=address) as client:
        place = str(home.path / "mlruns")
        run = client.create_run(client.create_experiment("digits", artifact_location=place))
        assert tracking.only_here(client, run.info.run_id, home.path).startswith(place)
        assert tracking.only_here(client, run.info.run_id, elsewhere) == ""


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
