"""Where torch computes: on a GPU where there is one, on the CPU elsewhere."""

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
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
