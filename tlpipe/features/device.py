"""Where torch computes: on a GPU where there is one, on the CPU elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_cuda() -> bool:
    """Return whether torch can use an NVIDIA GPU; it is imported only where one may be."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return False
    import torch

    return torch.cuda.is_available()


def training_device(rank: int) -> "torch.device":
    """Return the device of one of the processes on this machine."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
