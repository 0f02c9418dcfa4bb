"""A checkpoint belongs to the code, data, parameters and libraries it was made with."""

from pathlib import Path

import grimp
import numpy as np
import pytest

from tests.training import tiny
from tlpipe.training import tuning
from tlpipe.training.checkpoint import Checkpoint, Checkpoints
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.recipe import Recipe

# These have no part in any weight: what they do to a training is compared (checkpoint), asked for
# (signals), decided before (libtiff, values: which images are usable, and their pixels), taken from
# elsewhere by digest
# (activations, frozen), or recorded (device).
WITHOUT_PART = {
    "tlpipe.code_digest",
    "tlpipe.data.manifest",
    "tlpipe.data.values",
    "tlpipe.errors",
    "tlpipe.backbones.activations",
    "tlpipe.backbones.frozen",
    "tlpipe.files",
    "tlpipe.held_out",
    "tlpipe.training.checkpoint",
    "tlpipe.params",
    "tlpipe.progress",
}


def test_the_digest_covers_all_code_that_trains() -> None:
    graph = grimp.build_graph("tlpipe", cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}
    closure = {"tlpipe.training.tuning", *graph.find_upstream_modules("tlpipe.training.tuning")}
    assert set(tuning._CODE) | WITHOUT_PART == closure - packages
    assert not set(tuning._CODE) & WITHOUT_PART


def digest(data: str = "data", recipe: Recipe | None = None) -> str:
    nothing = Examples(np.arange(0), np.arange(0))
    given = Dataset(None, None, (), nothing, nothing, (), "", data)  # type: ignore[arg-type]
    return tuning.digest_of(given, recipe or Recipe(), tiny.task([0, 1]))


def test_all_that_changes_weights_changes_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = digest()
    assert digest() == plain
    assert digest(recipe=Recipe(checkpoint_minutes=1.0)) == plain
    others = [digest("other"), digest(recipe=Recipe(seed=1)), digest(recipe=Recipe(ema_decay=0.9))]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "of_modules", lambda *_: "other code")
        others.append(digest())
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "versions", lambda *_: {"torch": "0"})
        others.append(digest())
    assert len({plain, *others}) == 6


@pytest.mark.fault("T06")
def test_a_checkpoint_of_another_digest_is_not_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    Checkpoints(tmp_path, digest("old")).save(Checkpoint({"epoch": 1}, {"x": torch.ones(1)}))
    assert Checkpoints(tmp_path, digest("old")).newest() is not None
    assert Checkpoints(tmp_path, digest("new")).newest() is None
    assert "are of other data, parameters, threads or code" in caplog.text
