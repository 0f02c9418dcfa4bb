"""The command: what it writes, what it says, what is of another run, what it logs."""

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Workspace
from tests.explanation.conftest import LABELS
from tests.explanation.reading import read
from tlpipe import files, graph, held_out
from tlpipe.backbones.backbone import describe, load_network
from tlpipe.backbones.weights import Weights
from tlpipe.errors import ArtifactError
from tlpipe.explanation import explain
from tlpipe.explanation.inputs import Paths
from tlpipe.registry import tracking
from tlpipe.training import model as models

pytestmark = pytest.mark.slow


@pytest.fixture
def paths(explained_job: Workspace, tmp_path: Path) -> Paths:
    """Copies of what the stages wrote, to be changed."""
    copied = {}
    for field in fields(Paths):
        source = explained_job.path / graph.PATHS[field.name]
        copied[field.name] = tmp_path / source.name
        if source.is_dir():
            shutil.copytree(source, copied[field.name])
        else:
            shutil.copyfile(source, copied[field.name])
    return Paths(**copied)


def test_the_command_writes_a_page_and_galleries_and_logs_them_once(
    explained_job: Workspace,
) -> None:
    said = explained_job.call("explain", "--images", "40", "--mistakes", "3").stdout
    first, where, logged = said.splitlines()
    found = re.match(r"(\d) of (\d+) mistakes on (\d+) test images explained; ", first)
    assert found is not None
    predictions = explained_job.rows(graph.PATHS["predictions"])
    wrong = [row for row in predictions if row["label"] != row["predicted"]]
    assert (int(found[1]), int(found[2]), int(found[3])) == (
        min(3, len(wrong)),
        len(wrong),
        len(predictions),
    )
    assert wrong  # labels are wrong on purpose
    assert where.startswith("see artifacts/explain/index.html")
    folder = explained_job.path / "artifacts/explain"
    text = (folder / "index.html").read_text()
    worst = max(wrong, key=lambda row: float(row["probability"]))
    assert worst["path"] in text
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    points = json.loads(data)
    assert points["labels"] == list(LABELS)
    issues = explained_job.rows(graph.PATHS["label_issues"])
    shown = {points["path"][n] for n, label in enumerate(points["suggested"]) if label >= 0}
    assert shown == {row["path"] for row in issues} & set(points["path"])
    assert shown
    names = {path.name for path in (folder / "plots").iterdir()}
    assert {"mistakes.png", "hits.png", "neighbours.png", "filters.png", "map.png"} <= names
    stages = [stage.name for stage in describe("timm/test_resnet").stages]
    assert {f"stage-{n:02d}-{name}.png" for n, name in enumerate(stages, start=1)} <= names
    for path in (folder / "plots").iterdir():
        with Image.open(path) as picture:
            picture.load()
    assert logged.startswith("logged to explain/ among the artifacts of the MLflow run ")
    run_id = logged.split()[-1]
    with tracking.connection(explained_job.path) as client:
        there = {entry.path for entry in client.list_artifacts(run_id, "explain")}
        again = files.read_json(
            Path(client.download_artifacts(run_id, "sha256.json", str(folder.parent)))
        )
    assert there == {"explain/explain.json", "explain/index.html", "explain/plots"}
    assert again["explain/index.html"] == files.sha256(folder / "index.html")
    assert "bundle/model.onnx" in again  # what was known stays
    repeated = explained_job.call("explain", "--images", "40", "--mistakes", "3").stdout
    assert repeated.splitlines()[-1] == logged.replace("logged", "already logged", 1)


def paths_of(job: Workspace) -> Paths:
    return Paths(*(job.path / graph.PATHS[field.name] for field in fields(Paths)))


@pytest.mark.parametrize(
    ("change", "state", "has_before"),
    [
        ("nothing", "its random weights as they were", False),
        ("buffers", "the last 1 of its 4 stages with BatchNorm statistics of these images", True),
        ("parameters", "the last 1 of its 4 stages fine-tuned", True),
    ],
)
def test_the_page_says_what_training_has_changed(
    paths: Paths, tmp_path: Path, change: str, state: str, has_before: bool
) -> None:
    model = models.load(paths.model)
    backbone = describe(model.card.origin.backbone)
    drawn = load_network(backbone, Weights(None, "")).state_dict()
    stages = {name: drawn[name].numpy().copy() for name in model.stages}
    ends = {"nothing": "", "buffers": ".running_mean", "parameters": ".weight"}[change]
    for name, tensor in stages.items():
        if ends and name.endswith(ends):
            tensor += 0.1
    held = held_out.load(paths.model / held_out.NAME)
    models.save(paths.model, replace(model, stages=stages), held)
    found = explain.run(paths=paths, folder=tmp_path / "out", images=10, mistakes=2)
    assert found.is_changed == has_before
    text = (tmp_path / "out" / "index.html").read_text()
    assert f"timm/test_resnet, {state}, with a head for 2 classes" in text
    assert ("before: for" in text) == has_before
    assert ("Before: the network with its random weights" in text) == has_before
    assert "pretrained" not in text


@pytest.mark.parametrize(("images", "tested"), [(4, 1), (20, 5)])
def test_a_sample_is_as_large_as_asked_and_says_what_it_is(
    explained_job: Workspace, tmp_path: Path, images: int, tested: int
) -> None:
    explain.run(paths=paths_of(explained_job), folder=tmp_path / "out", images=images, mistakes=3)
    shown = read(tmp_path / "out")
    assert len(shown.points["path"]) == images
    splits = [shown.points["splits"][n] for n in shown.points["split"]]
    assert splits.count("test") == tested
    predictions = explained_job.rows(graph.PATHS["predictions"])
    accuracy = sum(row["label"] == row["predicted"] for row in predictions) / len(predictions)
    issues = len(explained_job.rows(graph.PATHS["label_issues"]))
    assert f"{tested} of {len(predictions)} test images, the explained mistakes" in shown.text
    assert f"{accuracy:.1%} of all test images are answered rightly" in shown.text
    assert f" of {issues} that audit has found" in shown.text
    # Right answers are shown though the sample may have none, red first: mistakes are labelled so.
    labels = [heading.partition(",")[0] for heading, _, _ in shown.rows["hits"]]
    assert labels == sorted(labels, reverse=True)
    assert set(labels) == set(LABELS)
    assert "typical images of red, blue" in shown.text


def test_galleries_of_another_bundle_are_removed(explained_job: Workspace) -> None:
    said = explained_job.call("explain", "--no-log", "--images", "10", "--mistakes", "1").stdout
    assert "logged" not in said
    folder = explained_job.path / "artifacts/explain"
    report = files.read_json(explained_job.path / graph.PATHS["report"])
    accuracy = report["precisions"]["fp32"]["accuracy"]["value"]
    of = f"Bundle {report['bundle'][:8]}, measured on .{{10}}, test accuracy {accuracy:.3f}"
    assert re.search(of, (folder / "index.html").read_text())
    for stage in ("evaluate", "register"):
        assert "removed" not in explained_job.call(stage).stderr
        assert (folder / "plots/map.png").exists()
    for number, stage in enumerate(("evaluate", "register")):
        if number:
            (folder / "plots").mkdir()
        files.write_json(folder / "explain.json", {"bundle": "0" * 64})
        assert "removed artifacts/explain/plots, which was of another model" in (
            explained_job.call(stage).stderr
        )
        assert not (folder / "plots").exists()
        assert (folder / "index.html").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model", r"bundle was exported from another model than .*model; expected the same"),
        ("report", r"report\.json measures another bundle than .*bundle; expected the same"),
        ("predictions", r"predictions\.csv holds answers for other images than the test images"),
        ("label_issues", r"label_issues\.csv names nowhere\.png as red, which .*split\.csv"),
        ("shortcuts", r"label_issues\.csv was found in another activations than .*activations"),
        ("split", r"model was trained with another split table than .*split\.csv"),
        ("missing", r"model\.json"),
    ],
)
@pytest.mark.fault("M60")
def test_what_is_of_another_run_is_an_error_and_nothing_is_written(
    paths: Paths, tmp_path: Path, change: str, said: str
) -> None:
    if change == "model":
        card = files.read_json(paths.model / "model.json")
        files.write_json(paths.model / "model.json", {**card, "validation_loss": 0.123})
    elif change == "report":
        files.write_json(paths.report, {**files.read_json(paths.report), "bundle": "0" * 64})
    elif change == "predictions":
        lines = paths.predictions.read_text().splitlines()
        paths.predictions.write_text("\n".join([*lines[:-1], ""]))
    elif change == "label_issues":
        with paths.label_issues.open("a") as file:
            file.write("nowhere.png,red,blue,0.1,0.9\n")
    elif change == "shortcuts":
        known = files.read_json(paths.shortcuts)
        files.write_json(paths.shortcuts, {**known, "activations": "0" * 64})
    elif change == "split":
        text = paths.split.read_text()
        paths.split.write_text(text.replace(",validation,", ",train,", 1))
    else:
        (paths.model / "model.json").unlink()
    with pytest.raises(ArtifactError, match=said):
        explain.run(paths=paths, folder=tmp_path / "out", images=10, mistakes=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--images", "0"), ("--mistakes", "0"), ("--mistakes", "61")]
)
def test_options_out_of_their_range_are_an_error(
    explained_job: Workspace, option: str, value: str
) -> None:
    assert option in explained_job.call("explain", option, value, code=2).stderr


def test_without_a_model_nothing_is_explained(empty: Workspace) -> None:
    assert "artifacts/export/bundle" in empty.call("explain", code=6).stderr
