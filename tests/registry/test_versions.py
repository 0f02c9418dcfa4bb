"""The commands models, show, compare and download, and which version promote means."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest

from tests.conftest import Workspace
from tests.registry.conftest import change_bundle
from tlpipe import bundle as bundles
from tlpipe import files, graph
from tlpipe.errors import ArtifactError
from tlpipe.registry import Registered, versions

BUNDLE = "artifacts/export/bundle"


@pytest.fixture
def copied(main_job: Workspace, tmp_path: Path, own_artifacts: None) -> Workspace:
    """A project with a registry of its own that holds what the main job registered."""
    target = tmp_path / "copied"
    target.mkdir()
    for name in ("params.yaml", "dvc.yaml", graph.LOCK, "mlflow.db"):
        shutil.copy(main_job.path / name, target)
    copy = files.link_or_copy
    shutil.copytree(main_job.path / "mlartifacts", target / "mlartifacts", copy_function=copy)
    (target / "data").symlink_to(main_job.path / "data")
    (target / "artifacts").symlink_to(main_job.path / "artifacts")
    return Workspace(target, {**main_job.env, "COLUMNS": "200"})


def client_of(workspace: Workspace) -> mlflow.MlflowClient:
    workspace.call("models")  # locations of artifacts are those of its folder from then on
    return mlflow.MlflowClient(f"sqlite:///{workspace.path / 'mlflow.db'}")


def colleague(workspace: Workspace) -> None:
    """Let somebody else register a later version of another bundle."""
    client = client_of(workspace)
    first = client.get_model_version("digits", "1")
    tags = {**first.tags, "tlpipe.bundle": "f" * 64}
    assert first.source is not None
    client.create_model_version("digits", first.source, first.run_id, tags=tags)
    client.set_registered_model_alias("digits", "challenger", "2")


def state(workspace: Workspace) -> tuple[dict[str, str], int]:
    client = mlflow.MlflowClient(f"sqlite:///{workspace.path / 'mlflow.db'}")
    log = client.search_model_versions("name = 'digits-history'")
    return client.get_registered_model("digits").aliases, len(log)


def test_models_lists_versions_with_accuracy_aliases_and_origin(copied: Workspace) -> None:
    colleague(copied)
    report = json.loads((copied.path / graph.PATHS["report"]).read_text())
    accuracy = report["precisions"]["fp32"]["accuracy"]
    first, second = json.loads(copied.call("models", "--json").stdout)
    assert first["accuracy"] == {key: accuracy[key] for key in ("value", "low", "high")}
    assert (first["version"], first["aliases"]) == ("1", ["champion"])
    assert (second["version"], second["aliases"]) == ("2", ["challenger"])
    assert first["bundle"] == bundles.digest(copied.path / BUNDLE)
    commit = bundles.load(copied.path / BUNDLE).provenance["git_commit"]
    assert (first["git_commit"], first["git_changed"]) == (commit, False)
    assert first["registered_by"]
    table = copied.call("models", "digits").stdout
    interval = f"{accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})"
    assert interval in table
    assert commit[:10] in table


@pytest.mark.fault("R36", "R50")
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("models", "digits@1"), 3, "digits@1 is no name of a model; expected a name alone"),
        (("models", "nobody"), 8, "the registry has no model nobody"),
        (("models", "digits-history"), 8, "digits-history keeps what was in production of digits"),
        (("show", "digits@9"), 8, "the registry has no version 9 of digits. Expected one that is"),
        (("show", "digits"), 3, "such as digits@champion"),
        (("download", "digits", "new"), 3, "digits names no registered version; expected NAME@AL"),
        (("compare", "digits@1"), 8, "version 1 is the one in production; "),
        (
            ("compare", "digits@1", "digits@1"),
            8,
            "digits@1 and digits@1 are the same bundle, sha256 ",
        ),
        (("compare", BUNDLE, "./" + BUNDLE), 8, "are the same bundle, sha256 "),
        (("compare", BUNDLE), 8, f"{BUNDLE} and digits@1 are the same bundle, sha256 "),
        (("compare", "digits@1", "digits@no"), 8, "the registry has no model digits@no"),
        (("promote", "flowers@1"), 3, "flowers@1 is a version of flowers; expected one of digits"),
        (("rollback", "flowers@1"), 3, "flowers@1 is a version of flowers; expected one of digits"),
        (("promote", "--force"), 3, "--force was given without a reason"),
        (("promote", "./nothing"), 3, "./nothing names no model: there is no such folder"),
        (("verify", "digits@1", "--signature", "x"), 3, "--signature x has no effect"),
        (("rebuild", "digits"), 3, "digits names no model"),
    ],
)
def test_what_cannot_be_is_one_line(
    main_job: Workspace, words: tuple[str, ...], code: int, message: str
) -> None:
    (line,) = main_job.call(*words, code=code).stderr.splitlines()
    assert message in line


def test_show_says_what_a_version_is_and_was_measured_at(copied: Workspace) -> None:
    bundle = bundles.load(copied.path / BUNDLE)
    report = json.loads((copied.path / graph.PATHS["report"]).read_text())
    found = json.loads(copied.call("show", "digits@champion", "--json").stdout)
    assert (found["version"], found["bundle"]) == ("1", bundle.digest)
    assert found["classes"] == list(bundle.labels)
    assert found["provenance"] == bundle.provenance
    assert found["precisions"].keys() == report["precisions"].keys()
    for precision, measured in report["precisions"].items():
        assert found["precisions"][precision]["accuracy"] == measured["accuracy"]
    copies = json.loads((copied.path / graph.PATHS["leaks_report"]).read_text())
    kept = {name: report[name] for name in ("generalisation", "abstention", "ood")}
    assert found["limits"] == {**kept, "copies": copies}
    (move,) = found["moves"]
    assert (move["kind"], move["version"], move["previous"]) == ("promotion", "1", "")
    assert (found["gate"], found["is_signed"]) == ("passed", False)
    table = copied.call("show", "digits@1").stdout
    for text in ("champion", bundle.digest, "promotion", "int8", "efficientnet_lite0"):
        assert text in table
    assert f"AUROC {report['ood']['auroc']:.3f} on {report['ood']['images']}" in table
    folder = json.loads(copied.call("show", BUNDLE, "--json").stdout)
    assert folder == {
        "folder": BUNDLE,
        **{key: found[key] for key in ("bundle", "classes", "graphs", "is_signed")},
        **{key: found[key] for key in ("preprocessing", "provenance")},
    }
    assert bundle.digest in copied.call("show", f"./{BUNDLE}").stdout


@pytest.mark.fault("R38")
def test_a_download_is_the_verified_bundle_and_overwrites_nothing(
    copied: Workspace, tmp_path: Path
) -> None:
    expected = bundles.digest(copied.path / BUNDLE)
    said = copied.call("download", "digits@champion", "deployed/model").stdout
    assert f"deployed/model is digits@champion, intact: {expected}" in said
    there = copied.path / "deployed"
    assert Workspace(there).names() == ["model"]
    assert bundles.load(there / "model").digest == expected
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    for folder in ("deployed/model", "deployed", "params.yaml"):
        error = copied.call("download", "digits@1", folder, code=6).stderr
        assert f"{folder} is there already; nothing was written" in error
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
    # What is stored is damaged: nothing is left.
    stored = client_of(copied).get_model_version("digits", "1").run_id
    (graph_file,) = (copied.path / "mlartifacts").glob(f"**/{stored}/artifacts/bundle/model.onnx")
    content = graph_file.read_bytes()
    graph_file.unlink()
    graph_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.onnx" in copied.call("download", "digits@1", "other", code=6).stderr
    assert not (copied.path / "other").exists()


@pytest.mark.fault("R38")
def test_a_download_that_ends_half_way_leaves_no_folder(
    copied: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied loses a byte on the way to the disk, or somebody else writes there first."""
    target, load = copied.path / "new", bundles.load

    def download() -> None:
        versions.download(copied.path, Registered("digits", "1"), target)

    def somebody_is_faster(folder: Path) -> None:
        target.mkdir()
        (target / "theirs").touch()

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush_folder", somebody_is_faster)
        with pytest.raises(ArtifactError, match="is there already"):
            download()
    assert Workspace(target).names() == ["theirs"]
    shutil.rmtree(target)

    def damaged(folder: Path) -> bundles.Bundle:
        if folder.parent.name.endswith(".partial"):
            (folder / "labels.json").write_text("[]")
        return load(folder)

    monkeypatch.setattr(bundles, "load", damaged)
    with pytest.raises(ArtifactError, match=r"labels\.json"):
        download()
    assert not [path for path in copied.path.iterdir() if "new" in path.name]


def test_a_signature_comes_along(copied: Workspace) -> None:
    copied.make_keys("key")
    copied.call("sign", "digits@1", "--key", "key.pem")
    said = copied.call("download", "digits@1", "new").stdout
    assert "its signature new.sig" in said
    assert "signed by the owner" in copied.call("verify", "new", "--key", "key.pub").stdout
    shutil.rmtree(copied.path / "new")
    (copied.path / "new.sig").write_text("another one")
    error = copied.call("download", "digits@1", "new", code=6).stderr
    assert "new.sig is there and is not the signature of digits@1" in error
    assert not (copied.path / "new").exists()


@pytest.mark.fault("R37")
def test_promote_means_what_this_project_registered_last_and_not_a_colleague_s(
    copied: Workspace,
) -> None:
    """A colleague's version is the newest and the challenger; the champion is this project's."""
    colleague(copied)
    before = state(copied)
    for words in ((), ("1",), ("digits@1",), ("champion",), (f"./{BUNDLE}",)):
        error = copied.call("promote", *words, code=8).stderr
        assert "digits version 1 is in production already" in error, words
    assert "is in production" not in copied.call("promote", "2", code=8).stderr
    assert state(copied) == before
    receipt = json.loads((copied.path / graph.PATHS["receipt"]).read_text())
    (copied.path / "artifacts").unlink()
    files.write_json(copied.path / graph.PATHS["receipt"], {**receipt, "name": "flowers"})
    error = copied.call("promote", code=8).stderr
    assert "is of the model flowers, params.yaml names digits" in error


@pytest.mark.slow
def test_compare_says_what_the_gate_finds_and_moves_nothing(released: Workspace) -> None:
    before = state(released)
    provenance = bundles.load(released.path / BUNDLE).provenance
    change_bundle(released, provenance=provenance | {"by": "me"})
    found = json.loads(released.call("compare", BUNDLE, "digits@1", "--json").stdout)
    assert (found["candidate"], found["champion"], found["verdict"]) == (BUNDLE, "1", "holds")
    (beside,) = found["numbers"]["compared"]
    assert beside["accuracy"] == found["numbers"]["accuracy"]
    assert (beside["change"]["value"], beside["trained_on"]) == (0, 0)
    assert "validation" in {rule["name"] for rule in found["rules"]}
    released.configure("register", gate={"min_accuracy": 0.99, "min_recall": 0.1})
    failed = released.call("compare", f"./{BUNDLE}", code=11)
    assert f"{BUNDLE} against digits version 1" in failed.stdout
    assert f"./{BUNDLE} would stay out of production: accuracy fails." in failed.stderr
    assert state(released) == before


def test_what_was_not_measured_here_cannot_be_compared(copied: Workspace) -> None:
    (copied.path / "artifacts").unlink()
    error = copied.call("compare", "digits@1", "digits@champion", code=8).stderr
    assert "so the version cannot be compared on its test images" in error
