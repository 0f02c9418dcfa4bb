"""Self-supervised training of a whole backbone: two views of an image are to have like features.

SimCLR: one loss and no second network, so it fits one machine. lightly (MIT, well kept) has that
loss, too, and needs PyTorch Lightning and Hydra: a second trainer, for a loss of seven lines. What
is drawn depends on the seed, the epoch and the step alone, as in ``trainer``.

Source: Chen et al. (2020), A simple framework for contrastive learning of visual representations,
ICML, with the temperature of its appendix B.9 for small images and batches, and AdamW.
"""

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlpipe.backbones import augment
from tlpipe.backbones.augment import Augmentation
from tlpipe.errors import Interrupted, TrainingError
from tlpipe.progress import meter
from tlpipe.runtime import generator
from tlpipe.training.batches import Photos, batches
from tlpipe.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    Stop,
    out_of_memory_explained,
    stop_requests,
)
from tlpipe.training.model import Examples
from tlpipe.training.recipe import lr_factor
from tlpipe.training.trainer import autocast, restore_optimiser

_log = logging.getLogger(__name__)
_SAVE_S = 300.0
_MAX_GRAD_NORM = 1.0
_WIDTHS = (256, 128)  # of the projection head, which is thrown away


@dataclass(frozen=True)
class Recipe:
    """How a backbone is pretrained.

    Attributes:
        epochs: how often each image is seen, in two views.
        batch_size: images a step, at least 2: each is told from the others of its batch.
        lr: the peak of AdamW's, after a rise over the share ``warmup`` of all steps.
        augmentation: how views of one image vary.
        temperature: what similarities are divided by.
    """

    epochs: int
    batch_size: int
    lr: float
    augmentation: Augmentation
    weight_decay: float = 1e-4
    warmup: float = 0.05
    temperature: float = 0.5
    seed: int = 0

    def content(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self) | {"loss": "NT-Xent", "augmentation": self.augmentation.model_dump()}


@dataclass
class State:
    """How far a training is: the next ``step``, the sums over the current epoch, epochs before.

    ``losses`` in nats, ``spreads`` as ``spread`` gives them: the means of each epoch.
    """

    step: int = 0
    loss_sum: float = 0.0
    spread_sum: float = 0.0
    losses: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the mean loss in nats: each view is to find its partner among all other views.

    ``first``, ``second``: (B, D), projections of two views of the same images, B at least 2.

    Source: Chen et al. (2020), equation 1 (NT-Xent).
    """
    views = functional.normalize(torch.cat([first, second]), dim=1)
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    similarities = (views @ views.T / temperature).masked_fill(itself, -torch.inf)
    partners = torch.arange(len(views), device=views.device).roll(len(first))
    return functional.cross_entropy(similarities, partners)


def spread(projections: Tensor) -> Tensor:
    """Return how far projections (N, D) lie apart: 0 where all are one, 1 all over the sphere.

    Source: Chen and He (2021), Exploring simple siamese representation learning, CVPR, section 4.1:
    the deviation of a coordinate on the unit sphere, here times the root of D.
    """
    coordinates = functional.normalize(projections, dim=1)
    deviation = coordinates.std(dim=0, correction=0).mean()
    found: Tensor = deviation * projections.shape[1] ** 0.5
    return found


class Training:
    """The network with its projection head, the optimiser, and how far they are."""

    def __init__(
        self,
        network: nn.Module,
        feed: Photos,
        rows: npt.NDArray[np.int64],
        recipe: Recipe,
        device: torch.device,
        checkpoints: Checkpoints,
    ) -> None:
        """Take a network, which gives (B, D) and lies on the device, and images by their rows."""
        self.feed, self.recipe, self.device = feed, recipe, device
        self.checkpoints, self.state = checkpoints, State()
        self.images = Examples(rows, np.zeros_like(rows))
        self.steps = len(self._order())  # of an epoch
        with torch.inference_mode():
            width = network.eval()(feed.plain(rows[:1])).shape[1]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(recipe.seed)
            head = nn.Sequential(
                nn.Linear(width, _WIDTHS[0]), nn.ReLU(), nn.Linear(_WIDTHS[0], _WIDTHS[1])
            )
        self.model = nn.ModuleDict({"network": network, "head": head.to(device)})
        self.model.to(memory_format=torch.channels_last)
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(
            groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=device.type != "mps"
        )

    def run(self) -> State:
        """Take every step that is still to be taken; leave the network trained.

        Raises:
            Interrupted: somebody asked to stop; the next one resumes from there.
            TrainingError: a loss is not finite, memory is short, or a checkpoint cannot be written.
        """
        smaller = f"Lower --batch-size, now {self.recipe.batch_size}, or take a smaller network."
        with stop_requests() as stop, out_of_memory_explained(smaller):
            self._run(stop)
        return self.state

    def _run(self, stop: Stop) -> None:
        if (checkpoint := self.checkpoints.newest()) is not None:
            self._restore(checkpoint)
            _log.info("resumed from the checkpoint at %s", self._place())
        state, recipe = self.state, self.recipe
        first, last = state.step, recipe.epochs * self.steps
        saved, order = time.monotonic(), self._order(first // self.steps)
        total, done = recipe.epochs * len(self.images), first * len(self.images) // self.steps
        with meter("images, in two views", total=total, done=done) as shown:
            for step in range(first, last):
                epoch, number = divmod(step, self.steps)
                if number == 0:
                    order = self._order(epoch)
                self._take_step(order[number])
                state.step = step + 1
                if number + 1 == self.steps:
                    self._end_epoch()
                shown.advance(len(order[number]), f"epoch {epoch + 1} of {recipe.epochs}")
                is_stopped = stop.requested and state.step < last
                if is_stopped or time.monotonic() - saved > _SAVE_S:
                    self._save()
                    saved = time.monotonic()
                if is_stopped:
                    raise Interrupted(
                        f"stopped before {self._place()}; everything is kept. Run the same command "
                        f"to resume."
                    )
        self._save()  # what follows may fail, too

    def _place(self) -> str:
        epoch, number = divmod(self.state.step, self.steps)
        return f"epoch {epoch + 1} of {self.recipe.epochs}, step {number + 1} of {self.steps}"

    def _order(self, epoch: int = 0) -> list[npt.NDArray[np.int64]]:
        """Return the places of the images of each step of an epoch.

        One image alone has none to be told from: it goes with the batch before.
        """
        seed, size = self.recipe.seed, self.recipe.batch_size
        found = batches(self.images, size=size, seed=seed, epoch=epoch, weights=None)
        if len(found) > 1 and len(found[-1]) < 2:
            found[-2:] = [np.concatenate(found[-2:])]
        return found

    def _take_step(self, places: npt.NDArray[np.int64]) -> None:
        recipe, state = self.recipe, self.state
        random = generator(recipe.seed, f"views {state.step}")
        # Dropout and stochastic depth draw, too.
        torch.manual_seed(int(random.integers(2**62)))
        rows = np.tile(self.images.rows[places], 2)
        views = self.feed.augmented(rows, random.random((len(rows), augment.UNIFORMS)))
        factor = lr_factor(state.step, recipe.epochs * self.steps, recipe.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.lr * factor
        self.model.train()
        with autocast(self.device):
            projections = self.model["head"](self.model["network"](views))
        projections = projections.float()
        first, second = projections.chunk(2)
        loss = nt_xent(first, second, recipe.temperature)
        self.optimiser.zero_grad()
        loss.backward()
        if not np.isfinite(found := float(loss.detach())):
            raise TrainingError(
                f"the loss is {found} at {self._place()}; expected a number. Nothing was written. "
                f"Look at the images, or begin from other weights."
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
        self.optimiser.step()
        share = len(places) / len(self.images)
        state.loss_sum += share * found
        state.spread_sum += share * float(spread(projections.detach()))

    def _end_epoch(self) -> None:
        state = self.state
        state.losses.append(state.loss_sum)
        state.spreads.append(state.spread_sum)
        state.loss_sum = state.spread_sum = 0.0
        _log.info(
            "epoch %s of %s: loss %.4f, spread %.3f",
            *(len(state.losses), self.recipe.epochs, state.losses[-1], state.spreads[-1]),
        )

    def _save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": value for name, value in values.items()}
        self.checkpoints.save(Checkpoint(asdict(self.state), tensors))

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state = State(**checkpoint.state)
        model: dict[str, Tensor] = {}
        optimiser: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            if part == "model":
                model[rest] = tensor
            else:
                number, _, what = rest.partition(".")
                optimiser.setdefault(int(number), {})[what] = tensor
        self.model.load_state_dict(model)
        restore_optimiser(self.optimiser, optimiser)
