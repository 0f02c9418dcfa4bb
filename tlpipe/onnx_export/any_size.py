"""The graph for those who have pixels of any size: resizing and cropping are part of it.

It does what ``data.images.square`` and ``crop_middle`` do, in ONNX: the shorter side is resized on
uint8 with antialiasing, and the middle kept.
"""

import onnx
from onnx import compose, parser

from tlpipe.data.images import Preprocessing
from tlpipe.features.frozen import OPSET
from tlpipe.onnx_export.bundle import IMAGES

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
