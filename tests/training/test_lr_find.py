import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Workspace
from tests.training import tiny
from tlpipe.errors import TrainingError
from tlpipe.training import trainer
from tlpipe.training.lr_find import choose, has_diverged, smoothed, try_learning_rates
from tlpipe.training.recipe import LearningRates, Recipe


def test_the_steepest_place_before_the_lowest_is_taken() -> None:
    factors = np.geomspace(1e-3, 1e3, 61)
    places = np.log10(factors)
    losses = 2 - 1.5 / (1 + np.exp(-6 * (places + 1))) + np.maximum(places - 0.5, 0) * 5
    found = choose(factors, losses, LearningRates(1.0, 0.5, 0.8))
    assert found.learning_rates is not None
    assert found.learning_rates.head == pytest.approx(0.1, rel=0.01)
    assert found.learning_rates.backbone == pytest.approx(0.05, rel=0.01)
    assert choose(factors, np.arange(61.0), LearningRates(1.0, 0.5, 0.8)).learning_rates is None
    assert smoothed(np.full(9, 2.5)) == pytest.approx(np.full(9, 2.5))


def test_smoothing_is_the_average_without_the_bias_of_its_start() -> None:
    losses = np.random.default_rng(0).random(30)
    for last in range(30):
        weights = 0.9 ** np.arange(last, -1, -1)
        expected = (weights * losses[: last + 1]).sum() / weights.sum()
        assert smoothed(losses)[last] == pytest.approx(expected)


def test_a_noisy_batch_ends_nothing_and_a_loss_that_explodes_does() -> None:
    """A solved head starts near 0, where one batch may be fifty times another."""
    noisy = np.tile([0.002, 0.1, 0.01], 20)
    assert not any(has_diverged(noisy[:end], classes=3) for end in range(1, 61))
    exploded = np.append(noisy, np.full(30, 5.0))
    ends = [end for end in range(1, 91) if has_diverged(exploded[:end], classes=3)]
    # 5 * (1 - 0.9^n) is worse than guessing, log(3), from the third bad step on.
    assert ends[0] == 63
    untrained = np.append(np.full(20, np.log(10)), np.full(40, 30.0))
    ends = [end for end in range(1, 61) if has_diverged(untrained[:end], classes=10)]
    # Four times the least, 9.2, is passed where 27.7 * (1 - 0.9^n) > 6.9, up to the start's bias.
    assert ends[0] == 23


@pytest.mark.parametrize("head_lr", [0.1, 1e30])
def test_trying_rates_ends_where_the_loss_explodes(head_lr: float) -> None:
    recipe = Recipe(head_lr=head_lr, backbone_lr=head_lr, batch_size=4, optimiser="sgd")
    losses = try_learning_rates(trainer.Training(tiny.task([0, 1] * 8), recipe, None))
    assert np.isfinite(losses).all()
    assert 0 < len(losses) < 100
    assert not any(has_diverged(losses[:end], 2) for end in range(1, len(losses)))
    if head_lr == 0.1:
        assert has_diverged(losses, 2)
    else:  # the next one was no number
        assert len(losses) < 5


def test_a_network_that_gives_no_number_at_all_is_said() -> None:
    given = tiny.task([0, 1] * 8)
    torch.nn.init.constant_(given.classifier.layers[0].weight, float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1, step 1"):
        try_learning_rates(trainer.Training(given, Recipe(batch_size=4), None))


def test_lr_find_draws_and_suggests(main_job: Workspace, empty: Workspace) -> None:
    artifacts = main_job.path / "artifacts"
    (empty.path / "artifacts").symlink_to(artifacts)
    said = empty.call("lr-find", code=3).stderr
    assert "embed.freeze is all and train.hidden is empty; a linear head is solved" in said
    empty.configure("train", hidden=[64])
    said = empty.call("lr-find", "--plot", "lr-find.png").stdout
    found = re.findall(r"train\.(\w+): ([\d.e-]+)", said)
    assert [name for name, _ in found] == ["head_lr"]  # no stage is open
    assert 1e-5 < float(found[0][1]) < 1
    with Image.open(empty.path / "lr-find.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert sorted(p.name for p in Path(empty.path).iterdir()) == [
        "artifacts",
        "lr-find.png",
        "params.yaml",
        "tlpipe.lock.yaml",
    ]
