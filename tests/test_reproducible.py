"""Two clean clones, two folders, other surroundings: the same bytes."""

from pathlib import Path

import pytest

from tests.conftest import Workspace, copy_repository
from tlpipe import files

OUTPUTS = (
    "artifacts/ingest/manifest.csv",
    "artifacts/ingest/pixels/index.json",
    "artifacts/ingest/pixels/thumbnails.npy",
    "artifacts/split/split.csv",
    "artifacts/embed/activations/index.json",
    "artifacts/embed/activations/keys.npy",
    "artifacts/audit/label_issues.csv",
    "artifacts/audit/leaks.json",
    "artifacts/train/model/model.safetensors",
    "artifacts/train/model/model.json",
    "artifacts/export/bundle/model.onnx",
    "artifacts/export/bundle/SHA256SUMS",
    "artifacts/evaluate/report.json",
)


@pytest.mark.slow
def test_another_clone_gives_the_same_bytes(main_job: Workspace, tmp_path: Path) -> None:
    """Also with an empty cache: the frozen part is exported again."""
    surroundings = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONHASHSEED": "4321",
        "TZ": "Pacific/Chatham",
        "LC_ALL": "C",
        "OMP_NUM_THREADS": "1",
    }
    target = tmp_path / "another folder" / "deeper" / "copy"
    other = copy_repository(target, surroundings, is_whole=True)
    other.run("dvc", "repro", "audit", "evaluate")
    for output in OUTPUTS:
        assert files.sha256(other.path / output) == files.sha256(main_job.path / output), output
    chunks = "artifacts/embed/activations/features"
    for path in (main_job.path / chunks).iterdir():
        assert files.sha256(path) == files.sha256(other.path / chunks / path.name), path.name


def test_nothing_is_done_twice(main_job: Workspace) -> None:
    before = (main_job.path / "dvc.lock").read_bytes()
    result = main_job.run("dvc", "repro")
    assert "Running stage" not in result.stdout
    assert result.stdout.count("didn't change, skipping") == 8
    assert (main_job.path / "dvc.lock").read_bytes() == before


@pytest.mark.slow
def test_a_change_reruns_only_what_it_concerns(main_job: Workspace, tmp_path: Path) -> None:
    """The frozen part is not computed again for another l2 or another split."""
    mine = copy_repository(tmp_path / "copy", main_job.env)
    mine.run("dvc", "cache", "dir", "--local", str(main_job.path / ".dvc" / "cache"))
    (mine.path / "dvc.lock").write_bytes((main_job.path / "dvc.lock").read_bytes())
    mine.run("dvc", "checkout", "--allow-missing")
    mine.replace("params.yaml", "seed: 0", "seed: 1")
    status = mine.run("dvc", "repro", "--downstream", "ingest").stdout
    skipped = {name for name in ("ingest", "embed") if f"Stage '{name}' didn't change" in status}
    assert skipped == {"ingest", "embed"}
    for name in ("split", "audit", "train", "export", "evaluate", "register"):
        assert f"Running stage '{name}'" in status
