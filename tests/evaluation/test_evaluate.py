import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace
from tlpipe.data import pixels
from tlpipe.data.manifest import Entry, load_split
from tlpipe.evaluation import evaluate
from tlpipe.evaluation.answers import STRENGTHS, Shown
from tlpipe.evaluation.metrics import METRICS, why_no_threshold
from tlpipe.graph import PATHS, STAGES
from tlpipe.predict import Prediction


def test_the_digits_are_recognised(artifacts: Path) -> None:
    report = json.loads((artifacts / "evaluate" / "report.json").read_text())
    measured = report["precisions"]["fp32"]
    assert measured["accuracy"]["value"] >= 0.90
    assert (
        measured["accuracy"]["low"] < measured["accuracy"]["value"] < measured["accuracy"]["high"]
    )
    assert report["images"] == sum(row["images"] for row in measured["per_class"].values())
    with (artifacts / "evaluate" / "predictions.csv").open() as file:
        answers = [(row["label"], row["predicted"]) for row in csv.DictReader(file)]
    with (artifacts / "evaluate" / "tables" / "confusion.csv").open() as file:
        cells = [(r["true"], r["predicted"], int(r["images"])) for r in csv.DictReader(file)]
    assert {cell[:2]: cell[2] for cell in cells} == Counter(answers)
    assert [cell[2] for cell in cells] == sorted((cell[2] for cell in cells), reverse=True)
    wrong = [cell for cell in cells if cell[0] != cell[1]][:20]
    named = [(r["true"], r["predicted"], r["images"]) for r in measured["most_confused"]]
    assert named == wrong
    assert set(measured["per_class"]) == set("0123456789")


def test_the_report_follows_from_the_predictions(artifacts: Path) -> None:
    report = json.loads((artifacts / "evaluate" / "report.json").read_text())
    with (artifacts / "evaluate" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (artifacts / "split" / "split.csv").open() as file:
        test = [row["path"] for row in csv.DictReader(file) if row["split"] == "test"]
    assert [row["path"] for row in rows] == test
    hits = sum(row["label"] == row["predicted"] for row in rows)
    assert report["precisions"]["fp32"]["accuracy"]["value"] == hits / len(rows)
    loss = -np.log([float(row["true_probability"]) for row in rows]).mean()
    assert abs(report["precisions"]["fp32"]["log_loss"]["value"] - loss) < 1e-3


def test_plots_and_examples_are_images(artifacts: Path) -> None:
    folder = artifacts / "evaluate"
    names = "confusion coverage least_confident mistakes ranking reliability robustness slices"
    found = sorted(p.stem for p in (folder / "plots").iterdir())
    assert found == [*names.split(), "training"]
    assert sorted(p.stem for p in (folder / "examples").iterdir()) == list("0123456789")
    # What plots show is in test_plots.py. Galleries: the background, and pictures of many colours.
    for name in ("mistakes", "least_confident"):
        with Image.open(folder / "plots" / f"{name}.png") as image:
            counted = image.getcolors(1 << 24)
        assert counted is not None
        colours = {colour: count for count, colour in counted}
        assert colours[(255, 255, 255)] < 0.9 * image.size[0] * image.size[1]
    # An example is the first test image of its class, as it is stored.
    squares = pixels.load(artifacts / "ingest" / "pixels").array
    rows = load_split(artifacts / "split" / "split.csv")
    for label in "0123456789":
        known = next(i for i, row in enumerate(rows) if (row.split, row.label) == ("test", label))
        with Image.open(folder / "examples" / f"{label}.png") as image:
            assert (np.asarray(image) == squares[known]).all()


def test_a_class_with_any_name_has_an_example(tmp_path: Path) -> None:
    labels = ("tomato/blight", "never tested", 100 * "名")
    squares = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    answer = Prediction("", 0.0, {})
    shown = [
        Shown(
            Entry("", labels[number], "", "", 0, 4, 4, "RGB", "PNG", "", "", ""), row, answer, 1.0
        )
        for number, row in ((2, 1), (0, 2))
    ]
    evaluate._save_examples(tmp_path / "examples", squares, shown, labels)  # type: ignore[arg-type]
    found = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "examples").iterdir()}
    assert sorted(found) == ["0.png", "2.png"]
    assert (found["0.png"] == squares[2]).all() and (found["2.png"] == squares[1]).all()


def test_every_number_of_the_report_has_its_interval(artifacts: Path) -> None:
    report = json.loads((artifacts / "evaluate" / "report.json").read_text(), parse_constant=fail)
    measured = report["precisions"]["fp32"]
    for name in set(METRICS) & measured.keys():
        found = measured[name]
        assert found["low"] <= found["value"] <= found["high"], name
        assert found["low"] < found["high"], name
    images = report["images"]
    for rows in report["slices"].values():
        assert sum(row["images"] for row in rows) == images
        right = sum(row["images"] * row["accuracy"] for row in rows) / images
        assert right == pytest.approx(measured["accuracy"]["value"])
        assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    robustness = dict(report["robustness"])
    count, clean = robustness.pop("images"), robustness.pop("clean")
    assert set(robustness) == set(STRENGTHS)
    for kind, rows in robustness.items():
        assert [row["strength"] for row in rows] == list(STRENGTHS[kind])
        for row in (clean, *rows):
            assert row["low"] <= row["accuracy"] <= row["high"]
            assert (row["accuracy"] * count) % 1 == pytest.approx(0, abs=1e-9)
    assert min(rows[-1]["accuracy"] for rows in robustness.values()) < clean["accuracy"]
    abstention = report["abstention"]
    assert abstention["images_needed"] == 149
    assert (abstention["threshold"] is None) == (report["ood"]["answered"] is None)


def fail(constant: str) -> None:
    raise AssertionError(f"the report is no JSON: {constant}")


def test_dvc_shows_metrics_and_plots(main_job: Workspace) -> None:
    shown = json.loads(main_job.run("dvc", "metrics", "show", "--json").stdout)
    found = shown[""]["data"]
    assert {*found} == {PATHS["report"], PATHS["train_metrics"]}
    validation = found[PATHS["train_metrics"]]["data"]["validation_loss"]
    with (main_job.path / PATHS["history"]).open() as file:
        assert min(float(row["validation_loss"]) for row in csv.DictReader(file)) == (
            pytest.approx(validation, abs=1e-5)
        )
    report = found[PATHS["report"]]
    assert report["data"]["precisions"]["fp32"]["accuracy"]["value"] >= 0.90
    page = main_job.path / "dvc_plots"
    main_job.run("dvc", "plots", "show", "--out", str(page))
    text = (page / "index.html").read_text()
    assert "Training, or the l2 of a linear probe" in text
    assert "Confusion on the test split" in text


def test_a_bundle_of_other_classes_is_an_error(main_job: Workspace, empty: Workspace) -> None:
    split = (main_job.path / PATHS["split"]).read_text()
    empty.take(main_job, *(name for name in STAGES["evaluate"].reads if name != "split"))
    (empty.path / PATHS["split"]).parent.mkdir()
    (empty.path / PATHS["split"]).write_text(split.replace(",7,", ",seven,"))
    before = sorted(empty.path.rglob("*"))
    result = empty.run("tlpipe", "evaluate", code=6)
    assert "has the classes seven, which the bundle does not know" in result.stderr
    assert sorted(empty.path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.fault("M05")
def test_ood_images_are_those_of_the_project(
    artifacts: Path, empty: Workspace, photos: Path
) -> None:
    """Built-in ones say nothing about other classes; a folder without folders in it will do."""

    def measured(**values: object) -> dict[str, Any] | None:
        empty.configure("evaluate", corrupted_images=1, mistakes=0, **values)
        said = empty.call("evaluate").stderr
        report = json.loads((empty.path / "artifacts/evaluate/report.json").read_text())
        found: dict[str, Any] | None = report["ood"]
        left_out = "evaluate.ood is data/textures.yaml, an example for built-in classes, and"
        assert (left_out in said) == (found is None)
        return found

    main_job = Workspace(artifacts.parent)
    empty.take(main_job, *(name for name in STAGES["evaluate"].reads if name != "split"))
    (empty.path / PATHS["split"]).parent.mkdir()
    *ten, others = (main_job.path / PATHS["split"]).read_text().split(",test,", 10)
    few = ",test,".join([*ten, others.replace(",test,", ",train,")])  # that are answered
    (empty.path / PATHS["split"]).write_text(few)
    empty.set_source(photos)
    assert measured() is None
    flat = empty.path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[::4]):
        shutil.copy(path, flat / f"{number}.png")
    (flat / "notes.txt").write_text("no image")
    found = measured(ood=str(flat))
    assert found is not None
    assert (found["source"], found["images"]) == ("flat", 6)
    assert 0 <= found["auroc"] <= 1


@pytest.mark.parametrize(
    ("images", "said"),
    [(40, "40 independent images held out are too few, 149 or more"), (798, "too many of 798 ")],
)
def test_why_there_is_no_threshold_is_one_reason(images: int, said: str) -> None:
    text = why_no_threshold({"images": images, "images_needed": 149, "is_copied": False})
    assert text.startswith(said)
    assert ("too few" in text) == (images < 149)
