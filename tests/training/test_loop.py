"""Training itself, on tiny networks with random weights: quick, and against closed forms."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
import torchvision
from scipy.special import log_softmax, softmax
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from tests.training import tiny
from tlpipe.backbones.stages import cut
from tlpipe.errors import Interrupted, TrainingError
from tlpipe.training import loop
from tlpipe.training.batches import soft
from tlpipe.training.checkpoint import Checkpoints
from tlpipe.training.classifier import build
from tlpipe.training.dataset import Examples
from tlpipe.training.recipe import Recipe, class_weights
from tlpipe.training.signals import Stop
from tlpipe.training.task import Measured, Task, evaluate, measured

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


def run(given: Task, recipe: Recipe) -> tuple[list[loop.Epoch], dict[str, Tensor]]:
    """Train; return the epochs, and the weights after the last one, best or not."""
    last: dict[str, Tensor] = {}

    def record(epochs: list[loop.Epoch]) -> None:
        last.update({n: t.clone() for n, t in given.classifier.state_dict().items()})

    return loop.fine_tune(given, recipe, None, record), last


def build_network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=0)
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
    training = loop.Training(given, Recipe(epochs=8, batch_size=6, unfreeze_epochs=2), None)
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
    assert [e.epoch for e in epochs] == list(range(11))
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
    assert loop.best_of(epochs, recipe).epoch == 0
    kept = given.classifier.state_dict()
    assert all(torch.equal(kept[n], start[n]) for n in start)
    assert not torch.equal(last["head.0.weight"], start["head.0.weight"])


def test_patience_ends_training_so_many_epochs_after_the_best() -> None:
    """At learning rates of 1e-12 no metric moves: the start stays the best."""
    recipe = Recipe(epochs=50, batch_size=6, backbone_lr=1e-12, head_lr=1e-12, patience=3)
    epochs, _ = run(tiny.task([0, 1] * 6), recipe)
    assert len({epoch.validation.accuracy for epoch in epochs}) == 1
    best = loop.best_of(epochs, recipe).epoch
    assert best < 5  # rounding of the loss decides between equals
    assert len(epochs) - 1 == best + 3


def test_the_metric_picks_the_epoch() -> None:
    found = [
        Measured(loss=0.3, accuracy=0.9, balanced_accuracy=0.5, macro_f1=0.4),
        Measured(loss=0.1, accuracy=0.8, balanced_accuracy=0.6, macro_f1=0.7),
        Measured(loss=0.2, accuracy=0.7, balanced_accuracy=0.9, macro_f1=0.5),
        Measured(loss=0.2, accuracy=0.9, balanced_accuracy=0.2, macro_f1=0.1),
    ]
    epochs = [loop.Epoch(number, None, one) for number, one in enumerate(found)]
    expected = {"loss": 1, "accuracy": 3, "balanced_accuracy": 2, "macro_f1": 1}
    for metric, best in expected.items():
        assert loop.best_of(epochs, Recipe(metric=metric)).epoch == best
    assert loop.best_of(epochs, Recipe()).epoch == 3
    for balance in ("loss", "sampling"):
        assert loop.best_of(epochs, Recipe(balance=balance)).epoch == 2
        assert loop.best_of(epochs, Recipe(balance=balance, metric="accuracy")).epoch == 3


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
    training = loop.Training(given, recipe, None)
    training.model.open_last(0)
    for rate in (50, 5):
        training.set_learning_rates(rate)
        for _ in range(150):
            training.take_step(given.train.rows, 0)
    with torch.no_grad():
        return given.classifier(given.feed.plain(given.train.rows)).softmax(1).numpy()


@pytest.mark.fault("T15")
def test_each_image_s_optimum_is_its_smoothed_mixed_target() -> None:
    """There the gradient is zero, whatever the weights; elsewhere it is the weight's multiple."""
    targets = torch.tensor([[1, 0, 0], [0.7, 0.3, 0], [0.1, 0, 0.9]], dtype=torch.float64)
    weight = torch.tensor([0.4, 1.0, 30.0], dtype=torch.float64)
    smoothed = 0.9 * targets + 0.1 / 3
    logits = smoothed.log().requires_grad_()
    loop.losses(logits, targets, weight, 0.1).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12
    other = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    loop.losses(other, targets, weight, 0.1).sum().backward()
    weights = torch.tensor([0.4, 0.7 * 0.4 + 0.3, 0.1 * 0.4 + 0.9 * 30])
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
    recipe = Recipe(**{"optimiser": "sgd", "head_lr": 0.2, "batch_size": 9} | options)
    labels = [0] * 6 + [1] * 2 + [2]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    given = tiny.linear_task(features, labels)
    training = loop.Training(given, recipe, None)
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
    recipe = Recipe(**still, **learning_rates)  # type: ignore[arg-type]
    given = tiny.task([0, 1, 2] * 2, dtype=torch.float64, batch_stats=batch_stats)
    plain = nn.Sequential(tiny.stages(), nn.Linear(8, 3)).double()
    plain[0].load_state_dict(given.classifier.stages.state_dict())
    plain[1].load_state_dict(given.classifier.layers[0].state_dict())
    training = loop.Training(given, recipe, None)
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
    training = loop.Training(given, recipe, None)
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
    training = loop.Training(given, Recipe(balance="sampling", epochs=8, batch_size=25), None)
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
    training = loop.Training(given, recipe, None)
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

    def make(feed: type[tiny.Rows], folder: Path) -> loop.Training:
        given = tiny.task([0, 0, 0, 1] * 4, dropout=0.2, batch_stats=True)
        given = replace(given, feed=feed(given.feed.inputs))  # type: ignore[attr-defined]
        training = loop.Training(given, recipe, Checkpoints(folder, "digest"))
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


def finish(training: loop.Training, stop: Stop) -> None:
    while not training.is_over:
        training.train_epoch(stop)
        training.end_epoch()


def every_tensor(training: loop.Training) -> dict[str, Tensor]:
    """Return all that changes: weights, their average, the optimiser's statistics."""
    tensors = {f"model.{n}": t for n, t in training.model.state_dict().items()}
    if training.ema is not None:
        tensors |= {f"ema.{n}": t for n, t in training.ema.state_dict().items()}
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
