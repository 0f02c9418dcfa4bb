"""Sums and copies over the processes that train together; nothing is done where there is one.

Each process computes its share of every batch; gradients and the statistics of BatchNorm are those
of the whole batch. Order, augmentation, learning rates and the mixing share are the same for any
number of processes, so what one process learns is what several learn, up to rounding, with two
exceptions: images are mixed with others of the same share, and dropout and stochastic depth draw
other masks. What all start from (weights, the kind of BatchNorm, a checkpoint) is the first
process's.

torch's ``DistributedDataParallel`` averages over processes, where shares of a batch differ by an
image, and has to be built anew whenever gradual unfreezing opens a stage: it leaves out what had no
gradient when it was built. Summing the gradients takes eight lines.

Which device a process has, and how they find one another, is ``tuning``'s: ``export`` uses the
classifier, whose BatchNorm layers sum over processes, and must not depend on a device.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Value = TypeVar("_Value")


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast(value: _Value) -> _Value:
    """Return the value of the first process in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process; both may lie in memory as they like."""
    if not dist.is_initialized():
        return
    for tensor in tensors:
        dense = tensor.detach().contiguous()
        dist.broadcast(dense, src=0)
        tensor.detach().copy_(dense)


def all_reduce_gradients(module: nn.Module) -> None:
    """Replace every gradient by its sum over all processes."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, total in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(total.view_as(gradient))


class _Sum(torch.autograd.Function):
    """The sum over all processes; what it changes in all of them flows back to each."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return all_reduce(values.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone())


def all_reduce_with_gradient(values: Tensor) -> Tensor:
    """Return the sum over all processes, through which gradients flow."""
    result: Tensor = _Sum.apply(values)
    return result
