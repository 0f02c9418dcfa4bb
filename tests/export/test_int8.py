"""Eight bits: weights that cannot saturate, ranges from training images, a refitted last layer."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from tests.export.conftest import Family, frozen_model
from tlpipe.data import pixels as packed
from tlpipe.data.images import crop_middle
from tlpipe.data.manifest import load_split
from tlpipe.errors import ParityError
from tlpipe.export import bundle as bundles
from tlpipe.export import graph, int8, parity


def layers(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, np.ndarray, int]]:
    """Yield each layer with its rounded weight and the axis of its output channels."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            source = made_by.get(node.input[1])
            if source is not None and source.input[0] in tensors:
                (axis,) = (a.i for a in source.attribute if a.name == "axis")
                yield node, numpy_helper.to_array(tensors[source.input[0]]), axis


def assert_cannot_saturate(model: onnx.ModelProto) -> int:
    """Check each pair of weights that meets in one sum against 16 bits; count the layers."""
    count = 0
    for node, weight, axis in layers(model):
        assert weight.dtype == np.int8, node.name
        for channel in np.moveaxis(weight, axis, 0).astype(int):
            *_, second, first = np.sort(abs(channel.ravel())) if channel.size > 1 else (0, 0)
            assert 255 * (first + second) <= 32767, node.name
        count += 1
    # Nothing signed is left that no layer was found for; unsigned constants are added, no factors.
    signed = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(len(t.dims) > 1 for t in signed) == count
    return count


@pytest.mark.fault("E06")
def test_no_weight_that_ships_can_saturate(every_precision: Path) -> None:
    """Read from the file, so that it holds on processors that are not here."""
    path = bundles.load(every_precision / "bundle").graphs["int8"]
    assert assert_cannot_saturate(onnx.load(path)) >= 40
    int8.check_no_saturation(path.read_bytes())


@pytest.fixture(scope="session")
def resnet(family: Callable[[str], Family]) -> Family:
    return family("resnet18")


@pytest.fixture(scope="session")
def rounded(resnet: Family) -> onnx.ModelProto:
    """ResNet-18 in eight bits, made of the first 24 of 32 images."""
    return int8.to_int8(resnet.graph, resnet.sample(24), 2, calibration_images=24)


@pytest.mark.fault("E06")
def test_no_convolution_of_another_network_can_saturate(rounded: onnx.ModelProto) -> None:
    assert assert_cannot_saturate(rounded) == 19  # of 20; the first one holds next to no weights
    copy = onnx.ModelProto()
    copy.CopyFrom(rounded)
    int8.check_no_saturation(graph.finished(copy, 1.0, {}))


@pytest.mark.fault("E06")
def test_layers_that_the_runtime_fuses_keep_their_weights(
    rounded: onnx.ModelProto, tmp_path: Path
) -> None:
    """Graph optimisers make one node of a layer and its roundings; the bound holds there too."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(rounded.SerializeToString(), options)
    fused = onnx.load(tmp_path / "fused.onnx").graph
    tensors = {t.name: numpy_helper.to_array(t) for t in fused.initializer}
    weights = [tensors[n.input[3]] for n in fused.node if n.op_type == "QLinearConv"]
    assert len(weights) == 19
    for weight in weights:
        assert weight.dtype == np.int8
        assert int8.largest_pair(weight, 0) <= 128


@pytest.mark.slow
@pytest.mark.fault("E06")
def test_no_matrix_of_a_transformer_can_saturate(family: Callable[[str], Family]) -> None:
    given = family("timm/vit_tiny_patch16_224")
    model = int8.to_int8(given.graph, given.sample(8), 2, calibration_images=8)
    assert assert_cannot_saturate(model) == 49
    assert {node.op_type for node, _, _ in layers(model)} == {"Conv", "MatMul"}
    int8.check_no_saturation(graph.finished(model, 1.0, {}))


def one_layer(weight: np.ndarray, zero_point: int = 0) -> onnx.ModelProto:
    """A matrix (D, C) of eight bits behind an activation of eight bits."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        layer (uint8[batch, n] images) => (float[batch, c] logits)
        <float scale = {1.0}, uint8 low = {0}> {
            pixels = DequantizeLinear (images, scale, low)
            matrix = DequantizeLinear <axis = 1> (weight, scales, zero_points)
            logits = MatMul (pixels, matrix)
        }"""
    )
    model.graph.node[-1].name = "the layer"
    channels = weight.shape[1]
    for name, array in (
        ("weight", weight),
        ("scales", np.ones(channels, np.float32)),
        ("zero_points", np.full(channels, zero_point, weight.dtype)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def saturating(images: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What AVX2 computes: products of bytes, added in pairs with 16-bit saturation, then exactly.

    Source: Intel, intrinsics guide, _mm256_maddubs_epi16.
    """
    products = images.astype(np.int64)[:, :, None] * weight.astype(np.int64)[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return np.clip(pairs, -32768, 32767).sum(axis=1)


@pytest.mark.fault("E06")
def test_a_pair_that_could_saturate_is_an_error() -> None:
    """The bound is where the instruction begins to err, in any order that a kernel takes."""
    random = np.random.default_rng(0)
    brightest = np.full((1, 8), 255, np.uint8)
    for largest, is_safe in ((64, True), (65, False)):
        weight = random.integers(-10, 11, (8, 3)).astype(np.int8)
        weight[[2, 5], 1] = largest, 64
        swapped = weight.copy()
        swapped[[3, 5]] = swapped[[5, 3]]  # side by side
        exact = ReferenceEvaluator(one_layer(swapped)).run(None, {"images": brightest})[0]
        assert np.array_equal(saturating(brightest, swapped), exact) == is_safe
        content = one_layer(weight).SerializeToString()
        if is_safe:
            int8.check_no_saturation(content)
        else:
            with pytest.raises(
                ParityError,
                match=r"without VNNI: the layer the layer has int8 weights, two of which sum to "
                r"129 in one channel, with zero points up to 0; expected int8, at most 128 and 0",
            ):
                int8.check_no_saturation(content)
    unsigned = one_layer(np.zeros((8, 3), np.uint8), 128)
    with pytest.raises(ParityError, match=r"has uint8 weights, .* zero points up to 128"):
        int8.check_no_saturation(unsigned.SerializeToString())


@pytest.mark.fault("E06")
def test_one_layer_of_a_whole_network_that_could_saturate_is_named(
    rounded: onnx.ModelProto,
) -> None:
    """Such as ONNX Runtime's own choice: 127 steps for the largest weight of a channel."""
    broken = onnx.ModelProto()
    broken.CopyFrom(rounded)
    node, weight, _ = list(layers(broken))[-1]
    (source,) = (n for n in broken.graph.node if n.output[0] == node.input[1])
    (tensor,) = (t for t in broken.graph.initializer if t.name == source.input[0])
    full = np.clip(weight.astype(int) * 2, -127, 127).astype(np.int8)
    tensor.CopyFrom(numpy_helper.from_array(full, tensor.name))
    with pytest.raises(ParityError, match=f"the layer {node.name} has int8 weights, two of which"):
        int8.check_no_saturation(broken.SerializeToString())


def test_rounding_is_to_half_a_step_of_each_channel(
    resnet: Family, rounded: onnx.ModelProto
) -> None:
    """Every weight is within half a step; a step is a 127th of the channel's two largest ones."""
    exact = {t.name: numpy_helper.to_array(t) for t in resnet.graph.graph.initializer}
    tensors = {t.name: numpy_helper.to_array(t) for t in rounded.graph.initializer}
    made_by = {node.output[0]: node for node in rounded.graph.node}
    for node, weight, axis in layers(rounded):
        before = exact[made_by[node.input[1]].input[0].removesuffix("_quantized")]
        scales = tensors[made_by[node.input[1]].input[1]]
        flat = np.moveaxis(before, axis, 0).reshape(before.shape[axis], -1).astype(np.float64)
        step = np.sort(abs(flat), axis=1)[:, -2:].sum(axis=1) / 127
        assert scales == pytest.approx(step, rel=1e-5)
        found = np.moveaxis(weight, axis, 0).reshape(flat.shape) * step[:, None]
        assert (abs(found - flat) <= 0.501 * step[:, None]).all()


def test_ranges_come_from_the_training_images_alone(every_precision: Path, artifacts: Path) -> None:
    """The first activation's range is the mean, over batches of 8, of what 128 images give it."""
    shipped = bundles.load(every_precision / "bundle")
    rows = [
        row
        for row, image in enumerate(load_split(artifacts / "split/split.csv"))
        if image.split == "train"
    ]
    chosen = [rows[int(i * len(rows) / 512)] for i in range(512)][::4]
    stored = packed.load(artifacts / "ingest/pixels").array[chosen]
    images = np.ascontiguousarray(crop_middle(stored, 224))
    rounded, exact = onnx.load(shipped.graphs["int8"]), onnx.load(shipped.model)
    first = next(node for node in rounded.graph.node if node.op_type == "QuantizeLinear")
    tensors = {t.name: numpy_helper.to_array(t) for t in rounded.graph.initializer}
    value = helper.make_tensor_value_info(first.input[0], onnx.TensorProto.FLOAT, None)
    assert first.input[0] in {name for node in exact.graph.node for name in node.output}
    exact.graph.output.append(value)
    session = parity.open_session(exact.SerializeToString(), threads=2, device="cpu")
    batches = [
        session.run([first.input[0]], {"images": images[i : i + 8]})[0] for i in range(0, 128, 8)
    ]
    low, high = (np.mean([end(batch) for batch in batches]) for end in (np.min, np.max))
    scale = (max(high, 0) - min(low, 0)) / 255
    assert tensors[first.input[1]] == pytest.approx(scale, rel=1e-4)


def test_eight_bits_of_another_network_answer_alike(
    resnet: Family, rounded: onnx.ModelProto
) -> None:
    """On images that the calibration did not see; the logits of fp32 are the reference."""
    exact = resnet.graph
    assert 0.25 < rounded.ByteSize() / exact.ByteSize() < 0.27
    expected, found = (
        parity.in_onnx(content.SerializeToString(), 2)(resnet.images[24:])
        for content in (exact, rounded)
    )
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.97


def test_the_last_layer_is_refitted_and_stays_exact(
    resnet: Family, rounded: onnx.ModelProto
) -> None:
    """On the images that it is fitted on, logits come closer than with the layer as it was."""
    exact = resnet.graph
    plain = onnx.ModelProto()
    plain.CopyFrom(rounded)
    old = {t.name: t for t in exact.graph.initializer}
    (last,) = (node for node in plain.graph.node if node.output[0] == "logits")
    for tensor in plain.graph.initializer:
        if tensor.name in last.input[1:]:
            assert tensor.data_type == onnx.TensorProto.FLOAT
            tensor.CopyFrom(old[tensor.name])
    expected, fitted, unfitted = (
        parity.in_onnx(m.SerializeToString(), 2)(resnet.images[:24])
        for m in (exact, rounded, plain)
    )
    assert abs(fitted - expected).mean() < 0.7 * abs(unfitted - expected).mean()


@pytest.mark.slow
def test_a_head_with_hidden_units_is_rounded_but_for_its_last_layer(resnet: Family) -> None:
    given = resnet
    random = np.random.default_rng(0)
    ((weight, _),) = given.model.head
    hidden = random.normal(0, 0.05, (64, weight.shape[1])).astype(np.float32)
    last = random.normal(0, 0.3, (5, 64)).astype(np.float32)
    zeros = np.zeros(64, np.float32), np.zeros(5, np.float32)
    model = frozen_model(given.backbone, (hidden, zeros[0]), (last, zeros[1]))
    exact = graph.classifier(given.backbone, given.weights, model)
    rounded = int8.to_int8(exact, given.sample(24), 2, calibration_images=24)
    names = {node.name for node, _, _ in layers(rounded)}
    assert "head.0" in names
    assert "head.1" not in names
    assert_cannot_saturate(rounded)
    expected, found = (
        parity.in_onnx(m.SerializeToString(), 2)(given.images[24:]) for m in (exact, rounded)
    )
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.97
