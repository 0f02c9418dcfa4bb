"""Data-parallel training in several processes, as ``torchrun`` starts them.

Each computes its share of every batch; gradients and the statistics of BatchNorm are those of the
whole batch. Order, augmentation, learning rates and the mixing share are the same for any number of
processes, so what one process learns is what several learn, up to rounding, with two exceptions:
images are mixed with others of the same share, and dropout and stochastic depth draw other masks.
What all start from (weights, the kind of BatchNorm, a checkpoint) is the first process's.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The others wait while the first one solves the head. torchrun ends all where one has died.
_TIMEOUT = timedelta(hours=2)
_Value = TypeVar("_Value")


def local_rank() -> int:
    """Return this process's number among those on this machine; torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the process group, if there is one; yield this process's rank and the world size."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield dist.get_rank(), count
    finally:
        dist.destroy_process_group()


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
