import shutil
from pathlib import Path

import pytest

from tests.conftest import Workspace


@pytest.fixture
def built(main_job: Workspace, tmp_path: Path) -> Workspace:
    """A folder with what is to be registered, and a registry of its own that is still empty."""
    target = tmp_path / "built"
    target.mkdir()
    shutil.copy(main_job.path / "params.yaml", target)
    shutil.copy(main_job.path / "dvc.lock", target)
    for stage in ("export", "evaluate", "train", "ingest", "split", "audit"):
        ignore = shutil.ignore_patterns("pixels", "model")
        shutil.copytree(
            main_job.path / "artifacts" / stage, target / "artifacts" / stage, ignore=ignore
        )
    return Workspace(target, main_job.env)
