import json
import shlex
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.conftest import ROOT, Workspace
from tlpipe import files
from tlpipe.cli import app
from tlpipe.errors import TlpipeError
from tlpipe.onnx_export import bundle as bundles

COMMAND = shlex.split(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["register"]["cmd"])


@pytest.fixture
def built(main_job: Workspace, tmp_path: Path) -> Workspace:
    """A folder with what is to be registered, and a registry of its own that is still empty."""
    target = tmp_path / "built"
    target.mkdir()
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(main_job.path / name, target)
    shutil.copytree(main_job.path / "data", target / "data")
    for stage in ("export", "evaluate", "train", "ingest", "split", "audit"):
        ignore = shutil.ignore_patterns("pixels")
        shutil.copytree(
            main_job.path / "artifacts" / stage, target / "artifacts" / stage, ignore=ignore
        )
    pixels = "artifacts/ingest/pixels"
    (target / pixels).symlink_to(main_job.path / pixels)
    return Workspace(target, main_job.env)


def change_bundle(built: Workspace, **changes: object) -> bundles.Bundle:
    """Make another bundle of the one that was built, which its report then measures."""
    folder = built.path / "artifacts/export/bundle"
    old = bundles.load(folder)
    kept = {
        "graphs": {name: path.read_bytes() for name, path in old.graphs.items()},
        "labels": old.labels,
        "preprocessing": old.preprocessing,
        "provenance": old.provenance,
    }
    bundles.save(folder, **{**kept, **changes})  # type: ignore[arg-type]
    changed, report = bundles.load(folder), built.path / "artifacts/evaluate/report.json"
    content = json.loads(report.read_text())
    files.write_json(report, {**content, "bundle": changed.digest})
    return changed


@dataclass
class Said:
    """What a command printed and, where it refused, how."""

    code: int
    printed: str
    refusal: str


@pytest.fixture
def tlpipe(built: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run commands of tlpipe in the built workspace, in this process: imports cost seconds."""
    monkeypatch.chdir(built.path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> Said:
        with warnings.catch_warnings():  # of MLflow's, which no refusal may come from
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(app, words)
        error = result.exception
        if error is None:
            return Said(result.exit_code, result.output, "")
        assert isinstance(error, TlpipeError), result.exc_info
        return Said(error.exit_code, result.output, str(error))

    return run
