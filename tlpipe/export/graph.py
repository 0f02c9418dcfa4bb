"""Put the ONNX graph of a classifier together, and hold it against the trained model.

What was frozen, what was trained, the head. For those who have pixels of any size there is a second
graph, in which resizing and cropping are part of it. It does what ``data.images.square`` and
``crop_middle`` do, in ONNX: the shorter side is resized on uint8 with antialiasing, and the middle
kept. Parity with the trained model is measured on real images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, helper, numpy_helper, parser
from onnx.utils import Extractor
from PIL import Image

from tlpipe.backbones import frozen
from tlpipe.backbones.backbone import Backbone
from tlpipe.backbones.frozen import OPSET
from tlpipe.backbones.weights import Weights
from tlpipe.bundle import IMAGES, LOGITS, PROBABILITIES
from tlpipe.data.images import Pixels, Preprocessing, crop_middle, square
from tlpipe.data.manifest import evenly
from tlpipe.data.pixels import Chunks
from tlpipe.errors import ParityError
from tlpipe.progress import track
from tlpipe.runtime import open_session
from tlpipe.training.model import Model

_OPEN = "open."
TEMPERATURE = "temperature"
_BATCH = 4
_TIE = 1e-4
# Heights and widths in short sides: landscape and portrait, smaller and larger than what is stored.
_SHAPES = ((0.59, 0.83), (0.81, 0.62), (1.31, 1.87), (2.13, 1.52))
# Two passes round twice: a value in some millions comes out two grey levels apart.
_LEVELS, _BEYOND_ONE = 2, 1e-4
Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Compute = Callable[[Pixels], Logits]


def classifier(backbone: Backbone, weights: Weights, model: Model) -> onnx.ModelProto:
    """Return the whole graph, with a temperature of 1.

    Input ``images``: (N, S, S, 3) uint8 RGB. Outputs ``logits`` and ``probabilities``: (N, C)
    float32, the probabilities summing to 1: the softmax of logits over the temperature.
    """
    whole = _features(backbone, weights, model)
    features = whole.graph.output[0].name
    head = _head(model, whole.ir_version)
    whole = compose.merge_models(whole, head, [(features, head.graph.input[0].name)])
    del whole.opset_import[:]
    whole.opset_import.append(helper.make_opsetid("", frozen.OPSET))
    return whole


def finished(model: onnx.ModelProto, temperature: float, metadata: Mapping[str, str]) -> bytes:
    """Return a graph's bytes with its temperature and all that is to be known of it.

    Equal inputs give equal bytes.
    """
    (divisor,) = (tensor for tensor in model.graph.initializer if tensor.name == TEMPERATURE)
    divisor.CopyFrom(numpy_helper.from_array(np.float32(temperature), TEMPERATURE))
    model.graph.name = "tlpipe"
    model.producer_name, model.producer_version = "tlpipe", ""
    del model.metadata_props[:]
    helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def last_layer(model: onnx.ModelProto) -> onnx.NodeProto:
    """Return the linear layer that gives the logits: Gemm(features, weight (C, D), bias (C,))."""
    return next(node for node in model.graph.node if node.output[0] == LOGITS)


def last_layer_bytes(model: onnx.ModelProto) -> int:
    """Return how many bytes the weight and the bias of the last layer take."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return sum(tensors[name].ByteSize() for name in last_layer(model).input[1:3])


def _features(backbone: Backbone, weights: Weights, model: Model) -> onnx.ModelProto:
    """Return the graph from images to features: what was frozen, and behind it what was trained."""
    boundary = model.card.origin.boundary
    position = backbone.position(boundary)
    trunk = frozen.part(frozen.whole_graph(backbone, weights), [boundary]) if boundary else None
    if position == len(backbone.stages):
        return trunk
    import torch

    from tlpipe.training.classifier import restore

    stages = restore(backbone, weights, model).stages
    if trunk is None:
        network = frozen.from_pixels(stages, backbone.preprocessing)
        return frozen.export(network, IMAGES, ["features"], frozen.images(backbone.preprocessing))
    example = torch.zeros(2, *backbone.stages[position - 1].shape)
    opened = compose.add_prefix(frozen.export(stages, "activations", ["features"], example), _OPEN)
    taken = opened.graph.input[0].name
    return compose.merge_models(trunk, opened, [(frozen.output(boundary), taken)])


def _head(model: Model, ir_version: int) -> onnx.ModelProto:
    """Return the graph of the head: linear layers with ReLUs between, then the probabilities."""
    width, classes = model.head[0][0].shape[1], model.head[-1][0].shape[0]
    nodes, tensors, current = [], [], "head.input"
    last = len(model.head) - 1
    for number, (weight, bias) in enumerate(model.head):
        names = [f"head.{number}.weight", f"head.{number}.bias"]
        result = LOGITS if number == last else f"head.{number}.sum"
        name = f"head.{number}"
        nodes.append(helper.make_node("Gemm", [current, *names], [result], name=name, transB=1))
        tensors += [
            numpy_helper.from_array(array, tensor_name)
            for array, tensor_name in zip((weight, bias), names, strict=True)
        ]
        if number != last:
            current = f"head.{number}.relu"
            nodes.append(helper.make_node("Relu", [result], [current], name=current))
    tensors.append(numpy_helper.from_array(np.float32(1), TEMPERATURE))
    nodes += [
        helper.make_node("Div", [LOGITS, TEMPERATURE], ["head.scaled"], name="head.scaled"),
        helper.make_node("Softmax", ["head.scaled"], [PROBABILITIES], name="softmax", axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("head.input", TensorProto.FLOAT, ["batch", width])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
            for name in (LOGITS, PROBABILITIES)
        ],
        tensors,
    )
    opset = helper.make_opsetid("", frozen.OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=ir_version)


# The names begin with the prefix, since the classifier has an input "images" too. -0.5: Pillow's
# bicubic kernel. The quotient of integers is int(side * long / short), and Round rounds halves to
# even, as Python's does. Resize gets all four sizes: with "axes", ONNX Runtime 1.31 confuses them
# when it moves the transpositions. Without exclude_outside it repeats pixels beyond the border,
# which moves those inside by up to eleven levels; Pillow leaves them out.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
any_size (uint8[batch, height, width, 3] any_images) => (uint8[batch, {crop}, {crop}, 3] any_square)
<int64[1] any_side = {{{side}}}, int64[1] any_crop = {{{crop}}}, int64[1] any_inner = {{{inner}}},
 int64[1] any_channels = {{3}}, int64[2] any_axes = {{2, 3}}, double any_half = {{0.5}}>
{{
  any_planes = Transpose <perm = [0, 3, 1, 2]> (any_images)
  any_sizes = Shape <start = 1, end = 3> (any_images)
  any_short = ReduceMin (any_sizes)
  any_grown = Mul (any_sizes, any_side)
  any_target = Div (any_grown, any_short)
  any_count = Shape <start = 0, end = 1> (any_images)
  any_shape = Concat <axis = 0> (any_count, any_channels, any_target)
  any_resized = Resize
    <mode = "{mode}", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1>
    (any_planes, , , any_shape)
  any_over = Sub (any_target, any_side)
  any_over_exact = Cast <to = 11> (any_over)
  any_outer_exact = Mul (any_over_exact, any_half)
  any_outer_round = Round (any_outer_exact)
  any_outer = Cast <to = 7> (any_outer_round)
  any_start = Add (any_outer, any_inner)
  any_end = Add (any_start, any_crop)
  any_kept = Slice (any_resized, any_start, any_end, any_axes)
  any_square = Transpose <perm = [0, 2, 3, 1]> (any_kept)
}}
"""


def with_any_size(model: onnx.ModelProto, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Return a graph that takes images (N, H, W, 3) uint8 RGB of any height and width."""
    side, crop = preprocessing.short_side_px, preprocessing.crop_px
    text = _GRAPH.format(
        ir_version=model.ir_version,
        opset=OPSET,
        side=side,
        crop=crop,
        inner=round((side - crop) / 2),
        mode={"bicubic": "cubic", "bilinear": "linear"}[preprocessing.interpolation],
    )
    before = parser.parse_model(text)
    whole = compose.merge_models(before, model, [("any_square", IMAGES)])
    first = whole.graph.input[0]
    for node in whole.graph.node:
        node.input[:] = [IMAGES if name == first.name else name for name in node.input]
    first.name = IMAGES
    return whole


@dataclass(frozen=True)
class Parity:
    """``max_difference`` is of the logits, ``logit_spread`` their standard deviation.

    ``same_top1``: how many of the images get the same label, or another that was as good but for
    1e-4 of the spread.
    """

    images: int
    max_difference: float
    same_top1: int
    logit_spread: float


def trained_model(model: Model, backbone: Backbone, weights: Weights) -> Compute:
    """Return what computes the trained model's logits (N, C) from images (N, S, S, 3) uint8 RGB.

    In torch; where all but the head is frozen, the head in NumPy on what it was trained on, the
    frozen graph's features: that graph was held against torch when it was exported.
    """
    threads = model.card.origin.threads
    if backbone.position(model.card.origin.boundary) < len(backbone.stages):
        return in_torch(model, backbone, weights)
    frozen_part = _features(backbone, weights, model).SerializeToString()
    session = open_session(frozen_part, threads=threads, device="cpu")

    def compute(images: Pixels) -> Logits:
        current: Logits = session.run(None, {IMAGES: images})[0]
        *hidden, (weight, bias) = model.head
        for inner, shift in hidden:
            current = np.maximum(current @ inner.T + shift, 0)
        return current @ weight.T + bias

    return compute


def in_torch(model: Model, backbone: Backbone, weights: Weights) -> Compute:
    """Return what computes the trained model's logits, in torch."""
    import torch

    from tlpipe.training.classifier import full_network

    torch.set_num_threads(model.card.origin.threads)
    network = full_network(backbone, weights, model)

    def compute(images: Pixels) -> Logits:
        with torch.inference_mode():
            logits: Logits = network(torch.from_numpy(images)).numpy()
        return logits

    return compute


def in_onnx(graph: bytes, threads: int) -> Compute:
    """Return what computes a graph's logits, in ONNX Runtime, on the CPU.

    What ships is decided by them, and must not depend on whether the exporting machine has a GPU.
    """
    session = open_session(graph, threads=threads, device="cpu")

    def compute(images: Pixels) -> Logits:
        logits: Logits = session.run([LOGITS], {IMAGES: images})[0]
        return logits

    return compute


@dataclass(frozen=True)
class Sample:
    """Rows of the stored pixels, and what they are: class numbers (N,), groups (N,)."""

    pixels: Chunks
    crop_px: int
    rows: Sequence[int]
    truth: Labels
    groups: Sequence[str]

    def batches(self, size: int) -> Iterator[Pixels]:
        """Yield the images as the network sees them, (B, crop, crop, 3) uint8 RGB."""
        for start in range(0, len(self.rows), size):
            images = self.pixels[list(self.rows[start : start + size])]
            yield np.ascontiguousarray(crop_middle(images, self.crop_px))

    def first(self, count: int) -> "Sample":
        """Return at most so many of them, spread evenly."""
        chosen = evenly(range(len(self.rows)), count)
        return replace(
            self,
            rows=[self.rows[i] for i in chosen],
            truth=self.truth[chosen],
            groups=[self.groups[i] for i in chosen],
        )


def compute_logits(compute: Compute, sample: Sample, description: str) -> Logits:
    """Return the logits (N, C) of a sample."""
    batches = -(-len(sample.rows) // _BATCH)
    shown = track(sample.batches(_BATCH), total=batches, description=description)
    return np.concatenate([compute(images) for images in shown])


def compute_features(model: onnx.ModelProto, sample: Sample, threads: int) -> Logits:
    """Return what a graph's last layer takes for a sample, (N, D) float32, on the CPU."""
    taken = last_layer(model).input[0]
    showing = onnx.ModelProto()
    showing.CopyFrom(model)
    showing.graph.output.append(helper.make_tensor_value_info(taken, TensorProto.FLOAT, None))
    session = open_session(showing.SerializeToString(), threads=threads, device="cpu")
    found = [session.run([taken], {IMAGES: images})[0] for images in sample.batches(_BATCH)]
    return np.concatenate(found)


def measure_parity(trained: Logits, exported: Logits) -> Parity:
    """Compare two arrays of logits (N, C)."""
    spread = float(trained.std())
    named = trained[np.arange(len(trained)), exported.argmax(axis=1)]
    is_same = named >= trained.max(axis=1) - _TIE * _scale(spread)
    return Parity(
        images=len(trained),
        max_difference=float(np.abs(trained - exported).max()),
        same_top1=int(is_same.sum()),
        logit_spread=spread,
    )


def check_parity(
    parity: Parity,
    tolerance: float,
    what: str = "the exported graph",
    of: str = "the trained model",
) -> None:
    """Raise an error for a graph that differs.

    ``tolerance``: largest difference of a logit, for logits whose spread is 1 or less; larger ones
    may differ by as much of their spread, since rounding errors grow with them.

    Raises:
        ParityError: a logit differs by more, or a top label differs.
    """
    allowed = tolerance * _scale(parity.logit_spread)
    # Written so that a NaN is an error too.
    if not (parity.max_difference <= allowed and parity.same_top1 == parity.images):
        raise ParityError(
            f"{what} differs from {of}: logits, which spread by "
            f"{parity.logit_spread:.2g}, by up to {parity.max_difference:.2g}, the top label on "
            f"{parity.images - parity.same_top1} of {parity.images} images; expected at most "
            f"{allowed:.2g} and 0. Nothing was exported. Report it, or raise "
            f"export.parity_tolerance."
        )


def _scale(spread: float) -> float:
    return max(1.0, spread)


def check_any_size(
    content: bytes,
    exact: Compute,
    sample: Sample,
    preprocessing: Preprocessing,
    *,
    tolerance: float,
    threads: int,
) -> None:
    """Check that a graph resizes as training did, and then computes what the exact graph computes.

    First its resizing alone is held against ``data.images``, in grey levels; then the whole graph
    against ``exact`` on the very pixels that came out. Rounding a pixel otherwise is thereby no
    difference of logits, and ONNX Runtime optimises the whole graph as it will where it serves.

    Raises:
        ParityError: one of them differs.
    """
    alone = Extractor(onnx.load_from_string(content)).extract_model([IMAGES], ["any_square"])
    sessions = [
        open_session(graph, threads=threads, device="cpu")
        for graph in (alone.SerializeToString(), content)
    ]
    shown = any_size_pictures(sample, preprocessing.short_side_px)
    squares, logits = (
        np.concatenate([session.run([name], {IMAGES: one[np.newaxis]})[0] for one in shown])
        for session, name in zip(sessions, ("any_square", LOGITS), strict=True)
    )
    ours = [square(Image.fromarray(picture), preprocessing) for picture in shown]
    wanted = crop_middle(np.stack([np.asarray(one) for one in ours]), preprocessing.crop_px)
    check_levels(squares, wanted, "the any-size graph")
    check_parity(
        measure_parity(np.concatenate([exact(one[np.newaxis]) for one in squares]), logits),
        tolerance,
        "the any-size graph",
    )


def check_levels(found: Pixels, wanted: Pixels, what: str) -> None:
    """Check that a graph has resized pictures (N, S, S, 3) as ``data.images`` does, in grey levels.

    Raises:
        ParityError: it has not.
    """
    apart = np.abs(found.astype(np.int16) - wanted)
    if apart.max() > _LEVELS or (apart > 1).mean() > _BEYOND_ONE:
        raise ParityError(
            f"{what} resizes otherwise than training did: {(apart > 1).mean():.1%} of the values "
            f"of {len(found)} pictures differ by more than one grey level, by up to {apart.max()}; "
            f"expected {_BEYOND_ONE:.2%} and {_LEVELS} at most. Nothing was exported. This version "
            f"of onnxruntime is to blame: try another one."
        )


def any_size_pictures(sample: Sample, side: int) -> list[Pixels]:
    """Return a picture (H, W, 3) uint8 RGB for each image: its square, repeated and cut to a shape.

    Nothing is resized to make them, so that they have edges as sharp as those of photographs.
    """
    made = []
    for number, (stored,) in enumerate(replace(sample, crop_px=side).batches(1)):
        height, width = (round(share * side) for share in _SHAPES[number % len(_SHAPES)])
        made.append(np.ascontiguousarray(np.tile(stored, (3, 3, 1))[:height, :width]))
    return made
