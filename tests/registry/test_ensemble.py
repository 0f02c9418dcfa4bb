"""tlpipe ensemble: several versions as one, in a registry and a project as they are used."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from filelock import FileLock
from PIL import Image
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from tests.conftest import Workspace, copy_repository
from tests.registry.conftest import change_bundle
from tlpipe import Predictor, bundle, held_out
from tlpipe.data import pixels
from tlpipe.data.manifest import load_split, rows_of
from tlpipe.evaluation import evaluate
from tlpipe.registry import local

pytestmark = pytest.mark.slow
# A linear probe, two that were fine-tuned alike but for the seed, and one of larger images, which
# are what the workspace stores last.
SLOWLY = {"epochs": 3, "head_lr": 3e-4, "backbone_lr": 3e-5}
VERSIONS: tuple[dict[str, dict[str, object]], ...] = (
    {"embed": {"backbone": "timm/test_resnet", "freeze": "all"}, "train": {}},
    {"embed": {"backbone": "timm/test_resnet", "freeze": 3}, "train": {**SLOWLY, "seed": 0}},
    {"embed": {"backbone": "timm/test_resnet", "freeze": 3}, "train": {**SLOWLY, "seed": 1}},
    {"embed": {"backbone": "shufflenet_v2_x0_5", "freeze": "all"}, "train": {}},
)


def section(workspace: Workspace, name: str, values: dict[str, object]) -> None:
    """Set a whole section of the parameters."""
    path = workspace.path / "params.yaml"
    params = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**params, name: values}, sort_keys=False))


@pytest.fixture(scope="session")
def members_made(kept: Path, cache_env: dict[str, str]) -> Workspace:
    """A project with four registered versions on random weights."""
    kept.mkdir(parents=True, exist_ok=True)
    target, made = kept / "members", kept / "members made"
    with FileLock(kept / "members lock"):
        if made.exists():
            return Workspace(target, cache_env)
        workspace = copy_repository(target, cache_env)
        workspace.replace("data/digits.yaml", "images_per_class: 100", "images_per_class: 24")
        workspace.configure("register", gate={"min_accuracy": 0.1, "min_recall": 0.0})
        workspace.configure("evaluate", ood=None)
        workspace.configure("embed", weights="none")
        for version in VERSIONS:
            workspace.configure("embed", **version["embed"])
            section(workspace, "train", version["train"])
            workspace.reproduce()
        made.touch()
    return workspace


def copied(source: Workspace, target: Path) -> Workspace:
    """Return a copy of a project with its registry."""
    shutil.copytree(source.path, target, symlinks=True)
    with local.opened(target):
        pass
    return Workspace(target, source.env)


@pytest.fixture
def members(
    members_made: Workspace,
    tmp_path: Path,
    own_artifacts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Workspace:
    """A copy of the project, which stores squares of 256 px."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return copied(members_made, tmp_path / "members")


@pytest.fixture(scope="module")
def mixed_made(
    members_made: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, str]:
    """A project in which an ensemble was made, and what that printed."""
    from mlflow.tracking._tracking_service import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("COLUMNS", "150")
        patch.setattr(utils, "_artifact_repos_cache", type(utils._artifact_repos_cache)())
        workspace = copied(members_made, tmp_path_factory.mktemp("mixed") / "copy")
        done = workspace.call("ensemble", "digits@champion", "digits@2", "models:/digits/4")
        return workspace, done.stdout + done.stderr


@pytest.fixture
def mixed(
    mixed_made: tuple[Workspace, str],
    tmp_path: Path,
    own_artifacts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Workspace:
    """A copy of it: digits@5 is an ensemble of digits@1 and digits@2."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return copied(mixed_made[0], tmp_path / "mixed")


def run_of(workspace: Workspace, version: int) -> Path:
    """Return where the artifacts of a version's run lie."""
    client = mlflow.MlflowClient(f"sqlite:///{workspace.path / 'mlflow.db'}")
    run_id = client.get_model_version("digits", str(version)).run_id
    (folder,) = workspace.path.glob(f"mlartifacts/**/{run_id}/artifacts")
    return folder


def features_and_logits(graph: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the last layer of a graph takes and gives."""
    model = onnx.load(graph)
    last = next(node for node in model.graph.node if node.output[0] == "logits")
    taken = onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None)
    model.graph.output.append(taken)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return tuple(session.run([last.input[0], "logits"], {"images": images}))


def small(squares: np.ndarray) -> np.ndarray:
    """Return squares (N, 256, 256, 3) as test_resnet wants them: 168 px, the middle 160 kept."""
    resized = [
        np.asarray(Image.fromarray(one).resize((168, 168), Image.Resampling.BILINEAR))
        for one in squares
    ]
    return np.ascontiguousarray(np.stack(resized)[:, 4:164, 4:164])


def answers_of(workspace: Workspace, rows: list[int], *, is_held_out: bool) -> np.ndarray:
    """Return log probabilities (2, N, C) of digits@1 and digits@2, each asked by itself."""
    squares = pixels.load(workspace.path / "artifacts/ingest/pixels").array[rows]
    found = []
    for version in (1, 2):
        folder = run_of(workspace, version)
        taken, logits = features_and_logits(folder / "bundle/model.onnx", small(squares))
        held = held_out.load(folder / "trained/held_out.safetensors")
        if is_held_out and held.heads:  # a linear probe: the fold's head has not seen the image
            for place, row in enumerate(rows):
                weight, bias = held.heads[held.folds[held.rows.tolist().index(row)]]
                logits[place] = taken[place] @ weight.T + bias
        temperature = json.loads((folder / "parity.json").read_text())["temperature"]
        found.append(log_softmax(logits.astype(np.float64) / temperature, axis=1))
    return np.stack(found)


def truth_of(workspace: Workspace, split: str) -> tuple[list[int], np.ndarray]:
    """Return the rows of a split, and their classes: digits are their own numbers."""
    table = load_split(workspace.path / "artifacts/split/split.csv")
    rows = rows_of(table, split)
    return rows, np.array([int(table[row].label) for row in rows])


def test_weights_and_answers_are_those_of_the_members_asked_alone(mixed: Workspace) -> None:
    found = bundle.load(mixed.path / "artifacts/ensemble/bundle")
    rows, truth = truth_of(mixed, "validation")
    answers = answers_of(mixed, rows, is_held_out=True)
    likely = np.exp(answers[:, np.arange(len(truth)), truth])
    solved = minimize(
        lambda w: -np.log(w @ likely).mean(),
        np.full(2, 0.5),
        method="SLSQP",
        bounds=[(0, 1)] * 2,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12},
    ).x
    parts = found.provenance["ensemble"]
    assert [part["model"] for part in parts] == ["digits@1", "digits@2"]
    weights = np.array([part["weight"] for part in parts])
    np.testing.assert_allclose(weights, solved, atol=2e-3)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    tested, truth = truth_of(mixed, "test")
    alone = answers_of(mixed, tested, is_held_out=False)
    pool = logsumexp(alone, axis=0, b=weights[:, None, None])
    squares = pixels.load(mixed.path / "artifacts/ingest/pixels").array[tested]
    logits, probabilities = Predictor(found).scores(squares)
    # Pillow and ONNX Runtime round a grey level otherwise now and then.
    np.testing.assert_allclose(np.exp(logits), np.exp(pool), atol=5e-3)
    expected = softmax(logits.astype(np.float64) / found.provenance["temperature"], axis=1)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    # Of what is said of each image held out, without it: the temperature of the least loss.
    fitted_on = held_out.load(run_of(mixed, 5) / "trained/held_out.safetensors")
    divisor = minimize_scalar(
        lambda t: (
            -log_softmax(fitted_on.logits / t, axis=1)[
                np.arange(len(rows)), fitted_on.labels
            ].mean()
        ),
        bounds=(0.05, 20),
        method="bounded",
    ).x
    assert found.provenance["temperature"] == pytest.approx(divisor, rel=0.02)
    report = json.loads((mixed.path / "artifacts/ensemble/report.json").read_text())
    accuracy = (logits.argmax(axis=1) == truth).mean()
    assert report["precisions"]["fp32"]["accuracy"]["value"] == pytest.approx(accuracy)
    # What is said of validation is by weights that were fitted without the image.
    held = held_out.load(run_of(mixed, 5) / "trained/held_out.safetensors")
    assert held.rows.tolist() == rows
    fitted = logsumexp(answers, axis=0, b=weights[:, None, None])
    np.testing.assert_allclose(np.exp(held.logits), np.exp(fitted), atol=0.3)
    of_truth = np.arange(len(rows)), held.labels
    assert -held.logits[of_truth].mean() > -fitted[of_truth].mean()


def test_it_is_said_of_what_it_was_made(mixed_made: tuple[Workspace, str]) -> None:
    workspace, said = mixed_made
    made = json.loads((workspace.path / "artifacts/ensemble/members.json").read_text())
    assert [row["name"] for row in made["members"]] == ["digits@1", "digits@2", "digits@4"]
    assert made["members"][2]["weight"] == 0
    best = next(row for row in made["members"] if row["name"] == made["best"])
    gained = made["together"]["test"]["value"] - best["test"]["value"]
    assert made["change"]["value"] == pytest.approx(gained, abs=1e-12)
    assert "next: tlpipe compare digits@5 | tlpipe promote digits@5" in said
    assert "left out, since on images held out nothing is gained by it: digits@4" in said
    assert "on 45 test images, beside digits@2, the best member on images held out: " in said
    part = bundle.describe(bundle.load(workspace.path / "artifacts/ensemble/bundle").provenance)
    assert part.startswith("ensemble of digits@1 (0.")
    assert part in " ".join(workspace.call("show", "digits@5", "--json").stdout.split())
    listed = json.loads(workspace.call("models", "--json").stdout)
    assert [one["made_of"] for one in listed] == ["", "", "", "", part]
    assert listed[4]["aliases"] == ["challenger"]
    client = mlflow.MlflowClient(f"sqlite:///{workspace.path / 'mlflow.db'}")
    assert part in str(client.get_model_version("digits", "5").description)
    plots = {path.name for path in (run_of(workspace, 5) / "plots").iterdir()}
    assert {"ensemble.png", "confusion.png"} <= plots
    assert "training.png" not in plots
    with Image.open(workspace.path / "artifacts/ensemble/plots/ensemble.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_it_is_gated_promoted_downloaded_and_served_as_any_other(
    mixed: Workspace, tmp_path: Path
) -> None:
    bounds = {"min_accuracy": 0.1, "min_recall": 0.0, "max_accuracy_drop": 0.9}
    mixed.configure("register", gate=bounds)
    assert "accuracy_change" in mixed.call("compare", "digits@5").stdout
    assert "digits version 5 is in production" in mixed.call("promote", "5").stdout
    mixed.call("verify", "digits@champion")
    mixed.call("download", "digits@champion", str(tmp_path / "out"))
    example = mixed.path / "artifacts/ensemble/examples/3.png"
    (answer,) = json.loads(mixed.call("predict", str(example), "--json").stdout)
    found = Predictor(tmp_path / "out").predict(example)
    assert (answer["label"], answer["probability"]) == (found.label, found.probability)


@pytest.mark.fault("R73")
def test_what_needs_one_network_refuses_an_ensemble(mixed: Workspace) -> None:
    given = ("--license", "mit", "--data-license", "mit", "--weights-license", "mit")
    for words, code, message in (
        (("rebuild", "digits@5", "--yes"), 8, "digits version 5 was made of other versions"),
        (("share", "digits@5", "out", *given), 3, "digits@5 is an ensemble of digits@1 (0."),
        (("ensemble", "digits@5", "digits@2"), 3, "digits@5 is itself made of digits@1 (0."),
    ):
        *_, line = mixed.call(*words, code=code).stderr.splitlines()
        assert message in line
    mixed.configure("embed", weights="models:/digits@5")
    assert "digits@5 is an ensemble, and embed.weights takes one" in mixed.embed(code=8)


@pytest.mark.fault("R74")
def test_made_again_it_is_the_same_version_and_a_failure_leaves_it(
    mixed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mixed.path / "artifacts/ensemble"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(**_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "run", full)
        with pytest.raises(OSError, match="No space left"):
            mixed.call("ensemble", "digits@1", "digits@2")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    left = {path.name for path in folder.parent.iterdir() if path.name.startswith(".ens")}
    assert left == {".ensemble.lock"}
    mixed.call("ensemble", "digits@1", "digits@2", "digits@4")
    assert json.loads((folder / "receipt.json").read_text())["version"] == "5"


@pytest.mark.fault("R72")
def test_members_that_do_not_go_together_are_one_line(members: Workspace) -> None:
    folder = members.path / "artifacts/export/bundle"
    for words, code, message in (
        (("digits@1",), 3, "an ensemble of digits@1 alone is digits@1; expected two versions"),
        (("digits@1", "digits@champion"), 3, "digits@1 and digits@1 are the same bundle, sha256"),
        (("digits@1", "digits@9"), 8, "has no version 9 of digits"),
        (("digits@1", "digits"), 3, "such as digits@champion"),
        (("digits@4", str(folder)), 3, "digits@4 and digits@4 are the same bundle"),
        (("digits@2", "digits@3", "--soup"), 3, "digits@2 was trained on squares of 168 px"),
    ):
        *_, line = members.call("ensemble", *words, code=code).stderr.splitlines()
        assert message in line
    table = members.path / "artifacts/split/split.csv"
    known = table.read_text()
    table.write_text(known.replace(",test,", ",validation,", 1))
    *_, line = members.call("ensemble", "digits@1", "digits@2", code=6).stderr.splitlines()
    assert "digits@1 was trained on other data than artifacts/split/split.csv holds" in line
    assert "2 rows differ in name, image, label or split" in line
    table.write_text(known)
    change_bundle(members, labels=tuple("abcdefghij"))
    *_, line = members.call("ensemble", "digits@1", str(folder), code=8).stderr.splitlines()
    assert "is no version of digits" in line
    members.call("register")
    *_, line = members.call("ensemble", "digits@1", "digits@5", code=3).stderr.splitlines()
    assert "digits@5 has other labels than digits@1 (gone: 0, 1, 2" in line
    assert not (members.path / "artifacts/ensemble").exists()


def test_weights_of_two_trainings_are_averaged(members: Workspace) -> None:
    """Where squares are stored as they were trained on; answers held out are then those kept."""
    from safetensors.numpy import load_file

    members.configure("embed", backbone="timm/test_resnet")
    members.ingest()
    members.call("split")
    for words, message in (
        (("digits@1", "digits@2"), "digits@1 is a linear probe"),
        (("digits@4", "digits@2"), "digits@4 was trained on squares of 256 px"),
    ):
        *_, line = members.call("ensemble", *words, "--soup", code=3).stderr.splitlines()
        assert message in line
    said = members.call("ensemble", "digits@2", "digits@3", "--soup").stdout
    assert "its members were chosen on them" in said
    folder = members.path / "artifacts/ensemble"
    model = load_file(folder / "model/model.safetensors")
    parts = [load_file(run_of(members, n) / "trained/model.safetensors") for n in (2, 3)]
    assert model.keys() == parts[0].keys()
    for name, tensor in model.items():
        if tensor.dtype.kind == "f":
            mean = (parts[0][name].astype(np.float64) + parts[1][name]) / 2
            np.testing.assert_allclose(tensor, mean, rtol=1e-6, atol=1e-7)
    shipped = bundle.load(folder / "bundle")
    assert shipped.provenance["soup"] == ["digits@2", "digits@3"]
    # Made again at another commit it has the same bytes, and it claims no training for its own.
    assert (shipped.provenance["git_commit"], shipped.provenance["l2"]) == ("", None)
    held = held_out.load(folder / "model/held_out.safetensors")
    logs = log_softmax(held.logits.astype(np.float64), axis=1)
    loss = -logs[np.arange(len(logs)), held.labels].mean()
    assert shipped.provenance["validation_loss"] == pytest.approx(loss)
    assert shipped.model.stat().st_size < 1.05 * (
        (run_of(members, 2) / "bundle/model.onnx").stat().st_size
    )
    held = held_out.load(folder / "model/held_out.safetensors")
    squares = pixels.load(members.path / "artifacts/ingest/pixels").array[held.rows.tolist()]
    _, logits = features_and_logits(shipped.model, np.ascontiguousarray(squares[:, 4:164, 4:164]))
    np.testing.assert_allclose(held.logits, logits, atol=1e-4)
    kept = [held_out.load(run_of(members, n) / "trained/held_out.safetensors") for n in (2, 3)]
    hits = [(one.logits.argmax(axis=1) == one.labels).mean() for one in [held, *kept]]
    assert hits[0] >= max(hits[1:])
    shown = members.call("show", "digits@5").stdout
    assert "digits@2, digits@3" in shown
    client = mlflow.MlflowClient(f"sqlite:///{members.path / 'mlflow.db'}")
    card = str(client.get_model_version("digits", "5").description)
    assert "Its members were chosen on the images held out" in card
    (line,) = members.call("rebuild", "digits@5", code=8).stderr.splitlines()
    assert "was made of other versions and of no commit" in line
