"""The graph in fewer bits, and whether that is good enough to ship: measured on validation images.

int8: a quarter of the size, and faster where the processor has VNNI; weights rounded per output
channel, activations by what they were on training images. fp16: for GPUs.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from tlpipe.data.images import Pixels
from tlpipe.onnx_export.bundle import IMAGES, LOGITS
from tlpipe.onnx_export.parity import Labels, Logits, Sample
from tlpipe.resampling import paired_difference
from tlpipe.runtime import open_session

# Eight bits are a quarter of thirty-two, and what stays exact adds a little.
MOST_BYTES = {"int8": 0.3, "fp16": 0.55}
_CONFIDENCE = 0.95
_BATCH = 8
_EXACT_SHARE = 0.0025
_RIDGE, _FLOOR = 1.0, 1e-3
# What computes, and what lies between: the way in (normalisation) and the way out stay exact.
_ROUNDED = (
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat"),
    *("Clip", "Relu", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean"),
)


@dataclass(frozen=True)
class Verdict:
    """``accuracy_change``: on validation, paired, with its interval; ``size``: share of fp32's.

    ``refused`` says why it does not ship, or is empty.
    """

    accuracy_change: dict[str, Any]
    size: float
    refused: str


def judge(
    name: str, exact: Logits, other: Logits, truth: Labels, *, size: float, loss: float
) -> Verdict:
    """Compare the answers of two graphs (N, C) for the same images.

    ``size``: share of the exact graph's bytes; ``loss``: of accuracy, the most.
    """
    right, kept = exact.argmax(1) == truth, other.argmax(1) == truth
    change = paired_difference(right, kept, [""] * len(truth), _CONFIDENCE)
    reasons = []
    if not np.isfinite(other).all():
        reasons.append("its logits are not finite")
    if change["value"] < -loss:
        reasons.append(
            f"its accuracy on {len(truth)} validation images differs by {change['value']:+.4f} "
            f"({change['low']:+.4f} to {change['high']:+.4f}), expected at least {-loss:+g}"
        )
    if size > MOST_BYTES[name]:
        reasons.append(f"its size is {size:.2f} of fp32's, expected at most {MOST_BYTES[name]:g}")
    return Verdict(change, size, "; ".join(reasons))


def to_int8(model: onnx.ModelProto, sample: Sample, threads: int) -> onnx.ModelProto:
    """Return the graph with 8-bit weights and activations, as QuantizeLinear and its opposite.

    ``sample``: training images, which set the ranges. The first layers stay exact: they hold next
    to no weights, and their errors go through all others. The last layer stays exact too, and is
    fitted to give the exact logits from what eight bits make of the images.

    Source: Jacob et al. (2018), Quantization and training of neural networks, section 2; Nagel et
    al. (2019), Data-free quantization through weight equalization and bias correction, section 4.2,
    for the correction of biased outputs, here by ridge regression.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    batches = sample.batches(_BATCH)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Pixels] | None:
            batch = next(batches, None)
            return None if batch is None else {IMAGES: batch}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = (Path(folder) / name for name in ("fp32.onnx", "int8.onnx"))
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_ROUNDED),
            nodes_to_exclude=[*_first_layers(model), _last_layer(model).name],
            extra_options={"CalibMovingAverage": True},
        )
        rounded = onnx.load(target)
    _fit_last_layer(rounded, model, sample, threads)
    return rounded


def _first_layers(model: onnx.ModelProto) -> list[str]:
    """Return the names of the first layers that together hold a negligible share of all weights."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    most, held, names = _EXACT_SHARE * sum(sizes.values()), 0, []
    for node in model.graph.node:
        held += sum(sizes.get(name, 0) for name in node.input)
        if held > most:
            break
        names.append(node.name)
    return names


def _last_layer(model: onnx.ModelProto) -> onnx.NodeProto:
    """Return the linear layer that gives the logits: Gemm(features, weight (C, D), bias (C,))."""
    return next(node for node in model.graph.node if node.output[0] == LOGITS)


def _fit_last_layer(
    rounded: onnx.ModelProto, exact: onnx.ModelProto, sample: Sample, threads: int
) -> None:
    """Change the last layer so that its logits are closest to the exact ones on a sample.

    Ridge regression towards the layer as it is, on standardised features, solved in the space of
    images: their number is smaller than that of features.
    """
    layer = _last_layer(rounded)
    tensors = {tensor.name: tensor for tensor in rounded.graph.initializer}
    weight, bias = (
        numpy_helper.to_array(tensors[name]).astype(np.float64) for name in layer.input[1:3]
    )
    taken = layer.input[0]
    seen = _run(_with_output(rounded, taken, weight.shape[1]), taken, sample, threads)
    wanted = _run(exact, LOGITS, sample, threads)
    mean = seen.mean(axis=0)
    spread = seen.std(axis=0)
    spread = np.maximum(spread, _FLOOR * np.sqrt((spread**2).mean()) or 1.0)
    standard = (seen - mean) / spread
    missing = wanted - (seen @ weight.T + bias)
    likeness = standard @ standard.T
    ridge = _RIDGE * np.trace(likeness) / len(likeness)
    shares = np.linalg.solve(
        likeness + ridge * np.eye(len(likeness)), missing - missing.mean(axis=0)
    )
    change = (standard.T @ shares).T / spread
    for name, array in zip(
        layer.input[1:3],
        (weight + change, bias + missing.mean(axis=0) - change @ mean),
        strict=True,
    ):
        tensors[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


def _with_output(model: onnx.ModelProto, name: str, width: int) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    shape = ["batch", width]
    copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return copy


def _run(
    model: onnx.ModelProto, output: str, sample: Sample, threads: int
) -> npt.NDArray[np.float64]:
    session = open_session(model.SerializeToString(), threads=threads)
    found = [session.run([output], {IMAGES: images})[0] for images in sample.batches(_BATCH)]
    return np.concatenate(found).astype(np.float64)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice to prepare the graph in ways in which it is prepared."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in half precision, with inputs and outputs as they were."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    converted: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True)
    return converted
