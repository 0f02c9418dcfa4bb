"""What training starts from: BatchNorm statistics, and stages that are re-initialised."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from tests.training import tiny
from tlpipe.backbones.activations import Activations, Origin
from tlpipe.backbones.backbone import describe, load_network
from tlpipe.backbones.weights import Weights
from tlpipe.errors import ParamsError
from tlpipe.training import linear_probe, tuning
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.recipe import Recipe
from tlpipe.training.trainer import Task


def pretrained(spread: float) -> Task:
    """A network whose statistics are those of its images, spreads ``spread`` times as large."""
    given = tiny.task([0, 1] * 64)
    given.classifier.adapt(given.feed.plain(given.train.rows[i : i + 64]) for i in (0, 64))
    given.classifier.uses_batch_stats = False
    for layer in given.classifier.batch_norms:
        tiny.statistics(layer)[1].mul_(spread**2)
    return given


def test_adapting_gives_the_means_over_batches_and_how_far_spreads_were_off() -> None:
    given = tiny.task([0, 1] * 64)
    images = given.feed.plain(given.train.rows)
    stage = given.classifier.stages[0]
    assert isinstance(stage, nn.Sequential)
    convolution, norm = stage[0], stage[1]
    shift = given.classifier.adapt([images[:64], images[64:]])
    with torch.no_grad():
        halves = [convolution(half) for half in (images[:64], images[64:])]
    mean, variance = tiny.statistics(norm)
    assert torch.allclose(mean, sum(h.mean((0, 2, 3)) for h in halves) / 2, atol=1e-6)
    assert torch.allclose(variance, sum(h.var((0, 2, 3)) for h in halves) / 2, rtol=1e-5)
    assert given.classifier.uses_batch_stats and norm.momentum == 0.1 and not norm.training
    # Before, every variance was 1.
    norms = given.classifier.batch_norms
    logs = [torch.log(tiny.statistics(layer)[1] + layer.eps) for layer in norms]
    one = np.log1p(1e-5)
    expected = np.mean([float((log - one).abs().mean() / 2) for log in logs])
    assert shift == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("batch_norm", "spread", "batch_stats"),
    [
        ("auto", 1.05, False),  # e^0.05
        ("auto", 1.3, True),  # e^0.26
        ("auto", 1 / 1.3, True),
        ("batch", 1.0, True),
        ("pretrained", 2.0, False),
    ],
)
def test_statistics_are_kept_where_the_images_are_like_those_before(
    batch_norm: Any, spread: float, batch_stats: bool
) -> None:
    given = pretrained(spread)
    before = {n: t.clone() for n, t in given.classifier.state_dict().items()}
    recipe = Recipe(batch_norm=batch_norm)
    tuning.choose_batch_stats(given.classifier, given.feed, given.train, recipe)
    assert given.classifier.uses_batch_stats == batch_stats
    after = given.classifier.state_dict()
    own = pretrained(1.0).classifier.state_dict()
    for name, tensor in after.items():
        if batch_stats and "running" in name:  # those of the images, over other batches of 64
            assert torch.allclose(tensor, own[name], rtol=0.05, atol=0.05), name
        elif "num_batches" not in name:
            assert torch.equal(tensor, before[name]), name


def dataset(name: str, boundary: str) -> Dataset:
    """Describe images of which nothing but the boundary is looked at."""
    backbone = describe(name)
    origin = Origin.model_construct(weights="none", weights_sha256=None, boundary=boundary)
    nothing = Examples(np.arange(0), np.arange(0))
    found = Activations(None, None, np.arange(0), origin)  # type: ignore[arg-type]
    return Dataset(found, backbone, ("a", "b"), nothing, nothing, (), "", "")


def test_reinitialised_stages_are_drawn_with_the_seed_and_no_others() -> None:
    data = dataset("efficientnet_lite0", "blocks4")
    before = tuning._start(data, Recipe(seed=7)).stages.state_dict()
    after = tuning._start(data, Recipe(seed=7, reinitialise=1)).stages.state_dict()
    drawn = load_network(data.backbone, Weights(None, ""), seed=7)
    last = data.backbone.stages[-1].name
    assert before.keys() == after.keys()
    redrawn = 0
    for name, tensor in after.items():
        if name.startswith(f"{last}."):
            assert torch.equal(tensor, drawn.state_dict()[name]), name
            redrawn += not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name]), name
    assert redrawn > 0


def test_fine_tuning_starts_from_a_head_that_has_not_seen_validation() -> None:
    """On features as the stages give them that will be trained, not as they are stored."""
    given, rows = tiny.task([0, 1, 2] * 42), np.arange(126)
    train, validation = (Examples(part, part % 3) for part in (rows[:90], rows[90:]))
    data = replace(
        dataset("efficientnet_lite0", "blocks4"),
        labels=("a", "b", "c"),
        train=train,
        validation=validation,
        groups=tuple(map(str, rows)),
    )
    recipe = Recipe(reinitialise=1, l2=(0.1,))
    assert tuning._solve_head(given.classifier, given.feed, data, recipe) == 0.1
    with torch.inference_mode():
        features = given.classifier.stages(given.feed.plain(train.rows)).double().numpy()
    standard = linear_probe.standardisation([features])
    assert given.classifier.mean.numpy() == pytest.approx(standard.mean, rel=1e-4)
    model = LogisticRegression(C=1 / (0.1 * 90), max_iter=5000, tol=1e-10)
    model.fit(standard.apply(features), train.labels)
    (layer,) = given.classifier.layers
    assert np.abs(layer.weight.detach().numpy() - model.coef_).max() < 1e-3


@pytest.mark.fault("T16")
@pytest.mark.parametrize("chosen", ["batch", "pretrained"])
def test_statistics_of_layers_that_are_not_there_are_errors(chosen: Any) -> None:
    given = tiny.linear_task(torch.ones(2, 3), [0, 1])
    expected = rf"train\.batch_norm is {chosen}; no open stage has a BatchNorm layer"
    with pytest.raises(ParamsError, match=expected):
        tuning.choose_batch_stats(
            given.classifier, given.feed, given.train, Recipe(batch_norm=chosen)
        )
    tuning.choose_batch_stats(given.classifier, given.feed, given.train, Recipe())


@pytest.mark.parametrize(
    ("images", "recipe", "count", "least"),
    [(33, Recipe(batch_size=2), 4, "steps of 1"), (5, Recipe(batch_size=4), 3, "steps of 2")],
)
def test_steps_without_an_image_for_each_process_are_errors(
    images: int, recipe: Recipe, count: int, least: str
) -> None:
    with pytest.raises(
        ParamsError, match=rf"train\.batch_size is {recipe.batch_size}; {images} .* {least}"
    ):
        tuning._check_shares(images, recipe, count)
    tuning._check_shares(images, recipe, 1)
    tuning._check_shares(16, Recipe(batch_size=8), 8)
