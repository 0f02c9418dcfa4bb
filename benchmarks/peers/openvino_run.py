"""OpenVINO on the CPU: ``openvino_run.py MODEL IMAGES THREADS ANSWERS``.

MODEL is an ONNX file of one input with a free first axis. It is compiled for each batch size, which
suits OpenVINO better than a free one; everything else is left to its defaults.
"""

import sys
from functools import cache
from pathlib import Path

import openvino
from answering import BATCH, Images, Logits, answer

model, images, threads, answers = sys.argv[1:]
core = openvino.Core()
hints = {"INFERENCE_NUM_THREADS": int(threads), "PERFORMANCE_HINT": "LATENCY"}


@cache
def compiled(size: int) -> openvino.CompiledModel:
    """Return the model for so many images."""
    graph = core.read_model(model)
    _, *image = graph.input().get_partial_shape()
    graph.reshape(openvino.PartialShape([size, *image]))
    return core.compile_model(graph, "CPU", hints)


@cache
def request(size: int) -> openvino.InferRequest:
    """Return what is asked for answers for so many images."""
    return compiled(size).create_infer_request()


def infer(batch: Images) -> Logits:
    """Return the logits (B, C)."""
    found = request(len(batch)).infer(batch, share_inputs=True)
    return found["logits"]


precision = compiled(BATCH).get_property("INFERENCE_PRECISION_HINT").to_string()
version = openvino.__version__.split("-")[0]
name = f"OpenVINO {version}, what is not int8 in {precision}"
answer(name, infer, Path(images), Path(answers))
