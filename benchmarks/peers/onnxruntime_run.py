"""ONNX Runtime as tlpipe opens it: ``onnxruntime_run.py MODEL IMAGES THREADS ANSWERS``."""

import sys
from pathlib import Path

import onnxruntime
from answering import Images, Logits, answer

from tlpipe.bundle import IMAGES, LOGITS, PROBABILITIES
from tlpipe.runtime import open_session

model, images, threads, answers = sys.argv[1:]
session = open_session(Path(model), threads=int(threads))


def infer(batch: Images) -> Logits:
    """Return the logits (B, C)."""
    logits, _ = session.run([LOGITS, PROBABILITIES], {IMAGES: batch})
    return logits


name = f"ONNX Runtime {onnxruntime.__version__}, {session.get_providers()[0]}"
answer(name, infer, Path(images), Path(answers))
