"""Several processes that train one model together, as ``torchrun`` starts them.

Each computes its share of every batch; gradients and the statistics of BatchNorm are those of the
whole batch, so the result is that of one process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

_TIMEOUT = timedelta(minutes=10)


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the other processes where there are some; yield this one's number and how many."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    try:
        yield dist.get_rank(), count
    finally:
        dist.destroy_process_group()


def add_up(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its sum over all processes."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))


def share_statistics(module: nn.Module) -> None:
    """Let BatchNorm layers normalise by the whole batch; names of tensors stay as they are."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, _BatchNorm):
            module.set_submodule(path, _SharedBatchNorm(layer))


class _SharedBatchNorm(nn.Module):
    """A BatchNorm layer over the batches of all processes; torch's own runs on GPUs only."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight: Tensor | None = layer.weight
        self.bias: Tensor = layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._eps, self._momentum = layer.eps, layer.momentum
        # timm's layers also activate.
        self._after = [m for m in (getattr(layer, "drop", None), getattr(layer, "act", None)) if m]
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        running: tuple[Tensor, Tensor] = (self.running_mean, self.running_var)  # type: ignore[assignment]
        if self.training:
            x = self._normalised(x, *running)
        else:
            x = functional.batch_norm(x, *running, self.weight, self.bias, eps=self._eps)
        for module in self._after:
            x = module(x)
        return x

    def _normalised(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        over = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        count = add_up(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = _sum(x.sum(over)) / count
        centred = x - mean.view(shape)
        var = _sum((centred**2).sum(over)) / count
        with torch.no_grad():
            running_mean.lerp_(mean, self._momentum)
            running_var.lerp_(var * count / (count - 1), self._momentum)
            tracked: Tensor = self.num_batches_tracked  # type: ignore[assignment]
            tracked.add_(1)
        scale = torch.rsqrt(var + self._eps)
        if self.weight is None:
            return centred * scale.view(shape)
        return centred * (scale * self.weight).view(shape) + self.bias.view(shape)


class _Sum(torch.autograd.Function):
    """The sum over all processes; what it changes in all of them flows back to each."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return add_up(values.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return add_up(gradient.clone())


def _sum(values: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(values)
    return summed
