"""The graph in eight bits: a quarter of the size, and faster where the processor has VNNI.

Weights are rounded per output channel, activations by what they were on training images. No product
of them can saturate, so the same file gives the same answers on every processor.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tlpipe.data.images import Pixels
from tlpipe.errors import ParityError
from tlpipe.export.bundle import IMAGES
from tlpipe.export.graph import last_layer
from tlpipe.export.parity import Sample, features

# Without VNNI, x86 adds two products of an activation (0..255) and a weight into 16 bits that
# saturate (vpmaddubsw). Which two depends on the kernel; so it is any two of an output channel.
LARGEST_PAIR = 32767 // 255
Single = npt.NDArray[np.float32]
_BATCH = 8
_EXACT_SHARE = 0.0025
_RIDGE, _FLOOR = 1.0, 1e-3
# Layers with weights, and the axis of the weight along which output channels lie.
_LAYERS = {"Conv": 0, "Gemm": 1, "MatMul": 1}
# What computes, and what lies between: the way in (normalisation) and the way out stay exact.
_ROUNDED = (
    *_LAYERS,
    *("Add", "Mul", "Concat"),
    *("Clip", "Relu", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean"),
)


def to_int8(
    model: onnx.ModelProto, sample: Sample, threads: int, *, calibration_images: int
) -> onnx.ModelProto:
    """Return the graph with 8-bit weights and activations, as QuantizeLinear and its opposite.

    ``sample``: training images; so many of them set the ranges of activations. The first layers
    stay exact: they hold next to no weights, and their errors go through all others. The last layer
    stays exact too, and is fitted to give the exact logits from what eight bits make of the sample.

    The two largest weights of an output channel sum to ``LARGEST_PAIR`` at most. Compared with
    ``reduce_range`` (7 bits for the largest one alone) logits err less, by an eighth on the digits
    and on hand signs. Unsigned weights cannot saturate either and err less still, but are six times
    slower where there is VNNI.

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

    batches = sample.first(calibration_images).batches(_BATCH)
    excluded = [*_first_layers(model), last_layer(model).name]

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
            reduce_range=True,  # constants that the overrides do not name
            op_types_to_quantize=list(_ROUNDED),
            nodes_to_exclude=excluded,
            extra_options={
                "CalibMovingAverage": True,
                "TensorQuantOverrides": _weight_ranges(model, excluded),
            },
        )
        rounded = onnx.load(target)
    _fit_last_layer(rounded, model, sample, threads)
    return rounded


def check_no_saturation(content: bytes) -> None:
    """Check in the graph that ships that no 16-bit sum of two products can saturate.

    Raises:
        ParityError: a layer's weights could make one.
    """
    graph = onnx.load_from_string(content).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type not in _LAYERS:
            continue
        for rounded in (made_by[name] for name in node.input[:2] if name in made_by):
            if rounded.input[0] not in tensors:
                continue  # an activation
            weight = numpy_helper.to_array(tensors[rounded.input[0]])
            zero_point = numpy_helper.to_array(tensors[rounded.input[2]])
            axis = next((a.i for a in rounded.attribute if a.name == "axis"), 1)
            pair = largest_pair(weight, axis if zero_point.ndim else None)
            if weight.dtype != np.int8 or zero_point.any() or pair > LARGEST_PAIR:
                farthest = np.abs(zero_point.astype(int)).max()
                raise ParityError(
                    f"the int8 graph would answer otherwise on processors without VNNI: the layer "
                    f"{node.name} has {weight.dtype} weights, two of which sum to {pair} in one "
                    f"channel, with zero points up to {farthest}; expected int8, at most "
                    f"{LARGEST_PAIR} and 0. Nothing was exported. Take int8 out of "
                    f"export.precisions."
                )


def largest_pair(weight: npt.NDArray[np.generic], axis: int | None) -> int:
    """Return the largest sum of two magnitudes in one channel; ``axis`` None: in the tensor."""
    channels = np.abs(np.moveaxis(weight, axis, 0) if axis is not None else weight[np.newaxis])
    flat = channels.astype(np.int64).reshape(len(channels), -1)
    return int(np.sort(flat, axis=1)[:, -2:].sum(axis=1).max())


def _weight_ranges(
    model: onnx.ModelProto, excluded: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return for each channel of each layer's weight the range that ONNX Runtime is to round by.

    It puts the end of a range at 127, so the two largest weights together are to be 127 steps: each
    may then be rounded up by half a step.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    ranges = {}
    for node in model.graph.node:
        if node.op_type not in _LAYERS or node.name in excluded or node.input[1] not in tensors:
            continue
        weight = numpy_helper.to_array(tensors[node.input[1]])
        is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if is_transposed else min(_LAYERS[node.op_type], weight.ndim - 1)
        channels = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1)
        ends = np.sort(channels, axis=1)[:, -2:].sum(axis=1)
        ranges[node.input[1]] = [
            {"axis": axis, "rmin": -end, "rmax": end, "symmetric": True, "reduce_range": False}
            for end in ends
        ]
    return ranges


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


def _fit_last_layer(
    rounded: onnx.ModelProto, exact: onnx.ModelProto, sample: Sample, threads: int
) -> None:
    """Change the last layer so that its logits are closest to the exact ones on a sample."""
    layer = last_layer(rounded)
    tensors = {tensor.name: tensor for tensor in rounded.graph.initializer}
    weight, bias = (numpy_helper.to_array(tensors[name]) for name in layer.input[1:3])
    taken = (features(graph, sample, threads) for graph in (exact, rounded))
    for name, array in zip(layer.input[1:3], corrected(weight, bias, *taken), strict=True):
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))


def corrected(weight: Single, bias: Single, exact: Single, seen: Single) -> tuple[Single, Single]:
    """Return a linear layer that makes of ``seen`` what the given one makes of ``exact``.

    Ridge regression towards the layer as it is, on standardised features, solved in the space of
    images: their number is smaller than that of features.

    Args:
        weight: (C, D).
        bias: (C,).
        exact: (N, D) what the layer takes in fp32.
        seen: (N, D) what it takes in eight bits, for the same images.
    """
    taken, old = seen.astype(np.float64), weight.astype(np.float64)
    mean, spread = taken.mean(axis=0), taken.std(axis=0)
    spread = np.maximum(spread, _FLOOR * np.sqrt((spread**2).mean()) or 1.0)
    standard = (taken - mean) / spread
    missing = (exact.astype(np.float64) - taken) @ old.T
    gram = standard @ standard.T
    ridge = _RIDGE * np.trace(gram) / len(gram)
    shares = np.linalg.solve(gram + ridge * np.eye(len(gram)), missing - missing.mean(axis=0))
    change = (standard.T @ shares).T / spread
    shift = missing.mean(axis=0) - change @ mean
    return (old + change).astype(np.float32), (bias + shift).astype(np.float32)


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
