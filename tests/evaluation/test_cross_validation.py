import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import stats

from tests.conftest import Workspace, copy_repository
from tlpipe import files
from tlpipe.cli.tables import print_folds
from tlpipe.data import leaks
from tlpipe.data.manifest import Assignment, load_manifest, load_split, save_split
from tlpipe.data.split import Params, assign
from tlpipe.evaluation import cross_validation
from tlpipe.evaluation.cross_validation import Fold, draw, mean_with_interval, summarise
from tlpipe.evaluation.evaluate import PREDICTIONS
from tlpipe.evaluation.metrics import METRICS, measure

FOLDS = 3
PLACE = "artifacts/cross-validation"


def fold(hits: list[bool], first: int, accuracy: float, **others: float) -> Fold:
    rows = np.arange(first, first + len(hits))
    images = {"train": 20, "validation": 10, "test": len(hits)}
    return Fold(images, {"accuracy": accuracy, **others}, rows, np.array(hits))


def test_the_interval_is_student_s_with_the_corrected_variance() -> None:
    values = [0.81, 0.78, 0.9, 0.84, 0.87]
    found = mean_with_interval(values, test_share=1 / 3, confidence=0.95)
    variance = sum((value - 0.84) ** 2 for value in values) / 4
    half_width = 2.7764451 * (variance * (1 / 5 + 1 / 3)) ** 0.5  # of tables: 4 degrees, 97.5 %
    assert found["value"] == pytest.approx(0.84)
    assert found["half_width"] == pytest.approx(half_width, rel=1e-7)
    assert (found["low"], found["high"]) == pytest.approx((0.84 - half_width, 0.84 + half_width))
    # Without its correction it is the interval of five independent numbers.
    plain = mean_with_interval(values, test_share=0, confidence=0.9)
    known = stats.t.interval(0.9, df=4, loc=0.84, scale=stats.sem(values))
    assert (plain["low"], plain["high"]) == pytest.approx(known)
    cut = mean_with_interval(values, test_share=1, confidence=0.99, bounds=(0.0, 1.0))
    assert cut["high"] == 1.0
    assert mean_with_interval([0.95] * 3, 0.5, 0.95)["half_width"] == 0.0


@pytest.mark.fault("M01")
def test_folds_that_agree_leave_the_interval_of_their_images() -> None:
    folds = [fold([True] * 10, 10 * number, 1.0) for number in range(3)]
    found = summarise(folds, [""] * 30, 0.95)["mean"]["accuracy"]
    assert (found["value"], found["high"]) == (1.0, 1.0)
    low = stats.binomtest(30, 30).proportion_ci(0.95, "wilson").low
    assert found["low"] == pytest.approx(low)
    assert found["half_width"] == pytest.approx(1 - low)


def test_the_corrected_interval_covers_what_the_plain_one_misses() -> None:
    """Folds share what they learn from: a third of each variance is of the shared part."""
    random = np.random.default_rng(0)
    times, folds, share = 4000, 5, 0.5
    shared = random.normal(size=(times, 1)) * share**0.5
    values = 0.5 + 0.05 * (shared + random.normal(size=(times, folds)))
    corrected, plain = (
        np.mean([abs(m["value"] - 0.5) < m["half_width"] for m in found])
        for found in (
            [mean_with_interval(row.tolist(), given, 0.95) for row in values]
            for given in (share, 0.0)
        )
    )
    assert corrected == pytest.approx(0.95, abs=0.015)
    assert plain < 0.8


@pytest.mark.fault("M02")
def test_an_unknown_calibration_error_has_no_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one fold, whose test images are of one group: as for AUROC where it tests one class."""
    folds = []
    for number, groups in enumerate((["", ""], ["photo", "photo"])):
        probabilities = np.array([[0.8, 0.2], [0.3, 0.7]], np.float32)
        found = measure(probabilities, np.array([0, 1]), groups, 0.95)
        files.write_json(tmp_path / "report.json", {"precisions": {"fp32": found}})
        row = Assignment("a.png", "a", "train", "", "", "0" * 64, "")
        names = ["test", "test", "train"] if number else ["train", "test", "test"]
        save_split(tmp_path / "split.csv", [row._replace(split=name) for name in names])
        predictions = [("a.png", "a", "a", "0.8", "0.8")] * 2
        files.write_csv(tmp_path / "predictions.csv", PREDICTIONS, predictions)
        folds.append(cross_validation._read(tmp_path))
    first, second = ({*fold.metrics} for fold in folds)
    assert first - second == {"calibration_error"}
    folds[1] = replace(folds[1], rows=folds[1].rows + 3)
    report = summarise(folds, [""] * 6, 0.95)
    assert {*report["mean"]} == second
    draw(report)
    print_folds(report)
    assert "calibration" not in capsys.readouterr().out


@pytest.mark.fault("M01")
def test_pooled_images_count_by_their_groups() -> None:
    folds = [
        fold([True] * 8 + [False] * 2, 20, 0.8),
        fold([True] * 4 + [False] * 6, 0, 0.4, auroc=0.5),
        fold([True] * 10, 10, 1.0, auroc=0.75),
    ]
    alone = summarise(folds, [""] * 30, 0.95)
    assert alone["pooled"]["images"] == 30
    assert alone["pooled"]["accuracy"]["value"] == 22 / 30
    assert set(alone["mean"]) == {"accuracy"}, "one fold has no AUROC"
    # The eight wrong ones, by their rows in the manifest, are one photo.
    groups = ["wrong" if row in (4, 5, 6, 7, 8, 9, 28, 29) else "" for row in range(30)]
    together = summarise(folds, groups, 0.95)["pooled"]["accuracy"]
    assert together["low"] < alone["pooled"]["accuracy"]["low"] - 0.05
    assert together["high"] > alone["pooled"]["accuracy"]["high"] + 0.05
    known = stats.binomtest(22, 30).proportion_ci(0.95, method="wilson")
    assert alone["pooled"]["accuracy"]["low"] == pytest.approx(known.low)
    assert alone["pooled"]["accuracy"]["high"] == pytest.approx(known.high)
    right = summarise([fold([True] * 5, 5 * i, 1.0) for i in range(3)], [""] * 15, 0.95)
    assert right["pooled"]["accuracy"]["low"] == pytest.approx(0.796, abs=1e-3)  # Wilson's
    assert right["pooled"]["accuracy"]["high"] == 1.0
    # Fifteen pictures of three photos say as much as three pictures.
    photos = [str(row // 5) for row in range(15)]
    right = summarise([fold([True] * 5, 5 * i, 1.0) for i in range(3)], photos, 0.95)
    known = stats.binomtest(3, 3).proportion_ci(0.95, method="wilson")
    assert right["pooled"]["accuracy"]["low"] == pytest.approx(known.low)


def test_rounding_is_no_spread() -> None:
    """Weighted means of equal numbers, as balanced accuracy is one."""
    folds = [
        fold([True] * 10, 10 * number, 1.0, balanced_accuracy=1 + rounding)
        for number, rounding in enumerate((-3e-16, 4e-16, -2e-16))
    ]
    means = summarise(folds, [""] * 30, 0.95)["mean"]
    assert means["balanced_accuracy"]["low"] == pytest.approx(means["accuracy"]["low"])
    assert means["balanced_accuracy"]["value"] <= 1.0


@pytest.mark.fault("M28")
def test_copies_that_audit_found_are_said_beside_the_folds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"copies": 40, "images": 40, "share": 1.0, "examples": []}
    content = {"is_above_clean": True, "clean_share": 0.1, "splits": {"validation": found}}
    path = tmp_path / "leaks.json"
    assert leaks.found_by_audit(path) == ""
    path.write_text(json.dumps(content | {"is_above_clean": False}))
    assert leaks.found_by_audit(path) == ""
    path.write_text(json.dumps(content))
    copies = leaks.found_by_audit(path)
    assert copies.startswith("40 of 40 validation images looked at are rotated, mirrored")
    folds = [fold([True] * 5, 5 * i, 1.0) for i in range(3)]
    report = summarise(folds, [""] * 15, 0.95, copies)
    assert f"Too good to be true: {copies}" in draw(report).get_suptitle()
    print_folds(report)
    assert f"too good to be true: {copies}" in capsys.readouterr().out


def test_folds_means_and_intervals_are_drawn() -> None:
    folds = [fold([True] * 4 + [False], 5 * i, 0.8 + 0.05 * i, log_loss=1.0) for i in range(3)]
    report = summarise(folds, [""] * 15, 0.95)
    figure = draw(report)
    accuracy, loss = figure.axes
    points, mean = accuracy.get_lines()[1], accuracy.get_lines()[0]
    assert np.asarray(points.get_xdata()).tolist() == [0, 1, 2]
    assert np.asarray(points.get_ydata()) == pytest.approx([0.8, 0.85, 0.9])
    assert mean.get_ydata() == pytest.approx([0.85, 0.85])
    (band,) = accuracy.patches
    assert isinstance(band, Rectangle)
    known = report["mean"]["accuracy"]
    assert band.get_y() == pytest.approx(known["low"])
    assert band.get_height() == pytest.approx(known["high"] - known["low"])
    assert accuracy.get_title().startswith("accuracy 0.850")
    assert loss.get_title().startswith("log loss 1.000")
    assert "pooled accuracy 0.8000" in figure.get_suptitle()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A workspace with few digits and a tiny network, up to its first activations."""
    workspace = copy_repository(tmp_path_factory.mktemp("folds") / "copy", cache_env)
    workspace.use_small_network()
    workspace.configure("split", folds=FOLDS)
    # A set that has grown, whose old images stay in their folds.
    workspace.replace("data/digits.yaml", "images_per_class: 100", "images_per_class: 7")
    workspace.reproduce("split")
    workspace.replace("data/digits.yaml", "images_per_class: 7", "images_per_class: 12")
    for stage in ("ingest", "embed"):
        workspace.call(stage)
    return workspace


@pytest.fixture(scope="module")
def stamps(embedded: Workspace) -> dict[str, tuple[int, int]]:
    """How the files lay before anything was cross-validated."""
    return lie(embedded.path / "artifacts")


@pytest.fixture(scope="module")
def said(embedded: Workspace, stamps: dict[str, tuple[int, int]]) -> Any:
    """What the command says, after one that was killed."""
    command = subprocess.Popen(
        ["tlpipe", "cross-validate"],
        cwd=embedded.path,
        env=embedded.environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    begun = "artifacts/.cross-validation.*.partial/new/fold-0/split.csv"
    while not list(embedded.path.glob(begun)):
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.kill()
    command.wait()
    assert not (embedded.path / PLACE).exists()
    return embedded.call("cross-validate")


@pytest.fixture(scope="module")
def report(embedded: Workspace, said: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((embedded.path / PLACE / "report.json").read_text())
    return found


def lie(folder: Path) -> dict[str, tuple[int, int]]:
    """Return how each file lies, but for those of the cross-validation."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if "cross-validation" not in str(path.relative_to(folder))
    }


@pytest.mark.slow
def test_every_image_is_tested_once(embedded: Workspace, report: dict[str, Any]) -> None:
    images = len(embedded.rows("artifacts/ingest/manifest.csv"))
    assert [entry["fold"] for entry in report["folds"]] == list(range(FOLDS))
    assert sum(entry["images"]["test"] for entry in report["folds"]) == images
    assert all(sum(entry["images"].values()) == images for entry in report["folds"])
    assert report["pooled"]["images"] == images


@pytest.mark.slow
def test_the_means_follow_from_the_folds(report: dict[str, Any]) -> None:
    known = measure(np.full((10, 10), 0.1, np.float32), np.arange(10), [""] * 10, 0.95)
    assert set(report["mean"]) == set(known) & set(METRICS)
    tested, trained = (
        sum(e["images"][name] for e in report["folds"]) for name in ("test", "train")
    )
    for name, mean in report["mean"].items():
        values = [entry["metrics"][name] for entry in report["folds"]]
        assert mean["value"] == pytest.approx(np.mean(values))
        spread = np.var(values, ddof=1) * (1 / FOLDS + tested / trained)
        assert mean["half_width"] == pytest.approx(stats.t.ppf(0.975, FOLDS - 1) * spread**0.5)
        assert 0 <= mean["low"] <= mean["value"] <= mean["high"]
        assert mean["confidence"] == 0.95
    hits = sum(e["metrics"]["accuracy"] * e["images"]["test"] for e in report["folds"])
    pooled = report["pooled"]["accuracy"]
    assert pooled["value"] == pytest.approx(hits / tested)
    assert pooled["low"] < pooled["value"] < pooled["high"]


@pytest.mark.slow
def test_what_is_said_and_drawn(embedded: Workspace, said: Any, report: dict[str, Any]) -> None:
    assert f"fold 2 of {FOLDS} (split.fold: 1)" in said.stderr
    assert "…" not in said.stdout
    mean = report["mean"]["accuracy"]
    assert f"{mean['value']:.3f}" in said.stdout
    assert f"+-{mean['half_width']:.3f}" in said.stdout
    assert f"on {report['pooled']['images']} images" in said.stdout
    names = sorted(path.name for path in (embedded.path / PLACE).iterdir())
    assert names == ["folds.png", "report.json"]
    with Image.open(embedded.path / PLACE / "folds.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.slow
def test_a_fold_is_what_the_graph_makes_of_it(embedded: Workspace, report: dict[str, Any]) -> None:
    embedded.configure("split", fold=1)
    assert len(embedded.rows("splits.csv")) == 7 * 10  # the command itself has only read it
    for stage in ("split", "audit", "train", "export", "evaluate"):
        embedded.call(stage)
    rows = load_split(embedded.path / "artifacts/split/split.csv")
    entries = list(load_manifest(embedded.path / "artifacts/ingest/manifest.csv"))
    assert [row.fold for row in rows] != assign(entries, Params(folds=FOLDS)).folds
    found = json.loads((embedded.path / "artifacts/evaluate/report.json").read_text())
    exact, (_, second, _) = found["precisions"]["fp32"], report["folds"]
    assert {name: exact[name]["value"] for name in second["metrics"]} == second["metrics"]


@pytest.mark.slow
def test_again_without_the_source_gives_the_same_bytes(
    embedded: Workspace, stamps: dict[str, tuple[int, int]], report: dict[str, Any]
) -> None:
    place = embedded.path / PLACE
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    (embedded.path / "data/digits.yaml").unlink()
    for split in embedded.path.glob("artifacts/split/*"):
        split.unlink()
    embedded.call("cross-validate", "--folds", str(FOLDS))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    after = lie(embedded.path / "artifacts")
    before_folds = {path: stamp for path, stamp in stamps.items() if not path.startswith("split")}
    assert {path: after[path] for path in before_folds} == before_folds
    embedded.run("git", "checkout", "data/digits.yaml")
    changed = embedded.run("git", "status", "--porcelain").stdout.split()
    assert sorted(changed) == ["??", "M", "params.yaml", "splits.csv"]


def test_without_folds_or_activations_it_is_an_error(empty: Workspace) -> None:
    before = empty.names()
    error = empty.call("cross-validate", code=3).stderr
    assert error.startswith("tlpipe: split.folds is not set; expected a number of folds")
    assert error.count("\n") == 1
    error = empty.call("cross-validate", "--folds", "3", code=6).stderr
    assert "artifacts/ingest/manifest.csv is missing; run 'dvc repro embed' first." in error
    empty.call("cross-validate", "--folds", "2", code=2)
    assert empty.names() == before
