"""The graph that resizes by itself, against Pillow's resizing."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from PIL import Image, ImageDraw

from tlpipe.data.images import Preprocessing, crop_middle, read_upright, square
from tlpipe.errors import ParityError
from tlpipe.export import graph
from tlpipe.export.graph import with_any_size

Interpolation = Literal["bilinear", "bicubic"]


def contract(
    interpolation: Interpolation, short_side_px: int = 64, crop_px: int = 56
) -> Preprocessing:
    half = (0.5, 0.5, 0.5)
    return Preprocessing(
        short_side_px=short_side_px,
        interpolation=interpolation,
        crop_px=crop_px,
        mean=half,
        std=half,
    )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_of_any_size_are_resized_as_ours(
    interpolation: Interpolation, shared_data: Callable[[str], Path]
) -> None:
    """Two hundred photographs of odd sizes, on each pixel."""
    preprocessing = contract(interpolation, 256, 224)
    same = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> '
        "rest (uint8[n, 224, 224, 3] images) => (uint8[n, 224, 224, 3] pixels) "
        "{ pixels = Identity (images) }"
    )
    whole = with_any_size(same, preprocessing)
    session = onnxruntime.InferenceSession(whole.SerializeToString())
    paths = sorted(shared_data("hymenoptera").rglob("*.jpg"))[:200]
    sizes, apart = set(), []
    for path in paths:
        image = read_upright(path.read_bytes())[0]
        pixels = np.asarray(image)
        sizes.add(pixels.shape)
        (found,) = session.run(None, {"images": pixels[np.newaxis]})
        ours = crop_middle(np.asarray(square(image, preprocessing)), 224)
        apart.append(np.abs(found[0].astype(int) - ours).max())
    assert len(paths) == 200
    assert len(sizes) > 20
    # Two passes round twice: a pixel in thirty million may come out two levels apart.
    assert sum(levels > 1 for levels in apart) <= 1
    assert max(apart) <= 2


def classifier() -> onnx.ModelProto:
    """Logits of four classes: differences of what the quarters of a picture hold."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        rest (uint8[n, 56, 56, 3] images) => (float[n, 4] logits) {
            pixels = Cast <to = 1> (images)
            planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
            quarters = AveragePool <kernel_shape = [28, 28], strides = [28, 28]> (planes)
            flat = Flatten (quarters)
            logits = Gemm (flat, weight)
        }"""
    )
    weight = np.random.default_rng(0).normal(0, 0.03, (12, 4)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    return model


def drawings(count: int = 8) -> np.ndarray:
    """Squares with lines and discs, whose edges show how a picture was resized."""
    made = []
    for number in range(count):
        random = np.random.default_rng(number)
        image = Image.new("RGB", (64, 64), tuple(map(int, random.integers(0, 256, 3))))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            left, upper = map(int, random.integers(0, 56, 2))
            colour = tuple(map(int, random.integers(0, 256, 3)))
            draw.ellipse((left, upper, left + 9, upper + 7), fill=colour)
            draw.line((upper, left, 63 - upper, 40), fill=colour)
        made.append(np.asarray(image))
    return np.stack(made)


def check(model: onnx.ModelProto, preprocessing: Preprocessing, exact: onnx.ModelProto) -> None:
    stored = drawings()
    count = len(stored)
    sample = graph.Sample(stored, 56, range(count), np.zeros(count, np.int64), [""] * count)  # type: ignore[arg-type]
    graph.check_any_size(
        model.SerializeToString(),
        graph.in_onnx(exact.SerializeToString(), threads=1),
        sample,
        preprocessing,
        tolerance=1e-4,
        threads=1,
    )


def changed(model: onnx.ModelProto, **values: object) -> onnx.ModelProto:
    """The graph with other attributes of its Resize."""
    (resize,) = (node for node in model.graph.node if node.op_type == "Resize")
    kept = [attribute for attribute in resize.attribute if attribute.name not in values]
    del resize.attribute[:]
    resize.attribute.extend(kept)
    resize.attribute.extend(helper.make_attribute(*pair) for pair in values.items())
    return model


@pytest.mark.fault("E10")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_as_training_did_passes_and_any_other_fails(interpolation: Interpolation) -> None:
    preprocessing = contract(interpolation)
    exact = classifier()
    check(with_any_size(exact, preprocessing), preprocessing, exact)
    other = {"bicubic": "linear", "bilinear": "cubic"}[interpolation]
    for values in (
        {"mode": other},
        {"mode": "nearest", "antialias": 0, "exclude_outside": 0},
        {"coordinate_transformation_mode": "asymmetric"},
        {"coordinate_transformation_mode": "align_corners"},
    ):
        broken = changed(with_any_size(exact, preprocessing), **values)
        with pytest.raises(
            ParityError,
            match=r"resizes otherwise than training did: .* of the values of 8 pictures",
        ):
            check(broken, preprocessing, exact)


@pytest.mark.fault("E10")
def test_another_crop_fails() -> None:
    preprocessing = contract("bicubic")
    exact = classifier()
    moved = with_any_size(exact, preprocessing.model_copy(update={"short_side_px": 66}))
    with pytest.raises(ParityError, match="resizes otherwise"):
        check(moved, preprocessing, exact)


@pytest.mark.fault("E10")
def test_a_classifier_that_is_not_the_exact_one_fails() -> None:
    preprocessing = contract("bicubic")
    exact, other = classifier(), classifier()
    weight = onnx.numpy_helper.to_array(other.graph.initializer[0]) * np.float32(1.001)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    with pytest.raises(ParityError, match="the any-size graph differs from the trained model"):
        check(with_any_size(other, preprocessing), preprocessing, exact)


def test_pictures_are_of_both_shapes_smaller_and_larger() -> None:
    stored = drawings()
    sample = graph.Sample(stored, 56, range(8), np.zeros(8, np.int64), [""] * 8)  # type: ignore[arg-type]
    shapes = {picture.shape[:2] for picture in graph.any_size_pictures(sample, 64)}
    assert len(shapes) == 4
    assert {height > width for height, width in shapes} == {True, False}
    assert {max(shape) < 64 for shape in shapes} == {min(shape) < 64 for shape in shapes}
    for shown, square_ in zip(graph.any_size_pictures(sample, 64), stored, strict=True):
        height, width = min(shown.shape[0], 64), min(shown.shape[1], 64)
        assert np.array_equal(shown[:height, :width], square_[:height, :width])
