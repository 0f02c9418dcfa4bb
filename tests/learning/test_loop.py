"""Training itself, on networks with random weights and pictures of noise: quick, and exact."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor

from tests.features.test_stages import FAMILIES
from tlpipe.errors import TrainingError
from tlpipe.features.stages import cut
from tlpipe.learning import loop
from tlpipe.learning.batches import Chances
from tlpipe.learning.classifier import build
from tlpipe.learning.dataset import Examples, Numbers
from tlpipe.learning.endings import Stop
from tlpipe.learning.recipe import Recipe
from tlpipe.learning.schedule import Rates
from tlpipe.learning.task import Task, evaluate, measured


class Noise:
    """Pictures of noise, a class each of which is brighter."""

    def __init__(self, count: int, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, side, side, generator=generator)
        self.images[::2] += 0.5

    def varied(self, rows: Numbers, chances: Chances) -> Tensor:
        return self.plain(rows)

    def plain(self, rows: Numbers) -> Tensor:
        return self.images[torch.from_numpy(rows)]


def task(network: torch.nn.Module, side: int, count: int = 8) -> Task:
    stages = cut(network, side)
    with torch.no_grad():
        width = stages(torch.zeros(1, 3, side, side)).shape[1]
    examples = Examples(np.arange(count), np.arange(count) % 2)
    return Task(
        classifier=build(stages, width, (), 2, seed=0),
        feed=Noise(count, side),
        train=examples,
        validation=examples,
        classes=2,
        rates=Recipe().rates("resnet18"),
        device=torch.device("cpu"),
    )


def run(given: Task, recipe: Recipe) -> tuple[list[loop.Epoch], dict[str, Tensor]]:
    """Train; return the epochs, and the weights after the last one, best or not."""
    last: dict[str, Tensor] = {}

    def note(epochs: list[loop.Epoch]) -> None:
        last.update({n: t.clone() for n, t in given.classifier.state_dict().items()})

    return loop.fine_tune(given, recipe, None, note), last


def build_network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(name, weights=None, **options)
    linear = [p for p, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    network.set_submodule(linear[-1], torch.nn.Identity())
    return network


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_freezes_exactly_those_stages(name: str) -> None:
    """The last three stages are opened one after the other; all others keep every number."""
    has_one_side = "vit" in name or "swin" in name
    side = 299 if name == "inception_v3" else 224 if has_one_side else 64
    given = task(build_network(name), side, count=4)
    given.classifier.trains_by_batch = True
    before = {n: t.clone() for n, t in given.classifier.state_dict().items()}
    _, after = run(given, Recipe(epochs=4, batch=2, unfreeze_epochs=1))
    names = [stage for stage, _ in given.classifier.stages.named_children()]
    opened = tuple(f"stages.{stage}." for stage in names[-3:])
    is_open = {n: n.startswith(opened) or n.startswith("head.") for n in before}
    fixed = {n for n, _ in given.classifier.named_buffers() if not _is_statistic(n)}
    for n, tensor in before.items():
        if is_open[n] and n not in fixed:
            assert not torch.equal(tensor, after[n]), n
        else:
            assert torch.equal(tensor, after[n]), n
    assert sum(is_open.values()) > 2


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def small_task(count: int = 8) -> Task:
    return task(build_network("timm/resnet18"), 64, count)


def test_kept_statistics_stay_and_weights_move() -> None:
    given = small_task()
    before = {n: t.clone() for n, t in given.classifier.state_dict().items()}
    _, after = run(given, Recipe(epochs=1, batch=4))
    for n, tensor in after.items():
        is_fixed = n in dict(given.classifier.named_buffers())
        assert torch.equal(tensor, before[n]) == is_fixed, n


def test_training_fits_its_images_and_keeps_the_best_epoch() -> None:
    given = small_task(16)
    recipe = Recipe(epochs=6, batch=4, head_rate=0.01, label_smoothing=0.0, metric="loss")
    epochs, _ = run(given, recipe)
    assert [e.epoch for e in epochs] == list(range(7))
    assert epochs[-1].validation.loss < 0.8 * epochs[0].validation.loss
    least = min(epoch.validation.loss for epoch in epochs)
    assert evaluate(given, given.classifier, given.validation).loss == least


def test_patience_ends_training() -> None:
    given = small_task()
    recipe = Recipe(epochs=50, batch=4, stage_rate=1e-9, head_rate=1e-9, patience=2)
    assert len(run(given, recipe)[0]) < 20


@pytest.mark.parametrize(
    "changed",
    [
        {"optimiser": "sgd"},
        {"mix": "mixup"},
        {"mix": "cutmix"},
        {"balance": "loss"},
        {"balance": "sampling"},
        {"average": 0.9},
        {"label_smoothing": 0.0},
        {"weight_decay": 0.5},
        {"clip": 1e-6},
        {"stage_decay": 0.1},
    ],
    ids=str,
)
def test_every_option_changes_what_is_learned_and_the_same_one_does_not(
    changed: dict[str, object],
) -> None:
    def trained(**options: object) -> dict[str, Tensor]:
        given = replace(small_task(), rates=Recipe(**options).rates("resnet18"))
        given.train.labels[:] = [0, 0, 0, 1, 0, 1, 0, 0]  # unbalanced
        recipe = Recipe(epochs=2, batch=4, metric="loss", **options)
        training = loop.Training(given, recipe, None)
        training.begin()
        for _ in range(2):
            training.train_epoch(Stop())
            training.end_epoch()
        return {n: t.clone() for n, t in training.judged.state_dict().items()}

    plain, other, again = trained(), trained(**changed), trained(**changed)
    assert all(torch.equal(other[n], again[n]) for n in other)
    assert any(not torch.equal(plain[n], other[n]) for n in plain)


@pytest.mark.fault("T07")
def test_a_loss_that_is_no_number_stops_training() -> None:
    given = small_task()
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch \d, step \d; expected a"):
        run(replace(given, rates=Rates(1e30, 1e30, 1.0)), Recipe(epochs=3, batch=4))


def test_metrics_are_those_of_scikit_learn() -> None:
    from sklearn import metrics

    random = np.random.default_rng(0)
    true, answers = random.integers(0, 4, 300), random.integers(0, 4, 300)
    found = measured(90.0, metrics.confusion_matrix(true, answers).astype(float))
    assert found.loss == pytest.approx(0.3)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(true, answers))
    balanced = metrics.balanced_accuracy_score(true, answers)
    assert found.balanced_accuracy == pytest.approx(balanced)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(true, answers, average="macro"))
