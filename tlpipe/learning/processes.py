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

_TIMEOUT = timedelta(minutes=10)


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the other processes where there are some; yield this one's number and how many."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield dist.get_rank(), count
    finally:
        dist.destroy_process_group()


def add_up(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def add_up_gradients(module: nn.Module) -> None:
    """Replace every gradient by its sum over all processes."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))


class _Sum(torch.autograd.Function):
    """The sum over all processes; what it changes in all of them flows back to each."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return add_up(values.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return add_up(gradient.clone())


def summed(values: Tensor) -> Tensor:
    """Return the sum over all processes, through which gradients flow."""
    result: Tensor = _Sum.apply(values)
    return result
