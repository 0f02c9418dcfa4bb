"""Fine-tuning, step by step, in plain torch.

What is drawn depends on the seed, the epoch and the step alone, so that a training that was stopped
goes on as if it had not been.
"""

import copy
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import isnan
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlpipe.errors import Interrupted, TrainingError
from tlpipe.features import augment
from tlpipe.learning import processes
from tlpipe.learning.batches import Feed, batches, mixed, soft
from tlpipe.learning.checkpoint import Checkpoint, Checkpoints
from tlpipe.learning.classifier import Classifier
from tlpipe.learning.dataset import Examples, Numbers
from tlpipe.learning.recipe import Recipe
from tlpipe.learning.schedule import Rates, open_stages, progress_factor
from tlpipe.progress import Meter, meter
from tlpipe.seeds import generator

_log = logging.getLogger(__name__)
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where; ``rank`` of ``processes``."""

    classifier: Classifier
    feed: Feed
    train: Examples
    validation: Examples
    classes: int
    rates: Rates
    device: torch.device
    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Epoch:
    """The state after an epoch, 0 before the first; losses in nats, the others in [0, 1]."""

    epoch: int
    train_loss: float
    loss: float
    accuracy: float
    balanced_accuracy: float
    macro_f1: float


@dataclass
class _State:
    """What changes while training goes on, beside weights and the optimiser."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    best: int = 0
    history: list[Epoch] = field(default_factory=list)


def fine_tune(
    task: Task,
    recipe: Recipe,
    checkpoints: Checkpoints | None,
    note: Callable[[list[Epoch]], None],
) -> list[Epoch]:
    """Train, and leave the classifier with the weights of the best epoch; return every epoch.

    ``checkpoints``: where to go on from, or None; ``note``: is given all epochs so far after each.

    Raises:
        Interrupted: somebody asked to stop; the next call goes on from there.
        TrainingError: a loss is not finite, or a checkpoint cannot be written.
    """
    with _stop_requests() as stop:
        training = Training(task, recipe, checkpoints)
        training.begin()
        while not training.is_over:
            training.train_epoch(stop)
            training.end_epoch()
            if task.rank == 0:
                note(training.state.history)
        return training.finish()


def best_of(epochs: Sequence[Epoch], recipe: Recipe) -> Epoch:
    """Return the best by the metric; of equal ones the one of least loss."""

    def badness(epoch: Epoch) -> tuple[float, float]:
        return 0.0 if recipe.metric == "loss" else -float(getattr(epoch, recipe.metric)), epoch.loss

    return min(epochs, key=badness)


class Training:
    """One training: weights, their average, the best so far, and the optimiser."""

    def __init__(self, task: Task, recipe: Recipe, checkpoints: Checkpoints | None) -> None:
        self.task, self.recipe, self.checkpoints = task, recipe, checkpoints
        self.state = _State()
        self.model = task.classifier
        self.average = copy.deepcopy(task.classifier) if recipe.average else None
        self.best: dict[str, Tensor] = {}
        self.optimiser = make_optimiser(self.model, task.rates, recipe, task.device)
        counts = np.bincount(task.train.labels, minlength=task.classes)
        rare = len(task.train) / (task.classes * np.maximum(counts, 1))  # 1 where all are equal
        by_loss, by_sampling = recipe.balance == "loss", recipe.balance == "sampling"
        self.class_weights = (
            torch.tensor(rare, dtype=torch.float32, device=task.device) if by_loss else None
        )
        chances = rare[task.train.labels]
        self.chances = chances / chances.sum() if by_sampling else None

    @property
    def judged(self) -> Classifier:
        """The weights that are measured and kept."""
        return self.average or self.model

    @property
    def is_over(self) -> bool:
        """Whether every epoch is done, or nothing has become better for too long."""
        state, patience = self.state, self.recipe.patience
        tired = patience is not None and state.epoch - state.best >= patience
        return state.epoch >= self.recipe.epochs or tired

    def begin(self) -> None:
        """Take up the newest checkpoint, or measure where training starts from."""
        checkpoint = self.checkpoints.newest() if self.checkpoints else None
        if checkpoint is not None:
            self._take_up(checkpoint)
            place = f"epoch {self.state.epoch + 1}, step {self.state.step + 1}"
            _log.info("going on from a checkpoint at %s", place)
            return
        self._note(train_loss=float("nan"))

    def train_epoch(self, stop: "Stop") -> None:
        """Take every step of the current epoch that is still to be taken."""
        task, recipe, state = self.task, self.recipe, self.state
        stages = len(self.model.stages)
        opened = open_stages(state.epoch, stages, recipe.unfreeze_epochs)
        self.model.open_last(opened)
        order = batches(
            task.train,
            size=recipe.batch_size(len(task.train)),
            seed=recipe.seed,
            epoch=state.epoch,
            weights=self.chances,
        )
        steps, saved = len(order), time.monotonic()
        title = f"epoch {state.epoch + 1} of {recipe.epochs}"
        with meter(title, total=len(task.train), done=state.images) as shown:
            for step in range(state.step, steps):
                done, whole = state.epoch * steps + step, recipe.epochs * steps
                self.set_rates(progress_factor(done, whole, recipe.warmup))
                loss = self.take_step(order[step], step)
                state.loss_sum += loss * len(order[step])
                state.images += len(order[step])
                state.step = step + 1
                self._show(shown, len(order[step]))
                # Processes that are asked one after the other stop behind the same step.
                if float(processes.add_up(torch.tensor(float(stop.requested)))):
                    self._save()
                    raise Interrupted(
                        f"stopped in epoch {state.epoch + 1} of {recipe.epochs} after step "
                        f"{state.step} of {steps}; everything is kept. Run 'dvc repro' to go on."
                    )
                if time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                    self._save()
                    saved = time.monotonic()

    def set_rates(self, factor: float) -> None:
        """Let every part learn at this share of its largest rate."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * factor

    def end_epoch(self) -> None:
        """Measure, keep the best, save."""
        state = self.state
        train_loss = state.loss_sum / state.images
        state.epoch, state.step, state.loss_sum, state.images = state.epoch + 1, 0, 0.0, 0
        self._note(train_loss)
        self._save()

    def finish(self) -> list[Epoch]:
        """Leave the best weights in the classifier."""
        self.model.load_state_dict(self.best)
        return self.state.history

    def take_step(self, places: Numbers, step: int) -> float:
        """Take one step on this process's share of a batch; return the loss of the whole."""
        task, recipe, epoch = self.task, self.recipe, self.state.epoch
        random = generator(recipe.seed, f"step {epoch} {step}")
        torch.manual_seed(int(random.integers(2**62)))
        chances = random.random((len(places), augment.CHANCES))
        own = np.array_split(np.arange(len(places)), task.processes)[task.rank]
        mine = places[own]
        inputs = task.feed.varied(task.train.rows[mine], chances[own])
        labels = torch.from_numpy(task.train.labels[mine]).to(task.device)
        inputs, targets = mixed(
            recipe.mix, inputs, soft(labels, task.classes), recipe.mix_alpha, random
        )
        with autocast(task.device):
            logits = self.model(inputs)
        loss = functional.cross_entropy(
            logits.float(),
            targets,
            weight=self.class_weights,
            label_smoothing=recipe.label_smoothing,
            reduction="sum",
        ) / len(places)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        total = float(processes.add_up(loss.detach()))
        if not np.isfinite(total):
            raise TrainingError(
                f"the loss is {total} in epoch {epoch + 1}, step {step + 1}; expected a number. "
                f"Nothing was written. Lower train.stage_rate and train.head_rate, now "
                f"{task.rates.stages:g} and {task.rates.head:g}, or look at the images."
            )
        if task.processes > 1:
            processes.add_up_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimiser.step()
        if self.average is not None:
            _move_average(self.average, self.model, recipe.average)
        return total

    def _note(self, train_loss: float) -> None:
        state = self.state
        found = evaluate(self.task, self.judged, self.task.validation)
        now = Epoch(state.epoch, train_loss, **asdict(found))
        state.history.append(now)
        if best_of(state.history, self.recipe) is now:
            state.best = state.epoch
            self.best = {n: t.detach().clone() for n, t in self.judged.state_dict().items()}
        _log.info(
            "epoch %s of %s: train loss %.4f, validation loss %.4f, accuracy %.4f%s",
            *(now.epoch, self.recipe.epochs, now.train_loss, now.loss, now.accuracy),
            " <- best" if state.best == state.epoch else "",
        )

    def _show(self, shown: Meter, images: int) -> None:
        state = self.state
        last = state.history[-1]
        shown.advance(
            images,
            f"loss {state.loss_sum / state.images:.3f}, last validation {last.loss:.3f}, "
            f"accuracy {last.accuracy:.3f}",
        )

    def _save(self) -> None:
        if self.task.rank or self.checkpoints is None:
            return
        state = asdict(self.state)
        # JSON has no NaN, and before the first epoch there is no loss.
        for epoch in state["history"]:
            epoch["train_loss"] = None if isnan(epoch["train_loss"]) else epoch["train_loss"]
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        for number, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{n}": t for n, t in values.items()}
        self.checkpoints.save(Checkpoint(state, tensors))

    def _take_up(self, checkpoint: Checkpoint) -> None:
        notes = dict(checkpoint.notes)
        notes["history"] = [
            Epoch(
                **epoch | {"train_loss": float("nan") if (v := epoch["train_loss"]) is None else v}
            )
            for epoch in notes["history"]
        ]
        self.state = _State(**notes)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.best = {n: t.to(self.task.device) for n, t in parts["best"].items()}
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.get("optimiser", {}).items():
            number, _, what = name.partition(".")
            state.setdefault(int(number), {})[what] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Measured:
    """Of one split: the mean loss in nats, and metrics in [0, 1]."""

    loss: float
    accuracy: float
    balanced_accuracy: float
    macro_f1: float


def evaluate(task: Task, model: Classifier, examples: Examples) -> Measured:
    """Measure a classifier on images as they are; every process computes its share."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    confusion = torch.zeros(task.classes, task.classes, dtype=torch.float64)
    size = 64 if task.device.type == "cuda" else 16
    own = np.array_split(np.arange(len(examples)), task.processes)[task.rank]
    with torch.inference_mode(), autocast(task.device):
        for start in range(0, len(own), size):
            places = own[start : start + size]
            labels = torch.from_numpy(examples.labels[places])
            logits = model(task.feed.plain(examples.rows[places])).float().cpu()
            loss += functional.cross_entropy(logits, labels, reduction="sum").double()
            pairs = labels * task.classes + logits.argmax(1)
            confusion += torch.bincount(pairs, minlength=task.classes**2).view_as(confusion)
    processes.add_up(loss)
    processes.add_up(confusion)
    return measured(float(loss), confusion.numpy())


def measured(loss_sum: float, confusion: npt.NDArray[np.float64]) -> Measured:
    """Return the metrics of a confusion matrix (true, predicted); empty classes do not count."""
    count, hits = confusion.sum(), confusion.diagonal()
    true, answered = confusion.sum(1), confusion.sum(0)
    present = true > 0
    f1 = 2 * hits[present] / (true + answered)[present]
    return Measured(
        loss=float(loss_sum / count),
        accuracy=float(hits.sum() / count),
        balanced_accuracy=float((hits[present] / true[present]).mean()),
        macro_f1=float(f1.mean()),
    )


def make_optimiser(
    model: Classifier, rates: Rates, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    """Return an optimiser with a group for each depth, once with and once without weight decay."""
    groups: list[dict[str, Any]] = []
    for depth, parameters in model.parameters_by_depth():
        rate = rates.head if depth == 0 else rates.stages * rates.decay ** (depth - 1)
        for decays in (True, False):
            chosen = [p for p in parameters if (p.dim() > 1) == decays]
            if chosen:
                decay = recipe.weight_decay if decays else 0.0
                groups.append({"params": chosen, "rate": rate, "weight_decay": decay})
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=_MOMENTUM, fused=device.type != "mps")
    return torch.optim.AdamW(groups, lr=1.0, fused=device.type != "mps")


def autocast(device: torch.device) -> torch.autocast:
    """Return the context to compute in: half precision with eight bits of exponent on CUDA."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model; what counts is copied."""
    ours, theirs = average.state_dict(), model.state_dict()
    with torch.no_grad():
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name], 1 - decay)
            else:
                tensor.copy_(theirs[name])


@contextmanager
def explained(recipe: Recipe) -> Iterator[None]:
    """Turn what torch says where memory is short into a refusal."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())[:160]
        if isinstance(error, RuntimeError) and not re.search(
            "out of memory|can't allocate|enough memory", line
        ):
            raise
        raise TrainingError(
            f"there is not enough memory to train ({line}); what was done is kept. Lower "
            f"train.batch, now {recipe.batch_size(10**9)}, or freeze more in embed.freeze."
        ) from None


class Stop:
    """Whether somebody asked to stop."""

    requested = False


@contextmanager
def _stop_requests() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one ends at once."""
    stop = Stop()

    def request(number: int, _: object) -> None:
        stop.requested = True
        _log.info("stopping after this step")
        signal.signal(number, before[number])

    before: Mapping[int, Any] = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
