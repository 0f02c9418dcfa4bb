"""The command: what it writes, what it says, what is of another run, what it logs."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Workspace
from tests.explanation.conftest import LABELS
from tlpipe import files, graph
from tlpipe.backbones.backbone import describe
from tlpipe.errors import ArtifactError
from tlpipe.explanation import explain
from tlpipe.explanation.inputs import Paths, load
from tlpipe.registry import tracking

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
    assert there == {"explain/index.html", "explain/plots"}
    assert again["explain/index.html"] == files.sha256(folder / "index.html")
    assert "bundle/model.onnx" in again  # what was known stays
    repeated = explained_job.call("explain", "--images", "40", "--mistakes", "3").stdout
    assert repeated.splitlines()[-1] == logged.replace("logged", "already logged", 1)


def test_before_and_after_stand_side_by_side_where_fine_tuning_changed_something(
    explained_job: Workspace, tmp_path: Path
) -> None:
    paths = Paths(*(explained_job.path / graph.PATHS[field.name] for field in fields(Paths)))
    inputs = load(paths)
    found = explain.run(paths=paths, folder=tmp_path / "out", images=10, mistakes=2)
    assert found.is_changed == (inputs.model.card.epoch > 0)
    text = (tmp_path / "out" / "index.html").read_text()
    assert ("before: for" in text) == found.is_changed
    assert found.is_changed, "the fixture is to train more than the head"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model", r"bundle was exported from another model than .*model; expected the same"),
        ("report", r"report\.json measures another bundle than .*bundle; expected the same"),
        ("predictions", r"predictions\.csv holds answers for other images than the test images"),
        ("label_issues", r"label_issues\.csv names nowhere\.png as red, which .*split\.csv"),
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
