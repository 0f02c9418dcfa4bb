"""What a step learns and what it draws, and optimiser and EMA against torch's and timm's."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
import torchvision
from scipy.special import log_softmax, softmax
from sklearn.utils.class_weight import compute_class_weight
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from tests.training import tiny
from tlpipe.backbones.stages import cut
from tlpipe.errors import Interrupted, TrainingError
from tlpipe.training import trainer
from tlpipe.training.batches import soft
from tlpipe.training.checkpoint import Checkpoints, Stop
from tlpipe.training.classifier import build
from tlpipe.training.model import Examples, Measured, Step
from tlpipe.training.recipe import LearningRates, Recipe, class_weights
from tlpipe.training.trainer import (
    Task,
    evaluate,
    is_token_normalised,
    make_optimiser,
    measured,
    restore_optimiser,
)

Floats = npt.NDArray[np.float64]


def task(network: torch.nn.Module, side: int, count: int = 8) -> Task:
    """Train a network on pictures of noise, those of one class brighter."""
    stages = cut(network, side)
    with torch.no_grad():
        width = stages(torch.zeros(1, 3, side, side)).shape[1]
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    images[::2] += 0.5
    examples = Examples(np.arange(count), np.arange(count) % 2)
    classifier = build(stages, width, (), 2, seed=0)
    return Task(classifier, tiny.Rows(images), examples, examples, 2, tiny.CPU)


def run(given: Task, recipe: Recipe) -> tuple[list[Step], dict[str, Tensor]]:
    """Train; return the epochs, and the weights after the last one, best or not."""
    last: dict[str, Tensor] = {}

    def record(epochs: list[Step]) -> None:
        last.update({n: t.clone() for n, t in given.classifier.state_dict().items()})

    return trainer.fine_tune(given, recipe, None, record), last


def build_network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network: torch.nn.Module
    if name.startswith("timm/"):
        network = timm.create_model(name.removeprefix("timm/"), num_classes=0)
        return network
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(name, weights=None, **options)
    linear = [p for p, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    network.set_submodule(linear[-1], torch.nn.Identity())
    return network


# Plain and grouped convolutions, dense and parallel blocks, shuffled channels, tokens, LayerNorm.
FAMILIES = (
    *("densenet121", "googlenet", "mobilenet_v2", "resnet18", "shufflenet_v2_x0_5"),
    *("timm/convnext_atto", "timm/regnety_002", "timm/vit_tiny_patch16_224"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_freezes_exactly_those_stages(name: str) -> None:
    """The last three stages are opened one after the other; all others keep every number."""
    has_one_side = "vit" in name or "swin" in name
    side = 299 if name == "inception_v3" else 224 if has_one_side else 64
    given = task(build_network(name), side, count=4)
    given.classifier.uses_batch_stats = True
    before = {n: t.clone() for n, t in given.classifier.state_dict().items()}
    _, after = run(given, Recipe(epochs=4, batch_size=2, unfreeze_epochs=1))
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


def test_kept_statistics_stay_and_weights_move() -> None:
    given = tiny.task([0, 1] * 6)
    before = {n: t.clone() for n, t in given.classifier.state_dict().items()}
    _, after = run(given, Recipe(epochs=1, batch_size=4))
    for n, tensor in after.items():
        is_fixed = n in dict(given.classifier.named_buffers())
        assert torch.equal(tensor, before[n]) == is_fixed, n


def test_gradual_unfreezing_opens_one_stage_more_each_period() -> None:
    """Two epochs for the head alone, two with the last stage, and so on."""
    given = tiny.task([0, 1] * 6)
    training = trainer.Training(given, Recipe(epochs=8, batch_size=6, unfreeze_epochs=2), None)
    training.begin()
    moved = []
    for _ in range(8):
        before = {n: t.clone() for n, t in given.classifier.state_dict().items()}
        training.train_epoch(Stop())
        training.end_epoch()
        after = given.classifier.state_dict()
        moved.append({n.split(".")[1] for n in after if not torch.equal(after[n], before[n])})
    order = [{"0"}, {"0", "three"}, {"0", "two", "three"}, {"0", "one", "two", "three"}]
    assert moved == [parts for parts in order for _ in range(2)]


def test_training_fits_its_images_and_keeps_the_best_epoch() -> None:
    given = tiny.task([0, 1] * 8)
    recipe = Recipe(
        epochs=10, batch_size=4, head_lr=0.05, backbone_lr=0.02, label_smoothing=0.0, metric="loss"
    )
    epochs, _ = run(given, recipe)
    assert len(epochs) == 11
    assert epochs[-1].validation.loss < 0.5 * epochs[0].validation.loss
    least = min(epoch.validation.loss for epoch in epochs)
    assert evaluate(given, given.classifier, given.validation).loss == least


def test_the_weights_of_the_best_epoch_are_kept_not_the_last() -> None:
    """With learning rates that destroy all, the best epoch is that before the first step."""
    given = tiny.task([0, 1] * 8)
    run(given, Recipe(epochs=3, batch_size=4, metric="loss"))
    start = {n: t.clone() for n, t in given.classifier.state_dict().items()}
    recipe = Recipe(epochs=2, batch_size=4, head_lr=50, backbone_lr=50, metric="loss", warmup=0.0)
    epochs, last = run(given, recipe)
    assert trainer.best_of(epochs, recipe) == 0
    kept = given.classifier.state_dict()
    assert all(torch.equal(kept[n], start[n]) for n in start)
    assert not torch.equal(last["head.0.weight"], start["head.0.weight"])


def test_patience_ends_training_so_many_epochs_after_the_best() -> None:
    """At learning rates of 1e-12 no metric moves: the start stays the best."""
    recipe = Recipe(epochs=50, batch_size=6, backbone_lr=1e-12, head_lr=1e-12, patience=3)
    epochs, _ = run(tiny.task([0, 1] * 6), recipe)
    assert len({epoch.validation.accuracy for epoch in epochs}) == 1
    best = trainer.best_of(epochs, recipe)
    assert best < 5  # rounding of the loss decides between equals
    assert len(epochs) - 1 == best + 3


def test_the_metric_picks_the_epoch() -> None:
    found = [
        Measured(loss=0.3, accuracy=0.9, balanced_accuracy=0.5, macro_f1=0.4),
        Measured(loss=0.1, accuracy=0.8, balanced_accuracy=0.6, macro_f1=0.7),
        Measured(loss=0.2, accuracy=0.7, balanced_accuracy=0.9, macro_f1=0.5),
        Measured(loss=0.2, accuracy=0.9, balanced_accuracy=0.2, macro_f1=0.1),
    ]
    epochs = [Step(None, one) for one in found]
    expected = {"loss": 1, "accuracy": 3, "balanced_accuracy": 2, "macro_f1": 1}
    for metric, best in expected.items():
        assert trainer.best_of(epochs, Recipe.model_validate({"metric": metric})) == best
    assert trainer.best_of(epochs, Recipe()) == 3
    for balance in ("loss", "sampling"):
        assert trainer.best_of(epochs, Recipe(balance=balance)) == 2
        assert trainer.best_of(epochs, Recipe(balance=balance, metric="accuracy")) == 3


def test_the_log_gives_the_metric_that_picks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run(tiny.task([0, 0, 0, 1] * 3), Recipe(epochs=1, balance="loss"))
    assert re.search(r"epoch 1 of 1: .*accuracy \d\.\d+, balanced_accuracy \d\.\d+", caplog.text)
    caplog.clear()
    run(tiny.task([0, 0, 0, 1] * 3), Recipe(epochs=1))
    assert "epoch 1 of 1" in caplog.text and "balanced" not in caplog.text


RARE, COMMON = 10, 990


@pytest.mark.fault("T15")
def test_weighing_classes_teaches_no_image_another_class() -> None:
    """Where images can be told apart, each one's optimum is its smoothed target, weighed or not.

    Weights on the columns of soft targets have p(rare) = 0.84 for every common image instead.
    """
    labels = [0] * COMMON + [1] * RARE
    given = tiny.linear_task(soft(torch.tensor(labels), 2).double(), labels)
    found = optimum(given, Recipe(balance="loss", batch_size=1000, weight_decay=0.0))
    assert found[0] == pytest.approx([0.95, 0.05], abs=1e-3)
    assert found[-1] == pytest.approx([0.05, 0.95], abs=1e-3)


@pytest.mark.fault("T15")
@pytest.mark.parametrize(("balance", "rare"), [("none", 0.01), ("loss", 0.5)])
def test_where_nothing_tells_images_apart_weights_are_the_prior(balance: Any, rare: float) -> None:
    """The optimum is the weighted mean of the smoothed targets."""
    labels = [0] * COMMON + [1] * RARE
    given = tiny.linear_task(torch.ones(1000, 1, dtype=torch.float64), labels)
    found = optimum(given, Recipe(balance=balance, batch_size=1000, weight_decay=0.0))
    assert found[0][1] == pytest.approx(0.9 * rare + 0.05, abs=1e-3)


def optimum(given: Task, recipe: Recipe) -> Floats:
    """Return the probabilities (N, C) that training on all images at once comes to."""
    training = trainer.Training(given, recipe, None)
    training.model.open_last(0)
    for rate in (50, 5):
        training.set_learning_rates(rate)
        for _ in range(150):
            training.take_step(given.train.rows, 0)
    with torch.no_grad():
        logits: Tensor = given.classifier(given.feed.plain(given.train.rows))
    return logits.softmax(1).numpy()


@pytest.mark.fault("T15")
def test_each_image_s_optimum_is_its_smoothed_mixed_target() -> None:
    """There the gradient is zero, whatever the weights; elsewhere it is the weight's multiple."""
    targets = torch.tensor([[1, 0, 0], [0.7, 0.3, 0], [0.1, 0, 0.9]], dtype=torch.float64)
    weight = torch.tensor([0.4, 1.0, 30.0], dtype=torch.float64)
    smoothed = 0.9 * targets + 0.1 / 3
    logits = smoothed.log().requires_grad_()
    trainer.losses(logits, targets, weight, 0.1).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12
    other = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    trainer.losses(other, targets, weight, 0.1).sum().backward()
    weights = torch.tensor([0.4, 0.7 * 0.4 + 0.3, 0.1 * 0.4 + 0.9 * 30])
    assert other.grad is not None
    assert torch.allclose(other.grad, weights[:, None] * (1 / 3 - smoothed))


def test_class_weights_are_those_of_scikit_learn() -> None:
    labels = np.repeat([0, 1, 2], [70, 25, 5])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(labels, 3) == pytest.approx(expected)
    assert class_weights(labels, 3)[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.0},
        {"label_smoothing": 0.3},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 0.01, "weight_decay": 0.5},
        {"balance": "loss"},
        {"optimiser": "adamw"},
        {"optimiser": "adamw", "weight_decay": 0.5},
    ],
    ids=str,
)
def test_two_steps_are_those_of_the_formulas(options: dict[str, Any]) -> None:
    """Multinomial logistic regression, whose gradient is written down here."""
    sgd = {"optimiser": "sgd", "head_lr": 0.2, "batch_size": 9}
    recipe = Recipe.model_validate(sgd | options)
    labels = [0] * 6 + [1] * 2 + [2]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    given = tiny.linear_task(features, labels)
    training = trainer.Training(given, recipe, None)
    training.model.open_last(0)
    training.set_learning_rates(0.5)
    losses = [training.take_step(given.train.rows, step) for step in range(2)]

    x, y = features.numpy(), np.eye(3)[labels]
    images = class_weights(np.array(labels), 3)[labels] if recipe.balance == "loss" else np.ones(9)
    targets = (1 - recipe.label_smoothing) * y + recipe.label_smoothing / 3
    weight, bias = np.zeros((3, 4)), np.zeros(3)
    moments: list[Floats] = [np.zeros((3, 4)), np.zeros(3)]
    squares: list[Floats] = [np.zeros((3, 4)), np.zeros(3)]
    for step, loss in enumerate(losses, start=1):
        logits = x @ weight.T + bias
        assert loss == pytest.approx(
            -(images[:, None] * targets * log_softmax(logits, 1)).sum() / 9
        )
        residual = images[:, None] * (softmax(logits, 1) - targets) / 9
        gradients = [residual.T @ x, residual.sum(0)]
        length = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        gradients = [g * min(1, recipe.max_grad_norm / (length + 1e-6)) for g in gradients]
        moved = []
        for i, old in enumerate((weight, bias)):
            decay = 0 if i else recipe.weight_decay
            if recipe.optimiser == "sgd":
                moments[i] = 0.9 * moments[i] + gradients[i] + decay * old
                moved.append(old - 0.1 * moments[i])
                continue
            moments[i] = 0.9 * moments[i] + 0.1 * gradients[i]
            squares[i] = 0.999 * squares[i] + 0.001 * gradients[i] ** 2
            spread = np.sqrt(squares[i] / (1 - 0.999**step)) + 1e-8
            moved.append(old * (1 - 0.1 * decay) - 0.1 * moments[i] / (1 - 0.9**step) / spread)
        weight, bias = moved
    (layer,) = given.classifier.layers
    assert layer.weight.detach().numpy() == pytest.approx(weight, rel=1e-6, abs=1e-9)
    assert layer.bias.detach().numpy() == pytest.approx(bias, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("batch_stats", [False, True])
def test_two_steps_of_open_stages_are_those_of_plain_torch(batch_stats: bool) -> None:
    """With statistics of each batch, which are averaged, and with pretrained ones, which stay."""
    still = {"label_smoothing": 0.0, "weight_decay": 0.0, "layer_decay": 1.0}
    learning_rates = {"optimiser": "sgd", "backbone_lr": 0.2, "head_lr": 0.2, "batch_size": 6}
    recipe = Recipe.model_validate(still | learning_rates)
    given = tiny.task([0, 1, 2] * 2, dtype=torch.float64, batch_stats=batch_stats)
    plain = nn.Sequential(tiny.stages(), nn.Linear(8, 3)).double()
    plain[0].load_state_dict(given.classifier.stages.state_dict())
    plain[1].load_state_dict(given.classifier.layers[0].state_dict())
    training = trainer.Training(given, recipe, None)
    training.model.open_last(3)
    training.set_learning_rates(0.5)

    for module in plain.modules():
        module.train(batch_stats or not isinstance(module, nn.BatchNorm2d))
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    images, labels = given.feed.plain(given.train.rows), torch.tensor(given.train.labels)
    for step in range(2):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(plain(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), recipe.max_grad_norm)
        optimiser.step()
        assert training.take_step(given.train.rows, step) == pytest.approx(loss.item())
    found = training.model.state_dict()
    moved = 0
    for name, tensor in plain.state_dict().items():
        ours = found[name.replace("0.", "stages.", 1) if name[0] == "0" else f"head.0{name[1:]}"]
        assert torch.allclose(ours.to(tensor), tensor, rtol=1e-9, atol=1e-12), name
        moved += "running_var" in name and not torch.equal(tensor, torch.ones_like(tensor))
    assert moved == (3 if batch_stats else 0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_labels_of_a_step_are_mixed_alike(kind: Any) -> None:
    """Each picture shows its label: a mixed one, by its mean, the shares of the mixed label."""
    labels = list(range(6))
    pictures = soft(torch.tensor(labels), 6).double()[:, :, None, None].repeat(1, 1, 8, 8)
    given = tiny.linear_task(pictures.mean((2, 3)), labels)
    given.classifier.stages.append(torch.nn.AdaptiveAvgPool2d(1))
    given.classifier.stages.append(torch.nn.Flatten())
    given.feed.inputs = pictures  # type: ignore[attr-defined]
    torch.nn.init.eye_(given.classifier.layers[0].weight)
    seen: list[Tensor] = []
    given.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    recipe = Recipe(batch_size=6, mixup=kind, mixup_alpha=1.0, label_smoothing=0.0)
    training = trainer.Training(given, recipe, None)
    training.model.open_last(0)
    training.set_learning_rates(0.0)
    mixed = 0
    for step in range(10):
        loss = training.take_step(given.train.rows, step)
        shares = seen[-1].mean((2, 3))
        assert loss == pytest.approx(float(-(shares * shares.log_softmax(1)).sum() / 6))
        assert torch.allclose(shares.sum(1), torch.ones(6, dtype=torch.float64))
        mixed += int(((shares > 0.01) & (shares < 0.99)).any())
    assert mixed >= 8


def test_sampling_draws_all_classes_alike() -> None:
    given = tiny.task([0] * 90 + [1] * 10)
    training = trainer.Training(given, Recipe(balance="sampling", epochs=8, batch_size=25), None)
    training.begin()
    for _ in range(8):
        training.train_epoch(Stop())
        training.end_epoch()
    assert isinstance(given.feed, tiny.Rows)
    drawn = np.concatenate(given.feed.trained)
    assert len(drawn) == 800
    # Four standard deviations of a fair coin.
    assert (given.train.labels[drawn] == 1).mean() == pytest.approx(0.5, abs=4 * 0.5 / 800**0.5)
    # Within a class all alike: 40 times each of the ten, give or take.
    assert np.bincount(drawn)[90:].min() > 15


@pytest.mark.parametrize("unfreeze_epochs", [0, 2])
def test_rates_follow_warm_up_and_cosine_and_rise_anew_for_what_opens_late(
    unfreeze_epochs: int,
) -> None:
    given = tiny.task([0, 1] * 6)
    recipe = Recipe(
        epochs=8, batch_size=3, warmup=0.125, head_lr=0.1, unfreeze_epochs=unfreeze_epochs
    )
    learning_rates: list[dict[int, float]] = []

    class Recorder(tiny.Rows):
        def augmented(
            self, rows: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]
        ) -> Tensor:
            groups = training.optimiser.param_groups
            learning_rates.append(
                {group["depth"]: group["lr"] / group["peak_lr"] for group in groups}
            )
            return super().augmented(rows, uniforms)

    given = replace(given, feed=Recorder(given.feed.inputs))  # type: ignore[attr-defined]
    training = trainer.Training(given, recipe, None)
    training.begin()
    for _ in range(8):
        training.train_epoch(Stop())
        training.end_epoch()
    steps, rise = 32, 4
    assert len(learning_rates) == steps
    for depth in range(4):
        opened = depth * unfreeze_epochs * 4
        for step in range(opened, steps):
            cosine = 1.0
            if step >= rise:
                cosine = 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
            expected = cosine * min(1, (step - opened + 1) / rise)
            assert learning_rates[step][depth] == pytest.approx(expected), (depth, step)


@pytest.mark.fault("T07")
def test_a_loss_that_is_no_number_stops_training() -> None:
    expected = (
        r"the loss is (nan|inf) in epoch \d, step \d; expected a number. No model was written. "
        r"Lower train.backbone_lr and train.head_lr, now 1e\+30 and 1e\+30"
    )
    recipe = Recipe(epochs=3, batch_size=4, head_lr=1e30, backbone_lr=1e30, layer_decay=1.0)
    with pytest.raises(TrainingError, match=expected):
        run(tiny.task([0, 1] * 6), recipe)


RESUMED = [
    {"optimiser": optimiser, **more}
    for optimiser in ("adamw", "sgd")
    for more in (
        {},
        {"ema_decay": 0.9},
        {"unfreeze_epochs": 1},
        {"mixup": "mixup", "balance": "loss"},
    )
]


@pytest.mark.fault("T01", "T14")
@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_a_resumed_training_has_every_bit_of_the_undisturbed_one(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """3x3 convolutions, BatchNorm by batches, dropout; stopped in the middle of the third epoch."""
    recipe = Recipe(epochs=4, batch_size=4, **options)
    stop = Stop()

    class Stopping(tiny.Rows):
        def augmented(
            self, rows: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]
        ) -> Tensor:
            stop.requested = len(self.trained) == 9
            return super().augmented(rows, uniforms)

    def make(feed: type[tiny.Rows], folder: Path) -> trainer.Training:
        given = tiny.task([0, 0, 0, 1] * 4, dropout=0.2, batch_stats=True)
        given = replace(given, feed=feed(given.feed.inputs))  # type: ignore[attr-defined]
        training = trainer.Training(given, recipe, Checkpoints(folder, "digest"))
        training.begin()
        return training

    undisturbed = make(tiny.Rows, tmp_path / "one")
    finish(undisturbed, Stop())
    with pytest.raises(Interrupted, match="stopped in epoch 3 of 4 after step 2 of 4; everything"):
        finish(make(Stopping, tmp_path / "two"), stop)
    caplog.clear()
    caplog.set_level("INFO")
    resumed = make(tiny.Rows, tmp_path / "two")
    assert "resumed from the checkpoint at epoch 3, step 3" in caplog.text
    finish(resumed, Stop())
    assert isinstance(resumed.task.feed, tiny.Rows)
    assert len(resumed.task.feed.trained) == 2 + 4  # and no step more
    found, expected = every_tensor(resumed), every_tensor(undisturbed)
    assert found.keys() == expected.keys()
    assert sum(name.startswith("optimiser") for name in found) > 10
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].stride() == tensor.stride(), name
    assert resumed.state.history == undisturbed.state.history


def finish(training: trainer.Training, stop: Stop) -> None:
    while not training.is_over:
        training.train_epoch(stop)
        training.end_epoch()


def every_tensor(training: trainer.Training) -> dict[str, Tensor]:
    """Return all that changes: weights, their average, the optimiser's statistics."""
    tensors = {f"model.{n}": t for n, t in training.model.state_dict().items()}
    if training.ema is not None:
        tensors |= {f"ema.{n}": t for n, t in training.ema.module.state_dict().items()}
    for number, state in training.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{n}": t for n, t in state.items() if t is not None}
    return tensors


def test_metrics_are_those_of_scikit_learn() -> None:
    from sklearn import metrics

    random = np.random.default_rng(0)
    true, answers = random.integers(0, 4, 300), random.integers(0, 4, 300)
    confusion = metrics.confusion_matrix(true, answers).astype(float)
    found = measured(90.0, np.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)]))
    assert found.loss == pytest.approx(0.3)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(true, answers))
    balanced = metrics.balanced_accuracy_score(true, answers)
    assert found.balanced_accuracy == pytest.approx(balanced)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(true, answers, average="macro"))


def groups_of(
    stages: nn.Sequential, recipe: Recipe, learning_rates: LearningRates
) -> dict[str, dict[str, float]]:
    """Return the options of each parameter's group, by the parameter's name."""
    model = build(stages, 4, (), 2, seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimiser = make_optimiser(model, learning_rates, recipe, tiny.CPU)
    found = [(names[id(p)], group) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())  # each one, once
    return dict(found)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",  # pos_embed, cls_token
        "swin_tiny_patch4_window7_224",  # relative_position_bias_table
        "levit_128s",  # attention_biases
        "resnet18",
        "pvt_v2_b0",
    ],
)
def test_what_decays_is_what_decays_in_timm(name: str) -> None:
    network = timm.create_model(name, num_classes=0)
    spared: set[str] = getattr(network, "no_weight_decay", set)()
    groups = param_groups_weight_decay(network, 0.05, no_weight_decay_list=spared)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    expected = {n: decays[id(p)] for n, p in network.named_parameters()}
    assert set(expected.values()) == {0.0, 0.05}

    found = groups_of(cut(network, 224), Recipe(weight_decay=0.05), LearningRates(1e-3, 1e-3, 1.0))
    ours = {n.split(".", 2)[2]: g["weight_decay"] for n, g in found.items() if "stages" in n}
    assert ours == expected
    assert (found["head.0.weight"]["weight_decay"], found["head.0.bias"]["weight_decay"]) == (
        0.05,
        0.0,
    )


def test_position_embeddings_of_torchvision_do_not_decay() -> None:
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16)
    network.heads = nn.Identity()
    found = groups_of(cut(network, 32), Recipe(weight_decay=0.05), LearningRates(1e-3, 1e-3, 1.0))
    decays = {n.split(".")[-1]: g["weight_decay"] for n, g in found.items()}
    assert decays["class_token"] == decays["pos_embedding"] == 0
    assert decays["in_proj_weight"] == 0.05


def test_rates_fall_with_depth_and_the_head_has_its_own() -> None:
    found = groups_of(
        tiny.stages(), Recipe(), LearningRates(head=0.5, backbone=0.1, layer_decay=0.3)
    )
    expected = {"head": 0.5, "three": 0.1, "two": 0.1 * 0.3, "one": 0.1 * 0.3 * 0.3}
    for name, group in found.items():
        part = next(part for part in expected if part in name.split("."))
        assert group["peak_lr"] == pytest.approx(expected[part]), name


NETWORKS = {
    "pvt_v2_b0": True,
    "twins_pcpvt_small": True,
    "hiera_tiny_224": True,
    "resmlp_12_224": True,
    "poolformer_s12": True,
    "convnext_atto": True,
    "xcit_nano_12_p16_224": True,
    "efficientvit_b0": False,
    "efficientvit_m0": False,
    "repvit_m0_9": False,
    "levit_128s": False,
    "resnet18": False,
    "resnetv2_50x1_bit": False,  # GroupNorm
    "nfnet_f0": False,  # no normalisation
    "mobilevit_xxs": False,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_tell_how_a_network_normalises(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    assert is_token_normalised(network) == NETWORKS[name]


def test_a_tie_is_a_network_with_batch_norm() -> None:
    layers = (nn.LayerNorm(3), nn.BatchNorm2d(3))
    assert not is_token_normalised(nn.Sequential(*layers))
    assert is_token_normalised(nn.Sequential(*layers, nn.GroupNorm(1, 3)))
    assert not is_token_normalised(nn.Sequential(*layers, nn.GroupNorm(3, 3)))


def test_rates_follow_the_network_and_what_is_set_wins() -> None:
    def learning_rates(network: nn.Module, recipe: Recipe) -> LearningRates:
        given = tiny.task([0, 1])
        given.classifier.stages = nn.Sequential(nn.Sequential(network))
        return trainer.Training(given, recipe, None).learning_rates

    with torch.device("meta"):
        tokens = timm.create_model("pvt_v2_b0", num_classes=0)
    assert learning_rates(tiny.stages(), Recipe()) == (1e-3, 1e-3, 0.8)
    assert learning_rates(tokens, Recipe()) == (1e-3, 5e-5, 0.75)
    assert learning_rates(tokens, Recipe(optimiser="sgd")) == pytest.approx((0.05, 1e-3, 0.75))
    assert learning_rates(tokens, Recipe(backbone_lr=0.5, layer_decay=0.9)) == (1e-3, 0.5, 0.9)
    assert learning_rates(tokens, Recipe(head_lr=0.5)).head == 0.5


def test_the_average_follows_its_formula() -> None:
    """Weights and running statistics; the integer that counts batches is copied.

    Of update n, counted from 1 over all epochs, the decay is the least of 1 - n ** (-2 / 3) and
    what is set: so a short training is not averaged with what it started from.
    """
    given = tiny.task([0, 1] * 6, batch_stats=True)
    training = trainer.Training(given, Recipe(batch_size=4, ema_decay=0.6), None)
    training.model.open_last(3)
    training.set_learning_rates(1.0)
    expected = {n: t.double() for n, t in training.model.state_dict().items()}
    for update in range(8):  # of epochs of three steps
        training.state.epoch, step = divmod(update, 3)
        training.take_step(given.train.rows[:4], step)
        decay = min(1 - (update + 1) ** (-2 / 3), 0.6)
        for name, tensor in training.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    ours = training.eval_model.state_dict()
    counts = [t for n, t in ours.items() if n.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [8, 8, 8]
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.fault("T14")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_state_comes_back_in_the_layout_of_its_parameter(
    optimiser: Literal["adamw", "sgd"],
) -> None:
    given = tiny.task([0, 1] * 4)
    training = trainer.Training(given, Recipe(batch_size=4, optimiser=optimiser), None)
    training.model.open_last(3)
    training.take_step(given.train.rows[:4], 0)
    saved = training.optimiser.state_dict()["state"]
    contiguous = {
        number: {
            name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in s.items()
        }
        for number, s in saved.items()
    }
    expected = copy.deepcopy(saved)
    restore_optimiser(training.optimiser, contiguous)
    found = training.optimiser.state_dict()["state"]
    differ = 0
    for number, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[number][name], tensor), name
            assert found[number][name].stride() == tensor.stride(), name
            differ += tensor.stride() != contiguous[number][name].stride()
    assert differ >= 3  # a 3x3 convolution in every stage: without it, this test shows nothing
