"""Data under DVC: added, pushed, pulled, taken back; which version a model has seen."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
import yaml
from PIL import Image

from tests.conftest import INGEST, Workspace

pytestmark = pytest.mark.slow

COMMIT = ("-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qam")


def photographs(workspace: Workspace, count: int) -> None:
    """Fill data/photos up to so many images of each of two kinds of noise."""
    for label, amount in (("rough", 120), ("smooth", 20)):
        folder = workspace.path / "data" / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            if not (folder / f"{number}.png").exists():
                noise = Image.effect_noise((40 + number, 40), amount)
                noise.save(folder / f"{number}.png")


def commit(workspace: Workspace, message: str) -> None:
    workspace.run("git", "add", "--all")
    workspace.run("git", *COMMIT, message)


def test_data_go_to_a_remote_and_back_and_an_older_version_is_restored(
    workspace: Workspace, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    photographs(workspace, 20)
    workspace.run("dvc", "add", "data/photos")
    workspace.set_source("data/photos")
    workspace.use_small_network()
    workspace.run("git", "init", "-q", "--bare", str(tmp_path / "origin.git"))
    workspace.run("git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    commit(workspace, "data")
    workspace.run("dvc", "repro")
    first = (workspace.path / "artifacts/export/bundle/model.onnx").read_bytes()
    commit(workspace, "one")
    version = yaml.safe_load((workspace.path / "data/photos.dvc").read_text())["outs"][0]["md5"]
    _reaches_everything(workspace, version)

    photographs(workspace, 30)
    workspace.run("dvc", "add", "data/photos")
    workspace.run("dvc", "repro")
    assert (workspace.path / "artifacts/export/bundle/model.onnx").read_bytes() != first
    commit(workspace, "two")
    _are_compared(workspace, tmp_path / "compared")
    workspace.run("dvc", "push", "--all-commits")
    workspace.run("git", "push", "-q", "origin", "HEAD")

    clone = Workspace(tmp_path / "clone", cache_env)
    workspace.run("git", "clone", "-q", str(workspace.path), str(clone.path))
    clone.run("dvc", "pull")
    assert len(list((clone.path / "data/photos/rough").iterdir())) == 30
    assert "Data and pipelines are up to date" in clone.run("dvc", "repro", "evaluate").stdout

    clone.run("git", "checkout", "-q", "HEAD~1")
    clone.run("dvc", "pull")
    assert len(list((clone.path / "data/photos/rough").iterdir())) == 20
    assert (clone.path / "artifacts/export/bundle/model.onnx").read_bytes() == first
    assert "Running stage" not in clone.run("dvc", "repro", "evaluate").stdout
    registry = {"MLFLOW_TRACKING_URI": f"sqlite:///{workspace.path / 'mlflow.db'}"}
    (tmp_path / "elsewhere").mkdir()
    _lose_bundle(workspace, first)
    elsewhere = Workspace(tmp_path / "elsewhere", cache_env | registry)
    _is_rebuilt(elsewhere, str(tmp_path / "origin.git"), first)


def _are_compared(workspace: Workspace, page: Path) -> None:
    """Both versions in every plot, and both of each picture."""
    workspace.run("dvc", "plots", "diff", "HEAD~1", "--out", str(page))
    text = (page / "index.html").read_text()
    for title in ("Confusion on the test split", "How often answers of each confidence are right"):
        assert title in text
    for name in ("HEAD~1", "workspace"):
        assert f'"rev": "{name}"' in text
        pictures = {path.name for path in (page / "static").glob(f"{name}_*.png")}
        assert any("mistakes.png" in picture for picture in pictures)
        assert any("label_issues.png" in picture for picture in pictures)


def _lose_bundle(workspace: Workspace, graph: bytes) -> None:
    """Take the stored bundle with this graph out of the registry's artifacts."""
    stored = (workspace.path / "mlartifacts").rglob("bundle/model.onnx")
    (lost,) = (path.parent for path in stored if path.read_bytes() == graph)
    shutil.rmtree(lost)


def _is_rebuilt(elsewhere: Workspace, repository: str, graph: bytes) -> None:
    """From the registry's address and the repository, which the registry alone does not decide."""
    failed = elsewhere.run("tlpipe", "rebuild", "digits@1", "--yes", code=8).stderr
    assert f"it names {repository}, whose code is not run for that alone" in failed
    command = ("tlpipe", "rebuild", "digits@1", "--repository", repository, "--yes")
    said = elsewhere.run(*command, "--output", "kept")
    assert "the stored bundle is lost, its digest is known" in said.stderr
    assert "digits@1 (digits version 1) came out with the same bytes" in said.stdout
    assert (elsewhere.path / "kept/model.onnx").read_bytes() == graph
    assert "is intact" in elsewhere.run("tlpipe", "verify", "kept").stdout
    assert elsewhere.names() == ["kept"]
    error = elsewhere.run("tlpipe", "rebuild", "digits@2", "--yes", code=8).stderr
    assert "digits version 2 was made from " in error
    assert " with uncommitted changes: it cannot be rebuilt" in error


def _reaches_everything(workspace: Workspace, version: str) -> None:
    """The manifest, the bundle, the ONNX file's metadata and the MLflow run know the version."""
    assert version.endswith(".dir")
    rows = workspace.rows("artifacts/ingest/manifest.csv")
    assert {row["data_version"] for row in rows} == {version}
    model = onnx.load(workspace.path / "artifacts/export/bundle/model.onnx")
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    assert json.loads(metadata["tlpipe.provenance"])["origin"]["data_version"] == version
    run_id = json.loads((workspace.path / "artifacts/register/receipt.json").read_text())["run_id"]
    program = (
        "import json, mlflow; mlflow.set_tracking_uri('sqlite:///mlflow.db'); "
        f"run = mlflow.get_run({run_id!r}); dataset = run.inputs.dataset_inputs[0].dataset; "
        "print(json.dumps([run.data.tags['tlpipe.data_version'], json.loads(dataset.source)]))"
    )
    tag, source = json.loads(workspace.run("python", "-c", program).stdout)
    assert tag == source["data_version"] == version


def test_data_go_to_a_bucket_and_back(
    workspace: Workspace, bucket: dict[str, str], tmp_path: Path
) -> None:
    local = Workspace(workspace.path, {**workspace.env, **bucket})
    photographs(local, 5)
    local.run("dvc", "add", "data/photos")
    local.run("dvc", "remote", "add", "--default", "store", "s3://bucket/store")
    commit(local, "photos")
    local.run("dvc", "push")
    clone = Workspace(tmp_path / "clone", local.env)
    local.run("git", "clone", "-q", str(local.path), str(clone.path))
    clone.run("dvc", "pull", "data/photos.dvc")
    names = [path.name for path in (clone.path / "data/photos/rough").iterdir()]
    assert sorted(names) == [f"{number}.png" for number in range(5)]
    for name in names:
        here, there = (w.path / "data/photos/rough" / name for w in (local, clone))
        assert here.read_bytes() == there.read_bytes()


@pytest.mark.fault("D22", "D23")
def test_classes_that_changed_since_the_champion_are_said_before_training(
    workspace: Workspace,
) -> None:
    photographs(workspace, 20)
    workspace.set_source("data/photos")
    workspace.use_small_network()
    assert "differ from those" not in workspace.reproduce()
    (workspace.path / "data/photos/smooth").rename(workspace.path / "data/photos/silky")
    said = workspace.reproduce("train")
    assert "the classes differ from those of digits@champion: gone: smooth; new: silky" in said


@pytest.mark.fault("D55")
def test_a_version_that_dvc_cannot_tell_is_no_empty_one(workspace: Workspace) -> None:
    """In a repository whose dvc.yaml is damaged; outside of one there is no version."""
    (workspace.path / "dvc.yaml").write_text("stages: {\n")
    error = workspace.call(*INGEST, code=4).stderr
    assert "DVC cannot tell the version of ingest.source: " in error
    assert "'dvc status ingest' shows more" in error
    assert not (workspace.path / "artifacts/ingest" / "manifest.csv").exists()
    shutil.rmtree(workspace.path / ".dvc")
    workspace.call(*INGEST)
    assert {row["data_version"] for row in workspace.rows("artifacts/ingest/manifest.csv")} == {""}
