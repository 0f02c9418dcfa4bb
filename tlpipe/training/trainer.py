"""Fine-tuning, step by step, in plain torch: the task, the optimiser, the loop over epochs.

What is drawn depends on the seed, the epoch and the step alone, so that a training that was stopped
resumes as if it had not been.
"""

import importlib.util
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from tlpipe.backbones import augment
from tlpipe.errors import Interrupted, TrainingError
from tlpipe.progress import Meter, meter
from tlpipe.runtime import generator
from tlpipe.training import distributed
from tlpipe.training.batches import Feed, batches, mixed, soft
from tlpipe.training.checkpoint import Checkpoint, Checkpoints, Stop, stop_requests
from tlpipe.training.classifier import Classifier, ReplacedNorm
from tlpipe.training.model import Examples, Measured, Step
from tlpipe.training.recipe import (
    LearningRates,
    Recipe,
    class_weights,
    lr_factor,
    open_stages,
    opening_epoch,
)

if TYPE_CHECKING:
    from timm.utils.model_ema import ModelEmaV3

# Compiling takes a minute or two of a training.
_STEPS_WORTH_COMPILING = 2000


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where; ``rank`` of ``world_size`` processes."""

    classifier: Classifier
    feed: Feed
    train: Examples
    validation: Examples
    classes: int
    device: torch.device
    rank: int = 0
    world_size: int = 1


def evaluate(task: Task, model: Classifier, examples: Examples) -> Measured:
    """Measure a classifier on images as they are; every process computes its share."""
    loss = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(3, task.classes, dtype=torch.float64)
    own = np.array_split(np.arange(len(examples)), task.world_size)[task.rank]
    done = 0
    for logits in predict(task, model, examples.rows[own]):
        labels = torch.from_numpy(examples.labels[own[done : done + len(logits)]])
        done += len(logits)
        loss += functional.cross_entropy(logits, labels, reduction="sum").double()
        answered = logits.argmax(1)
        of_class = (labels[labels == answered], labels, answered)
        counts += torch.stack([torch.bincount(of, minlength=task.classes) for of in of_class])
    distributed.all_reduce(loss)
    distributed.all_reduce(counts)
    return measured(float(loss), counts.numpy())


def predict(task: Task, model: Classifier, rows: npt.NDArray[np.int64]) -> Iterator[Tensor]:
    """Yield logits (n, C) of images as they are, on the CPU, float32 or wider, batch by batch."""
    model.eval()
    size = 64 if task.device.type == "cuda" else 16
    for start in range(0, len(rows), size):
        with torch.inference_mode(), autocast(task.device):
            logits = model(task.feed.plain(rows[start : start + size])).cpu()
        yield logits.to(torch.promote_types(logits.dtype, torch.float32))


def measured(loss_sum: float, counts: npt.NDArray[np.float64]) -> Measured:
    """Return the metrics; classes without images do not count.

    ``counts``: (3, C), of each class the right answers, the images, and the answers that name it.
    """
    hits, true, answered = counts
    count, present = true.sum(), true > 0
    f1 = 2 * hits[present] / (true + answered)[present]
    return Measured(
        loss=float(loss_sum / count),
        accuracy=float(hits.sum() / count),
        balanced_accuracy=float((hits[present] / true[present]).mean()),
        macro_f1=float(f1.mean()),
    )


def autocast(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast on CUDA, and a context without effect elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


_MOMENTUM = 0.9


def make_optimiser(
    model: Classifier, learning_rates: LearningRates, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    """Return an optimiser with a group for each depth, once with and once without weight decay.

    Beside what torch knows, a group has ``depth`` (0 the head, 1 the last stage ...) and
    ``peak_lr``.
    """
    groups: list[dict[str, Any]] = []
    for depth, part in model.parts_by_depth():
        peak_lr = learning_rates.head
        if depth > 0:
            peak_lr = learning_rates.backbone * learning_rates.layer_decay ** (depth - 1)
        spared: frozenset[str] = getattr(part, "no_weight_decay", frozenset())
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in part.named_parameters():
            is_weight = parameter.dim() > 1 and not name.endswith(".bias")
            split[is_weight and name not in spared].append(parameter)
        for decays, chosen in split.items():
            if chosen:
                decay = recipe.weight_decay if decays else 0.0
                group = {
                    "params": chosen,
                    "peak_lr": peak_lr,
                    "depth": depth,
                    "weight_decay": decay,
                }
                groups.append(group)
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=_MOMENTUM, fused=device.type != "mps")
    return torch.optim.AdamW(groups, lr=1.0, fused=device.type != "mps")


def pays_to_compile(device: torch.device, steps: int) -> bool:
    """Return whether so many steps are faster with a compiled network: not on CPUs.

    Compiling needs Triton and a C compiler; a warning says what is missing where it would pay.
    """
    if device.type != "cuda" or steps < _STEPS_WORTH_COMPILING:
        return False
    missing = missing_to_compile()
    if missing:
        _log.warning("%s not found: training %s steps without torch.compile", missing, steps)
    return not missing


def missing_to_compile() -> str:
    """Return what torch.compile lacks on this machine, or nothing."""
    lacks = {
        "Triton": importlib.util.find_spec("triton") is None,
        "a C compiler (cc)": shutil.which("cc") is None,
    }
    return " and ".join(name for name, is_missing in lacks.items() if is_missing)


def is_token_normalised(network: nn.Module) -> bool:
    """Return whether LayerNorm and its like, over one token or pixel, outweigh BatchNorm.

    GroupNorm counts as BatchNorm, since it too normalises over an image's places; with a single
    group it is the LayerNorm of MetaFormers. Where no layer normalises, linear layers speak for
    tokens (ResMLP) and convolutions for images (VGG, NFNet).
    """
    by_token = by_image = linear = convolutions = 0
    for module in network.modules():
        # A block such as Conv2dNormActivation is no layer, whatever its name says.
        named = type(module).__name__.lower() if not any(module.children()) else ""
        if isinstance(module, nn.GroupNorm):
            by_image += module.num_groups > 1
            by_token += module.num_groups == 1
        elif isinstance(module, (_BatchNorm, ReplacedNorm)) or "batchnorm" in named:
            by_image += 1
        elif isinstance(module, nn.LayerNorm) or "norm" in named:
            by_token += 1
        linear += isinstance(module, nn.Linear)
        convolutions += isinstance(module, nn.Conv2d)
    return by_token > by_image if by_token or by_image else linear > convolutions


def restore_optimiser(
    optimiser: torch.optim.Optimizer, state: dict[int, dict[str, torch.Tensor]]
) -> None:
    """Load the state of each parameter, by its number, in the memory layout of the parameter.

    ``load_state_dict`` keeps the layout of what it is given. The fused kernels walk a parameter and
    its statistics side by side in memory: of another layout, each weight would be moved by the
    statistics of another one.
    """
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimiser.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


_log = logging.getLogger(__name__)


@dataclass
class _State:
    """What changes while training goes on, beside weights and the optimiser."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    best: int = 0
    history: list[Step] = field(default_factory=list)


def fine_tune(
    task: Task,
    recipe: Recipe,
    checkpoints: Checkpoints | None,
    record: Callable[[list[Step]], None],
) -> list[Step]:
    """Train, and leave the classifier with the weights of the best epoch; return every epoch.

    ``checkpoints``: to resume from, or None; ``record``: is given all epochs so far after each.

    Raises:
        Interrupted: somebody asked to stop; the next call resumes from there.
        TrainingError: a loss is not finite, or a checkpoint cannot be written.
    """
    with stop_requests() as stop:
        training = Training(task, recipe, checkpoints)
        training.begin()
        while not training.is_over:
            training.train_epoch(stop)
            training.end_epoch()
            if task.rank == 0:
                record(training.state.history)
        return training.finish()


def best_of(epochs: Sequence[Step], recipe: Recipe) -> int:
    """Return the number of the best epoch by the metric; of equal ones the one of least loss."""
    metric = recipe.selection_metric

    def objective(epoch: int) -> tuple[float, float]:
        found = epochs[epoch].validation
        return 0.0 if metric == "loss" else -getattr(found, metric), found.loss

    return min(range(len(epochs)), key=objective)


def losses(
    logits: Tensor, targets: Tensor, class_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """Return the loss of each image (B,): its smoothed cross-entropy times the image's weight.

    ``logits``, ``targets``: (B, C), targets before smoothing, rows of mixed images shared out;
    ``class_weight``: (C,). The weight of an image is that of its classes, in the shares that it
    has of them. It must not be a weight of the columns, as in ``functional.cross_entropy``: with
    smoothed labels that would teach the rare class to every image, p_c ~ w_c * t_c.
    """
    each = functional.cross_entropy(
        logits, targets, label_smoothing=label_smoothing, reduction="none"
    )
    return each if class_weight is None else each * (targets @ class_weight)


class Training:
    """One training: weights, their EMA, the best so far, and the optimiser."""

    def __init__(self, task: Task, recipe: Recipe, checkpoints: Checkpoints | None) -> None:
        self.task, self.recipe, self.checkpoints = task, recipe, checkpoints
        self.state = _State()
        self.model = task.classifier
        self.steps = -(-len(task.train) // recipe.batch_size_for(len(task.train)))  # of an epoch
        compiles = pays_to_compile(task.device, recipe.epochs * self.steps)
        self.forward = torch.compile(self.model) if compiles else self.model
        self.ema: ModelEmaV3 | None = None
        if recipe.ema_decay:
            # Not above: who trains one of torchvision's networks without EMA needs no timm.
            from timm.utils import model_ema

            # The warm-up keeps a short training from being averaged with what it started from.
            self.ema = model_ema.ModelEmaV3(task.classifier, recipe.ema_decay, use_warmup=True)
        self.best: dict[str, Tensor] = {}
        self.learning_rates = recipe.learning_rates(
            is_token_normalised=is_token_normalised(self.model.stages)
        )
        self.optimiser = make_optimiser(self.model, self.learning_rates, recipe, task.device)
        rare = class_weights(task.train.labels, task.classes)
        self.class_weight: Tensor | None = None
        if recipe.balance == "loss":
            dtype = self.model.mean.dtype
            self.class_weight = torch.tensor(rare, dtype=dtype, device=task.device)
        self.sampling_probabilities: npt.NDArray[np.float64] | None = None
        if recipe.balance == "sampling":
            self.sampling_probabilities = rare[task.train.labels] / rare[task.train.labels].sum()

    @property
    def eval_model(self) -> Classifier:
        """The weights that are evaluated and kept: the EMA where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def is_over(self) -> bool:
        """True once all epochs are done or early stopping triggers."""
        state, patience = self.state, self.recipe.patience
        is_stopped_early = patience is not None and state.epoch - state.best >= patience
        return state.epoch >= self.recipe.epochs or is_stopped_early

    def begin(self) -> None:
        """Resume from the newest checkpoint, or evaluate the initial weights.

        Of several processes the first one decides; the others need no checkpoint on their disks.
        """
        is_first = self.task.rank == 0
        checkpoint = self.checkpoints.newest() if self.checkpoints and is_first else None
        if self.task.world_size > 1:
            checkpoint = _from_first(checkpoint)
            distributed.broadcast_tensors(self.model.state_dict().values())
            if self.ema is not None:
                self.ema.set(self.model)
        if checkpoint is not None:
            self._restore(checkpoint)
            place = f"epoch {self.state.epoch + 1}, step {self.state.step + 1}"
            _log.info("resumed from the checkpoint at %s", place)
            return
        self._record(train_loss=None)

    def train_epoch(self, stop: Stop) -> None:
        """Take every step of the current epoch that is still to be taken."""
        task, recipe, state = self.task, self.recipe, self.state
        stages = len(self.model.stages)
        opened = open_stages(state.epoch, stages, recipe.unfreeze_epochs)
        self.model.open_last(opened)
        order = batches(
            task.train,
            size=recipe.batch_size_for(len(task.train)),
            seed=recipe.seed,
            epoch=state.epoch,
            weights=self.sampling_probabilities,
        )
        steps, saved = len(order), time.monotonic()
        assert steps == self.steps
        title = f"epoch {state.epoch + 1} of {recipe.epochs}"
        with meter(title, total=len(task.train), done=state.images) as shown:
            for step in range(state.step, steps):
                self.schedule_learning_rates(state.epoch * steps + step)
                loss = self.take_step(order[step], step)
                state.loss_sum += loss * len(order[step])
                state.images += len(order[step])
                state.step = step + 1
                self._show(shown, len(order[step]))
                # Processes that are asked one after the other stop behind the same step.
                if float(distributed.all_reduce(torch.tensor(float(stop.requested)))):
                    self._save()
                    raise Interrupted(
                        f"stopped in epoch {state.epoch + 1} of {recipe.epochs} after step "
                        f"{state.step} of {steps}; everything is kept. Run 'tlpipe run' to resume."
                    )
                if time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                    self._save()
                    saved = time.monotonic()

    def set_learning_rates(self, factor: float) -> None:
        """Set every learning rate to this share of its peak."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def schedule_learning_rates(self, step: int) -> None:
        """Set the learning rates of a step, counted from 0 over all epochs."""
        recipe = self.recipe
        for group in self.optimiser.param_groups:
            opened = self.steps * opening_epoch(group["depth"], recipe.unfreeze_epochs)
            # What is closed has no gradient, and its learning rate no effect.
            factor = lr_factor(step, recipe.epochs * self.steps, recipe.warmup, min(opened, step))
            group["lr"] = group["peak_lr"] * factor

    def end_epoch(self) -> None:
        """Evaluate, keep the best weights, save a checkpoint."""
        state = self.state
        train_loss = state.loss_sum / state.images
        state.epoch, state.step, state.loss_sum, state.images = state.epoch + 1, 0, 0.0, 0
        self._record(train_loss)
        self._save()

    def finish(self) -> list[Step]:
        """Leave the best weights in the classifier."""
        self.model.load_state_dict(self.best)
        return self.state.history

    def take_step(self, places: npt.NDArray[np.int64], step: int) -> float:
        """Take one step on this process's share of a batch; return the loss of the whole.

        The loss is divided by the number of images, not by the sum of their weights: class weights
        are 1 on average over the training images, and a rare image counts the same in every batch.
        """
        task, recipe, epoch = self.task, self.recipe, self.state.epoch
        random = generator(recipe.seed, f"step {epoch} {step}")
        # Dropout and stochastic depth draw other masks in every process.
        torch.manual_seed(int(random.integers(2**62)) + task.rank)
        uniforms = random.random((len(places), augment.UNIFORMS))
        own = np.array_split(np.arange(len(places)), task.world_size)[task.rank]
        mine = places[own]
        inputs = task.feed.augmented(task.train.rows[mine], uniforms[own])
        labels = torch.from_numpy(task.train.labels[mine]).to(task.device)
        inputs, targets = mixed(
            recipe.mixup, inputs, soft(labels, task.classes), recipe.mixup_alpha, random
        )
        with autocast(task.device):
            logits = self.forward(inputs)
        logits = logits.to(self.model.mean.dtype)
        each = losses(logits, targets.to(logits.dtype), self.class_weight, recipe.label_smoothing)
        loss = each.sum() / len(places)
        self.optimiser.zero_grad()
        loss.backward()
        total = float(distributed.all_reduce(loss.detach()))
        if not np.isfinite(total):
            raise TrainingError(
                f"the loss is {total} in epoch {epoch + 1}, step {step + 1}; expected a number. No "
                f"model was written. Lower train.backbone_lr and train.head_lr, now "
                f"{self.learning_rates.backbone:g} and {self.learning_rates.head:g}, or look at "
                f"the images."
            )
        if task.world_size > 1:
            distributed.all_reduce_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update(self.model, step=epoch * self.steps + step + 1)
        return total

    def _record(self, train_loss: float | None) -> None:
        """Evaluate, add to the history, and keep the weights if they are the best so far."""
        state = self.state
        found = evaluate(self.task, self.eval_model, self.task.validation)
        metric = self.recipe.selection_metric
        state.history.append(Step(train_loss, found))
        if best_of(state.history, self.recipe) == state.epoch:
            state.best = state.epoch
            self.best = {n: t.detach().clone() for n, t in self.eval_model.state_dict().items()}
        _log.info(
            "epoch %s of %s: %svalidation loss %.4f, accuracy %.4f%s%s",
            *(state.epoch, self.recipe.epochs),
            "" if train_loss is None else f"train loss {train_loss:.4f}, ",
            *(found.loss, found.accuracy),
            "" if metric in ("loss", "accuracy") else f", {metric} {getattr(found, metric):.4f}",
            " <- best" if state.best == state.epoch else "",
        )

    def _show(self, shown: Meter, images: int) -> None:
        state = self.state
        last = state.history[-1].validation
        shown.advance(
            images,
            f"loss {state.loss_sum / state.images:.3f}, last validation {last.loss:.3f}, "
            f"accuracy {last.accuracy:.3f}",
        )

    def _save(self) -> None:
        if self.task.rank or self.checkpoints is None:
            return
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        if self.ema is not None:
            tensors |= {f"ema.{n}": t for n, t in self.ema.module.state_dict().items()}
        for number, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{n}": t for n, t in values.items()}
        self.checkpoints.save(Checkpoint(asdict(self.state), tensors))

    def _restore(self, checkpoint: Checkpoint) -> None:
        history = [
            Step(past["train_loss"], Measured(**past["validation"]))
            for past in checkpoint.state["history"]
        ]
        self.state = _State(**checkpoint.state | {"history": history})
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.best = {n: t.to(self.task.device) for n, t in parts["best"].items()}
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.get("optimiser", {}).items():
            number, _, what = name.partition(".")
            state.setdefault(int(number), {})[what] = tensor
        restore_optimiser(self.optimiser, state)


def _from_first(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return the first process's checkpoint in every process."""
    known = None
    if checkpoint is not None:
        shapes = {name: (t.shape, t.dtype) for name, t in checkpoint.tensors.items()}
        known = (checkpoint.state, shapes)
    known = distributed.broadcast(known)
    if known is None:
        return None
    state, shapes = known
    if checkpoint is None:
        tensors = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in shapes.items()}
        checkpoint = Checkpoint(state, tensors)
    distributed.broadcast_tensors(checkpoint.tensors.values())
    return checkpoint
