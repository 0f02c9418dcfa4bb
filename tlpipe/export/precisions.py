"""Graphs in fewer bits: half precision, eight bits, and whether one is good enough to ship.

Eight bits are a quarter of the size, and faster where the processor has VNNI. Weights are rounded
per output channel, activations by what they were on training images. No product of them can
saturate, so the same file gives the same answers on every processor.

Half precision is for GPUs: half the size, and what would overflow stays fp32. On a CPU, ONNX
Runtime computes fp16 graphs in fp32 and rounds little of what lies between, so an overflow that a
GPU would see stays hidden there. Hence it is excluded by how the graph is made.

A precision ships by its answers for held-out images.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from tlpipe.bundle import IMAGES, LOGITS
from tlpipe.data.images import Pixels
from tlpipe.errors import ParityError
from tlpipe.export.graph import Labels, Logits, Sample, compute_features, last_layer
from tlpipe.held_out import HeldOut
from tlpipe.resampling import paired_difference, share_interval
from tlpipe.runtime import open_session

# Of fp32's bytes without the last layer, which stays exact and grows with the classes. Eight bits
# are a quarter of thirty-two; the first layers, scales and the graph's structure add to that, a
# fifth in the smallest networks (half a million parameters).
MOST_BYTES = {"int8": 0.35, "fp16": 0.55}
_CONFIDENCE = 0.95
Correct = Callable[[Logits, Logits], tuple[Logits, Logits]]
# Of the spread of logits: about as much as eight bits move one.
_TIE = 0.05


@dataclass(frozen=True)
class Verdict:
    """What a graph in fewer bits answers beside the exact one, on held-out images.

    Attributes:
        accuracy_change: with its interval; an image near a tie counts in part (``judge``).
        agreement: share of images with the same answer, with its interval.
        size: share of fp32's bytes, the last layer left out of both.
        reason: why it does not ship, or empty.
        can_tell: whether a change below the bound is ruled out at 95 %; a graph that is good enough
            ships without that, as no more than some 400 images rule out one per cent.
    """

    accuracy_change: dict[str, Any]
    agreement: dict[str, Any]
    size: float
    reason: str
    can_tell: bool

    def __str__(self) -> str:
        """Say it in one line."""
        change, same = self.accuracy_change, self.agreement
        said = (
            f"accuracy {change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f}) "
            f"against fp32 on held-out images, those near a tie counted in part; the same answer "
            f"for {same['value']:.1%}"
        )
        return said if self.can_tell else f"{said}; too few images to rule out more"


def out_of_fold_logits(held: HeldOut, taken: Logits, corrected: Correct | None) -> Logits:
    """Return the logits (N, C) of images by the head of the fold that held each of them out.

    Args:
        held: predictions of N images, with the folds' heads.
        taken: (N, D) what the last layer takes of them in the precision to be checked.
        corrected: changes a head as the last layer of this precision was changed.
    """
    logits = np.empty_like(held.logits)
    for fold, (weight, bias) in enumerate(held.heads):
        weight, bias = corrected(weight, bias) if corrected else (weight, bias)
        inside = held.folds == fold
        logits[inside] = taken[inside] @ weight.T + bias
    return logits


def judge(
    name: str,
    exact: Logits,
    other: Logits,
    truth: Labels,
    groups: Sequence[str],
    *,
    size: float,
    max_drop: float,
) -> Verdict:
    """Compare the answers of two graphs (N, C) for the same held-out images.

    ``groups``: (N,) names of images that belong together, or empty ones; ``size``: as in
    ``Verdict``; ``max_drop``: of accuracy, over all images and as a mean over classes.

    Processors differ in the last bits of logits, and where they do, an image that lies between two
    classes may count on one and not on the other. So that this does not decide what ships, an
    image within a twentieth of the logits' spread of a tie counts in part (``hits``).
    """
    tie = _TIE * float(exact.std())
    right, kept = hits(exact, truth, tie), hits(other, truth, tie)
    change = paired_difference(right, kept, groups, _CONFIDENCE)
    is_same = exact.argmax(axis=1) == other.argmax(axis=1)
    same = share_interval(is_same, groups, _CONFIDENCE)
    reasons = []
    if not np.isfinite(other).all():
        reasons.append("its logits are not finite")
    if change["value"] < -max_drop:
        reasons.append(
            f"its accuracy on {len(truth)} held-out images differs by {change['value']:+.4f} "
            f"({change['low']:+.4f} to {change['high']:+.4f}), expected at least {-max_drop:+g}"
        )
    # Or a class of few images among many could be lost for nothing.
    gained = kept - right
    balanced = float(np.mean([gained[truth == label].mean() for label in np.unique(truth)]))
    if not reasons and balanced < -max_drop:
        reasons.append(
            f"its accuracy as a mean over classes differs by {balanced:+.4f}, expected at least "
            f"{-max_drop:+g}"
        )
    if size > MOST_BYTES[name]:
        reasons.append(
            f"its size without the last layer is {size:.4f} of fp32's, expected at most "
            f"{MOST_BYTES[name]:g}"
        )
    # Accuracy cannot change by more than the share of answers that changed.
    least = max(change["low"], same["low"] - 1)
    return Verdict(change, same, size, "; ".join(reasons), can_tell=least >= -max_drop)


def hits(logits: Logits, truth: Labels, tie: float) -> npt.NDArray[np.float64]:
    """Return (N,) 1 for each image whose true class leads, 0 where another does.

    In between it rises in a straight line while the true class's logit goes from ``tie`` below the
    best of the others to ``tie`` above it. An image without finite logits counts 0.
    """
    images = np.arange(len(truth))
    others = logits.astype(np.float64)
    true = others[images, truth]
    others[images, truth] = -np.inf
    lead = true - others.max(axis=1)
    width = 2 * max(tie, 1e-30)  # all logits may be equal
    shares = np.clip(0.5 + lead / width, 0.0, 1.0)
    return np.where(np.isfinite(logits).all(axis=1), shares, 0.0)


_BATCH = 8
# fp16 ends at 65504. An eighth of that leaves room for images that are not in the sample.
_LARGEST = float(np.finfo(np.float16).max) / 8
# What squares, sums, divides or exponentiates: its terms exceed 65504 or vanish below 6e-8 though
# its results do neither. Decomposed, LayerNormalization is Sub, Pow, ReduceMean, Sqrt and Div.
_SENSITIVE = frozenset({
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    *("LpNormalization", "LpPool", "MeanVarianceNormalization", "LRN"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd"),
    *("ReduceLogSum", "ReduceLogSumExp", "GlobalAveragePool", "Softmax", "LogSoftmax"),
    *("Sub", "Div", "Pow", "Sqrt", "Reciprocal", "Exp", "Log"),
})  # fmt: skip
# What has inputs that must be fp32, or makes tensors of a type that stands in an attribute.
_FIXED = frozenset(
    {"Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "Range", "Resize"}
)
# These belong to a normalisation where all that they take comes from one.
_FOLLOWING = frozenset({"Add", "Mul", "Clip", "Max", "Min", "Neg", "Transpose", "Reshape"})


def to_fp16(model: onnx.ModelProto, sample: Sample, threads: int) -> onnx.ModelProto:
    """Return the graph with fp16 weights and activations; inputs and outputs are as they were.

    fp32 stay: normalisations, sums, quotients, exponentials, the last layer and what follows it;
    and every node that takes or gives values which, on ``sample``, exceed an eighth of fp16's
    range. Between two of those nothing is rounded.

    onnxruntime.transformers.float16 would round there (microsoft/onnxruntime#20346), and leaves a
    graph whose nodes are in no valid order.
    """
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    graph = inferred.graph
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    typed = [*graph.input, *graph.value_info, *graph.output]
    floats = {v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    large = _too_large(inferred, floats, sample, threads)
    large |= {name for name, tensor in weights.items() if _magnitude(tensor) > _LARGEST}
    exact = _exact(graph, large)

    halves: set[str] = set()
    made: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []

    def cast(name: str, to: int) -> str:
        if (name, to) not in made:
            result = made[name, to] = f"{name}.{TensorProto.DataType.Name(to).lower()}"
            if name in weights:
                half = numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(half, result))
            else:
                nodes.append(helper.make_node("Cast", [name], [result], name=result, to=to))
        return made[name, to]

    for number, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            if number in exact and name in halves:
                node.input[place] = cast(name, TensorProto.FLOAT)
            elif number not in exact and name not in halves and name in floats | weights.keys():
                node.input[place] = cast(name, TensorProto.FLOAT16)
        if number not in exact:
            halves |= floats & set(node.output)
        nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return inferred


def _exact(graph: onnx.GraphProto, large: set[str]) -> set[int]:
    """Return the places of the nodes that stay fp32; ``large``: tensors that do not fit fp16."""
    weights = {t.name for t in graph.initializer}
    exact: set[int] = set()
    behind: set[str] = set()  # what nodes that stay fp32 give
    is_last = False
    for number, node in enumerate(graph.node):
        is_last = is_last or LOGITS in node.output
        taken = [name for name in node.input if name and name not in weights]
        is_square = node.op_type == "Mul" and len(taken) == 2 and taken[0] == taken[1]
        follows = node.op_type in _FOLLOWING and taken and behind.issuperset(taken)
        is_large = not large.isdisjoint([*node.input, *node.output])
        is_kind = node.op_type in _SENSITIVE | _FIXED
        if is_last or is_square or follows or is_large or is_kind:
            exact.add(number)
            behind |= set(node.output)
    return exact


def _magnitude(tensor: onnx.TensorProto) -> float:
    """Return the largest magnitude in a tensor."""
    return float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))


def _too_large(model: onnx.ModelProto, floats: set[str], sample: Sample, threads: int) -> set[str]:
    """Return which results of nodes are, in fp32 and for a sample, too large for fp16."""
    names = [name for node in model.graph.node for name in node.output if name in floats]
    measuring = onnx.ModelProto()
    measuring.CopyFrom(model)
    for name in names:
        size, largest = f"{name}.size", f"{name}.largest"
        measuring.graph.node.extend((
            helper.make_node("Abs", [name], [size]),
            helper.make_node("ReduceMax", [size], [largest], keepdims=0),
        ))  # fmt: skip
        measuring.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    session = open_session(measuring.SerializeToString(), threads=threads, device="cpu")
    asked = [f"{name}.largest" for name in names]
    found = [session.run(asked, {IMAGES: images}) for images in sample.batches(_BATCH)]
    # Written so that a NaN is too large.
    fits = (np.array(found).reshape(-1, len(names)) <= _LARGEST).all(axis=0)
    return {names[i] for i in np.flatnonzero(~fits)}


# Without VNNI, x86 adds two products of an activation (0..255) and a weight into 16 bits that
# saturate (vpmaddubsw). Which two depends on the kernel; so it is any two of an output channel.
LARGEST_PAIR = 32767 // 255
Single = npt.NDArray[np.float32]
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
) -> tuple[onnx.ModelProto, Correct]:
    """Return the graph with 8-bit weights and activations, and what else fits its last layer.

    Eight bits are written as QuantizeLinear and its opposite. The second value changes any linear
    layer on the same features as the graph's last one was changed.

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
    exact, seen = (compute_features(graph, sample, threads) for graph in (model, rounded))
    correct = partial(corrected_head, exact=exact, seen=seen)
    _change_last_layer(rounded, correct)
    return rounded, correct


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


def _change_last_layer(graph: onnx.ModelProto, correct: Correct) -> None:
    layer = last_layer(graph)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    weight, bias = (numpy_helper.to_array(tensors[name]) for name in layer.input[1:3])
    for name, array in zip(layer.input[1:3], correct(weight, bias), strict=True):
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))


def corrected_head(
    weight: Single, bias: Single, exact: Single, seen: Single
) -> tuple[Single, Single]:
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
