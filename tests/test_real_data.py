"""A user's own folder is one setting away: shown on real photographs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workspace


def reproduce(workspace: Workspace, source: Path, name: str, *stages: str) -> dict:
    workspace.set_source(source)
    workspace.replace("params.yaml", "name: digits", f"name: {name}")
    workspace.run("dvc", "repro", *stages)
    return json.loads((workspace.path / "artifacts/evaluate/report.json").read_text())


@pytest.mark.slow
def test_ants_and_bees_with_given_splits(
    main_job: Workspace, workspace: Workspace, shared_data: Callable[[str], Path]
) -> None:
    """Needs the main job for the frozen part that it exported."""
    report = reproduce(workspace, shared_data("hymenoptera"), "ants-and-bees")
    assert report["images"] == 153
    assert report["labels"] == ["ants", "bees"]
    assert report["precisions"]["fp32"]["accuracy"]["value"] >= 0.93
    table = workspace.run("tlpipe", "summary", "artifacts/register/receipt.json").stdout
    assert "ants-and-bees version 1, alias challenger, champion" in table


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
