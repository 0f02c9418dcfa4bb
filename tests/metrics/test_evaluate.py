import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import Workspace


def test_the_digits_are_recognised(artifacts: Path) -> None:
    report = json.loads((artifacts / "evaluate" / "report.json").read_text())
    measured = report["precisions"]["fp32"]
    assert measured["accuracy"]["value"] >= 0.90
    assert (
        measured["accuracy"]["low"] < measured["accuracy"]["value"] < measured["accuracy"]["high"]
    )
    assert report["images"] == np.sum(measured["confusion"])
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
    names = "confusion coverage mistakes ranking reliability robustness slices training unsure"
    assert sorted(p.stem for p in (folder / "plots").iterdir()) == names.split()
    assert sorted(p.stem for p in (folder / "examples").iterdir()) == list("0123456789")
    for path in (*(folder / "plots").iterdir(), *(folder / "examples").iterdir()):
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image))) > 10


def test_dvc_shows_metrics_and_plots(main_job: Workspace) -> None:
    shown = json.loads(main_job.run("dvc", "metrics", "show", "--json").stdout)
    (report,) = shown[""]["data"].values()
    assert report["data"]["precisions"]["fp32"]["accuracy"]["value"] >= 0.90
    page = main_job.path / "dvc_plots"
    main_job.run("dvc", "plots", "show", "--out", str(page))
    text = (page / "index.html").read_text()
    assert "Solving the head" in text
    assert "Confusion on the test split" in text


def test_a_bundle_of_other_classes_is_refused(main_job: Workspace, empty: Workspace) -> None:
    artifacts = main_job.path / "artifacts"
    split = (artifacts / "split" / "split.csv").read_text()
    (empty.path / "split.csv").write_text(split.replace(",7,", ",seven,"))
    result = empty.run(
        *("tlpipe", "evaluate", "--bundle", str(artifacts / "export" / "bundle")),
        *("--pixels", str(artifacts / "ingest" / "pixels"), "--split", "split.csv"),
        *("--manifest", str(artifacts / "ingest" / "manifest.csv")),
        *("--history", str(artifacts / "train" / "history.csv")),
        *("--report", "r", "--speed", "s", "--predictions", "p", "--tables", "t"),
        *("--plots", "pl", "--examples", "e"),
        code=6,
    )
    assert "has the classes seven, which the bundle does not know" in result.stderr
    assert empty.names() == ["params.yaml", "split.csv"]
