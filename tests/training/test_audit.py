from pathlib import Path

import numpy as np
from cleanlab import filter as confident_learning
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from tests.conftest import Workspace
from tlpipe.backbones import activations
from tlpipe.data.manifest import load_manifest, save_manifest
from tlpipe.graph import PATHS
from tlpipe.resampling import held_out_folds
from tlpipe.training import linear_probe
from tlpipe.training.audit import Params, find_label_issues


def test_swapped_labels_are_label_issues(main_job: Workspace) -> None:
    folder = main_job.path / "artifacts"
    entries = list(load_manifest(folder / "ingest/manifest.csv"))
    features = activations.load(folder / "embed/activations").features
    before = {issue.row for issue in find_label_issues(entries, features, Params())}
    swapped = range(5, 1000, 50)
    for row in swapped:
        other = str((int(entries[row].label) + 3) % 10)
        entries[row] = entries[row]._replace(label=other)
    found = [issue.row for issue in find_label_issues(entries, features, Params())]
    assert len(set(found) & set(swapped)) >= 16 > len(before & set(swapped))
    assert len(set(found[:20]) & set(swapped)) >= 12
    # scikit-learn's heads on the same folds, and cleanlab on what they answer, find the same.
    labels, groups = [e.label for e in entries], [e.group for e in entries]
    x = np.asarray(features[:], np.float64)
    standard = linear_probe.standardisation([x])
    folds = held_out_folds(labels, groups, Params().folds)
    model = LogisticRegression(C=1 / (Params().l2 * 1000 * 2 / 3), max_iter=2000)
    probabilities = cross_val_predict(
        model, standard.apply(x), labels, cv=PredefinedSplit(folds), method="predict_proba"
    )
    expected = confident_learning.find_label_issues(
        np.array(labels, int), probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    assert len(set(found) ^ set(expected.tolist())) <= 2
    assert len(expected) > 20


def test_a_class_too_small_to_judge_is_left_out(main_job: Workspace) -> None:
    folder = main_job.path / "artifacts"
    entries = list(load_manifest(folder / "ingest/manifest.csv"))
    features = activations.load(folder / "embed/activations").features
    for row in (0, 100):
        entries[row] = entries[row]._replace(label="tiny")
    assert not {0, 100} & {s.row for s in find_label_issues(entries, features, Params())}


def test_the_main_job_shows_its_data(main_job: Workspace) -> None:
    plots = main_job.path / "artifacts/audit/plots"
    names = {path.name for path in plots.iterdir()}
    sheets = {f"sheet-{number:03d}.png" for number in range(10)}
    assert (
        names
        == {"classes.png", "sizes.png", "rejects.png", "label_issues.png", "copies.png"} | sheets
    )
    for path in plots.iterdir():
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    label_issues = main_job.rows("artifacts/audit/label_issues.csv")
    assert 0 < len(label_issues) < 60
    assert {row["label"] for row in label_issues} <= set("0123456789")
    probabilities = [float(row["label_probability"]) for row in label_issues]
    assert probabilities == sorted(probabilities)


def test_plots_are_shown_by_dvc(main_job: Workspace, tmp_path: Path) -> None:
    main_job.run("dvc", "plots", "show", "--out", str(tmp_path / "shown"))
    page = (tmp_path / "shown" / "index.html").read_text()
    for name in ("classes.png", "label_issues.png", "sheet-009.png"):
        assert name in page


def test_data_of_another_source_are_refused(main_job: Workspace, empty: Workspace) -> None:
    empty.take(main_job, "pixels", "split", "activations", "data_report")
    manifest = PATHS["manifest"]
    entries = list(load_manifest(main_job.path / manifest))
    save_manifest(empty.path / manifest, entries[:-1])
    error = empty.call("audit", code=6).stderr
    assert "manifest.csv holds 999 images" in error
    assert not (empty.path / PATHS["data_plots"]).exists()
