"""Where torch computes: on a GPU where there is one, on the CPU elsewhere."""

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Compiling takes a minute or two of a training.
_STEPS_WORTH_COMPILING = 2000


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


def pays_to_compile(device: "torch.device", steps: int) -> bool:
    """Return whether so many steps are faster with a compiled network: not on CPUs.

    Compiling needs Triton and a C compiler.
    """
    can = importlib.util.find_spec("triton") is not None and shutil.which("cc") is not None
    return device.type == "cuda" and steps >= _STEPS_WORTH_COMPILING and can
