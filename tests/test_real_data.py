"""A user's own folder is one setting away: shown on real photographs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.conftest import Workspace
from tlpipe import bundle as bundles
from tlpipe.predict import Predictor
from tlpipe.runtime import open_session


def reproduce(
    workspace: Workspace, source: Path, name: str, last: str = "register"
) -> dict[str, Any]:
    workspace.configure("ingest", source=str(source))
    workspace.configure("register", name=name)
    workspace.reproduce(last)
    report = (workspace.path / "artifacts/evaluate/report.json").read_text()
    found: dict[str, Any] = json.loads(report)
    return found


@pytest.mark.slow
def test_ants_and_bees_with_given_splits(
    main_job: Workspace, workspace: Workspace, shared_data: Callable[[str], Path]
) -> None:
    """Needs the main job for the frozen part that it exported."""
    unknown, photos = shared_data("sign-digits"), shared_data("hymenoptera")
    workspace.configure("evaluate", ood=str(unknown), ood_images=40)
    workspace.call("upgrade")  # DVC watches them
    report = reproduce(workspace, photos, "ants-and-bees")
    assert report["images"] == 153
    assert report["labels"] == ["ants", "bees"]
    assert report["precisions"]["fp32"]["accuracy"]["value"] >= 0.93
    table = workspace.run("tlpipe", "summary").stdout
    assert "ants-and-bees version 1, alias challenger, champion" in table
    assert report["ood"]["images"] == 40
    assert report["ood"]["source"] == "sign-digits"
    # The largest probability is a poor judge of unknown images; a head fitted on these features by
    # scikit-learn's objective gives 0.69 to 0.70, whatever its l2.
    assert 0.65 <= report["ood"]["auroc"] <= 0.75
    _any_size_names_the_same(workspace, sorted(photos.rglob("*.jpg"))[::2])


def _any_size_names_the_same(workspace: Workspace, photos: list[Path]) -> None:
    """Hand whole photos to the graph that resizes by itself: the same label as through ours."""
    bundle = bundles.load(workspace.path / "artifacts/export/bundle")
    predictor, session = Predictor(bundle), open_session(bundle.graphs["any-size"])
    same = 0
    for photo in photos:
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))
        (found,) = session.run(["logits"], {"images": pixels[np.newaxis]})[0]
        same += bundle.labels[found.argmax()] == predictor.predict(photo.read_bytes()).label
    assert len(photos) >= 190
    assert same / len(photos) >= 0.995


@pytest.mark.slow
def test_sign_digits(
    main_job: Workspace, workspace: Workspace, shared_data: Callable[[str], Path]
) -> None:
    report = reproduce(workspace, shared_data("sign-digits"), "signs", "evaluate")
    assert report["labels"] == list("0123456789")
    assert report["precisions"]["fp32"]["accuracy"]["value"] >= 0.92


@pytest.mark.slow
def test_a_changed_folder_is_seen(workspace: Workspace, photos: Path) -> None:
    workspace.set_source(photos)
    workspace.run("dvc", "repro", "split")
    assert "Running stage" not in workspace.run("dvc", "repro", "split").stdout
    (photos / "dark" / "more.png").write_bytes((photos / "dark" / "1.png").read_bytes())
    assert "Running stage 'ingest'" in workspace.run("dvc", "repro", "split").stdout
    report = json.loads((workspace.path / "artifacts/ingest/report.json").read_text())
    assert report["images"] == 25
