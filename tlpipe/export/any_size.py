"""The graph for those who have pixels of any size: resizing and cropping are part of it.

It does what ``data.images.square`` and ``crop_middle`` do, in ONNX: the shorter side is resized on
uint8 with antialiasing, and the middle kept.
"""

from dataclasses import replace

import numpy as np
import onnx
from onnx import compose, parser
from onnx.utils import Extractor
from PIL import Image

from tlpipe.backbones.frozen import OPSET
from tlpipe.data.images import Pixels, Preprocessing, crop_middle, square
from tlpipe.errors import ParityError
from tlpipe.export import parity
from tlpipe.export.bundle import IMAGES, LOGITS
from tlpipe.export.parity import Compute, Sample
from tlpipe.runtime import open_session

# Heights and widths in short sides: landscape and portrait, smaller and larger than what is stored.
_SHAPES = ((0.59, 0.83), (0.81, 0.62), (1.31, 1.87), (2.13, 1.52))
# Two passes round twice: a value in some millions comes out two grey levels apart.
_LEVELS, _BEYOND_ONE = 2, 1e-4

# The names begin with the prefix, since the classifier has an input "images" too. -0.5: Pillow's
# bicubic kernel. The quotient of integers is int(side * long / short), and Round rounds halves to
# even, as Python's does. Resize gets all four sizes: with "axes", ONNX Runtime 1.31 confuses them
# when it moves the transpositions.
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
  any_resized = Resize <mode = "{mode}", cubic_coeff_a = -0.5, antialias = 1>
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


def check(
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
    shown = pictures(sample, preprocessing.short_side_px)
    squares, logits = (
        np.concatenate([session.run([name], {IMAGES: one[np.newaxis]})[0] for one in shown])
        for session, name in zip(sessions, ("any_square", LOGITS), strict=True)
    )
    ours = [square(Image.fromarray(picture), preprocessing) for picture in shown]
    wanted = crop_middle(np.stack([np.asarray(one) for one in ours]), preprocessing.crop_px)
    apart = np.abs(squares.astype(np.int16) - wanted)
    if apart.max() > _LEVELS or (apart > 1).mean() > _BEYOND_ONE:
        raise ParityError(
            f"the any-size graph resizes otherwise than training did: {(apart > 1).mean():.1%} of "
            f"the values of {len(shown)} pictures differ by more than one grey level, by up to "
            f"{apart.max()}; expected {_BEYOND_ONE:.2%} and {_LEVELS} at most. Nothing was "
            f"exported. This version of onnxruntime is to blame: try another one."
        )
    parity.check(
        parity.compare(np.concatenate([exact(one[np.newaxis]) for one in squares]), logits),
        tolerance,
        "the any-size graph",
    )


def pictures(sample: Sample, side: int) -> list[Pixels]:
    """Return a picture (H, W, 3) uint8 RGB for each image: its square, repeated and cut to a shape.

    Nothing is resized to make them, so that they have edges as sharp as those of photographs.
    """
    made = []
    for number, (stored,) in enumerate(replace(sample, crop_px=side).batches(1)):
        height, width = (round(share * side) for share in _SHAPES[number % len(_SHAPES)])
        made.append(np.ascontiguousarray(np.tile(stored, (3, 3, 1))[:height, :width]))
    return made
