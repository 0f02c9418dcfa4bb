"""Fewer bits: what ships, that nothing in half precision overflows, and no product in int8."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import grimp
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from scipy.stats import binomtest

from tests.export.conftest import Family, frozen_model, run_export, verdicts
from tlpipe import bundle, held_out
from tlpipe.data import pixels
from tlpipe.data.images import crop_middle
from tlpipe.data.manifest import load_split
from tlpipe.errors import ParityError
from tlpipe.export import export, graph, precisions
from tlpipe.export.precisions import MOST_BYTES, Verdict
from tlpipe.held_out import HeldOut
from tlpipe.runtime import open_session


def test_what_ships_is_what_the_report_does_not_refuse(every_precision: Path) -> None:
    shipped = bundle.load(every_precision / "bundle")
    found = verdicts(every_precision)
    assert set(found) == {"fp16", "int8"}
    kept = {name for name, verdict in found.items() if not verdict["reason"]}
    assert set(shipped.graphs) == {"fp32", "any-size"} | kept
    exact = shipped.graphs["fp32"].stat().st_size
    head = onnx.load(shipped.graphs["fp32"]).graph.initializer
    last = sum(t.ByteSize() for t in head if t.name in ("head.0.weight", "head.0.bias"))
    assert last > 4 * 10 * 1280
    for name in kept:
        size = shipped.graphs[name].stat().st_size
        assert found[name]["size"] == pytest.approx((size - last) / (exact - last))
        assert found[name]["size"] <= precisions.MOST_BYTES[name]
        change = found[name]["accuracy_change"]
        assert change["low"] <= change["value"] <= change["high"]


def test_every_graph_says_the_same_of_itself(every_precision: Path) -> None:
    shipped = bundle.load(every_precision / "bundle")
    said = [
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        for path in shipped.graphs.values()
    ]
    assert len(said) == 4
    assert all(metadata == said[0] for metadata in said)
    provenance = json.loads(said[0]["tlpipe.provenance"])
    assert provenance["temperature"] == shipped.provenance["temperature"]
    assert provenance["origin"]["data_sha256"] == shipped.provenance["origin"]["data_sha256"]


@pytest.mark.fault("E07")
def test_candidates_are_those_that_were_asked_for(family: Callable[[str], Family]) -> None:
    """Also half precision on a machine without a GPU; equal inputs give equal bytes."""
    given = family("resnet18")
    whole = given.graph

    def made(*names: Literal["fp16", "int8"]) -> dict[str, bytes]:
        params = export.Params(precisions=names, **({"calibration_images": 2} if names else {}))
        found = export._candidates(whole, given.sample(), params, 2)
        return {name: model.SerializeToString(deterministic=True) for name, model, _ in found}

    first = made("fp16", "int8")
    assert list(first) == ["fp16", "int8"]
    assert made("fp16") == {"fp16": first["fp16"]}
    assert made() == {}


@pytest.mark.fault("E07")
def test_nothing_in_export_can_see_a_gpu() -> None:
    closure = grimp.build_graph("tlpipe", cache_dir=None).find_upstream_modules(
        "tlpipe.export.export"
    )
    assert "tlpipe.export.graph" in closure
    assert not closure & {"tlpipe.training.trainer", "tlpipe.training.tuning"}


@pytest.mark.fault("E07")
def test_many_classes_ship_in_eight_bits_too(family: Callable[[str], Family]) -> None:
    """The last layer stays exact: with 4,000 classes it alone would be above the bound on size."""
    given = family("timm/mobilenetv3_small_050")
    weight, bias = given.model.head[-1]
    wide = np.resize(weight, (4000, weight.shape[1])), np.resize(bias, 4000)
    whole = graph.classifier(given.backbone, given.weights, replace(given.model, head=(wide,)))
    exact = whole.SerializeToString()
    images = given.sample()
    logits = graph.compute_logits(graph.in_onnx(exact, 1), images, "")
    rows = np.arange(len(logits))
    held = HeldOut(rows, logits.argmax(axis=1), logits, np.zeros_like(rows))
    params = export.Params(calibration_images=4, max_accuracy_drop=0.99)
    made: list[bytes] = []

    def finish(model: onnx.ModelProto) -> bytes:
        made.append(model.SerializeToString())
        return made[-1]

    _, checks = export._lower_precisions(
        whole,
        exact,
        finish,
        held,
        images=images,
        fitted=images,
        threads=1,
        params=params,
    )
    assert len(made[0]) > precisions.MOST_BYTES["int8"] * len(exact)
    assert checks["int8"]["size"] < precisions.MOST_BYTES["int8"]
    assert "size" not in checks["int8"]["reason"]


def eye(truth: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.eye(3, dtype=np.float32)[truth]
    return found


def judge(exact: np.ndarray, other: np.ndarray, truth: np.ndarray, **values: object) -> Verdict:
    given = {"groups": [""] * len(truth), "size": 0.28, "max_drop": 0.01} | values
    return precisions.judge("int8", exact, other, truth, **given)  # type: ignore[arg-type]


def test_what_falls_short_is_an_error_with_its_numbers() -> None:
    truth = np.random.default_rng(0).integers(0, 3, 200)
    exact = eye(truth)
    other = exact.copy()
    other[:10] = np.roll(other[:10], 1, axis=1)
    verdict = judge(exact, other, truth, size=0.4)
    assert "accuracy on 200 held-out images differs by -0.0500 (-0.0" in verdict.reason
    assert "at least -0.01; its size without the last layer is 0.4000 of" in verdict.reason
    assert verdict.reason.endswith("fp32's, expected at most 0.35")
    assert judge(exact, exact, truth, max_drop=0.0).reason == ""
    broken = np.full_like(exact, np.nan)
    assert judge(exact, broken, truth, max_drop=0.999999).reason.startswith(
        "its logits are not finite; its accuracy on 200 held-out images differs by -1.0000"
    )


def test_a_rare_class_is_not_lost_for_nothing() -> None:
    """Of a thousand images five are of the class that eight bits no longer name."""
    truth = np.repeat([0, 1], [995, 5])
    other = eye(np.zeros_like(truth))
    verdict = judge(eye(truth), other, truth)
    assert verdict.accuracy_change["value"] == -0.005  # as a share of all: within what is allowed
    assert verdict.reason == (
        "its accuracy as a mean over classes differs by -0.5000, expected at least -0.01"
    )


def test_what_few_images_cannot_tell_is_said() -> None:
    """All of n agree: Wilson's interval rules out one per cent of changes from n = 381 on."""
    for images, can_tell in ((50, False), (380, False), (381, True)):
        truth = np.arange(images) % 3
        low = binomtest(images, images).proportion_ci(method="wilson").low
        verdict = judge(eye(truth), eye(truth), truth)
        assert verdict.agreement["low"] == pytest.approx(low)
        assert verdict.can_tell == can_tell == (low >= 0.99)
        assert verdict.reason == ""
        assert "the same answer for 100.0%" in str(verdict)
        assert ("too few images" in str(verdict)) != can_tell
    truth = np.arange(1000) % 3
    other = eye(truth)
    other[:15] = np.roll(other[:15], 1, axis=1)
    assert judge(eye(truth), other, truth, max_drop=0.03).agreement["value"] == 0.985


def test_images_of_one_group_are_drawn_together() -> None:
    """Twenty wrong copies of one photo say as much as one: the interval is as wide as one's."""
    truth = np.zeros(200, np.int64)
    exact = eye(truth)
    other = exact.copy()
    other[:20] = np.roll(other[:20], 1, axis=1)
    alone = judge(exact, other, truth).accuracy_change
    copies = [f"photo {i // 20}" for i in range(200)]
    together = judge(exact, other, truth, groups=copies).accuracy_change
    assert alone["value"] == together["value"] == pytest.approx(-0.1)
    for change, wrong, images in ((alone, 20, 200), (together, 1, 10)):
        # Newcombe (1998), without correlation: Wilson's intervals of what was lost and of nothing.
        lost, gained = (
            binomtest(count, images).proportion_ci(method="wilson") for count in (wrong, 0)
        )
        low = -0.1 - np.hypot(lost.high - 0.1, gained.low)
        high = -0.1 + np.hypot(0.1 - lost.low, gained.high)
        assert (change["low"], change["high"]) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.fault("E07")
def test_last_bits_do_not_decide() -> None:
    """Images between two classes count in part, so that a last bit moves no image as a whole."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 400)
    exact = random.normal(0, 1, (400, 3)).astype(np.float32)
    exact[:200] = np.float32(1)  # every class is as good
    here, there = exact.copy(), exact.copy()
    here[np.arange(200), truth[:200]] += 1e-6
    there[np.arange(200), truth[:200]] -= 1e-6
    counted = [(logits.argmax(axis=1) == truth).mean() for logits in (here, there)]
    assert counted[0] - counted[1] > 0.4
    judged = [judge(exact, logits, truth).accuracy_change["value"] for logits in (here, there)]
    assert judged[0] == pytest.approx(judged[1], abs=1e-4)
    assert judged[0] == pytest.approx(0, abs=1e-4)


def test_a_hit_is_whole_outside_of_a_tie() -> None:
    logits = np.array([[2, 0, 0], [0, 2, 0], [1, 1, 0], [1.05, 1, 0], [0.9, 1, 0]], np.float32)
    found = precisions.hits(logits, np.zeros(5, np.int64), 0.1)
    assert found == pytest.approx([1, 0, 0.5, 0.75, 0], abs=1e-6)
    assert precisions.hits(np.ones((1, 2), np.float32), np.zeros(1, np.int64), 0.0) == 0.5


def test_fold_heads_answer_for_their_own_fold() -> None:
    taken = np.array([[1, 0], [0, 1], [2, 2]], np.float32)
    first = (np.array([[1, 2], [3, 4]], np.float32), np.array([0, 10], np.float32))
    second = (np.array([[5, 6], [7, 8]], np.float32), np.array([1, 1], np.float32))
    folds, nothing = np.array([0, 1, 1]), np.zeros((3, 2), np.float32)
    held = HeldOut(np.arange(3), np.zeros(3, np.int64), nothing, folds, [first, second])
    found = precisions.out_of_fold_logits(held, taken, None)
    assert found.tolist() == [[1, 13], [7, 9], [23, 31]]
    doubled = precisions.out_of_fold_logits(held, taken, lambda w, b: (2 * w, b))
    assert doubled.tolist() == [[2, 16], [13, 17], [45, 61]]


@pytest.mark.slow
def test_a_lower_precision_is_checked_by_heads_that_have_not_seen_the_images(
    artifacts: Path, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    """Heads of the folds that name every class wrong: the shipped head itself would pass."""
    given = tmp_path / "artifacts"
    shutil.copytree(artifacts / "train/model", given / "train/model")
    for name in ("ingest", "split"):
        (given / name).symlink_to(artifacts / name)
    path = given / "train/model/held_out.safetensors"
    held = held_out.load(path)
    wrong = [(np.roll(weight, 1, axis=0), np.roll(bias, 1)) for weight, bias in held.heads]
    held_out.save(path, replace(held, heads=wrong))
    few = {"calibration_images": 16, "parity_images": 32}
    folder = run_export(given, tmp_path / "out", cache_env, precisions=["int8"], **few)
    (verdict,) = verdicts(folder).values()
    assert verdict["accuracy_change"]["value"] < -0.7
    assert "its accuracy on 203 held-out images differs by -0." in verdict["reason"]
    assert set(bundle.load(folder / "bundle").graphs) == {"fp32", "any-size"}


@pytest.mark.fault("E08")
def test_the_shipped_graph_answers_as_fp32_does(every_precision: Path, artifacts: Path) -> None:
    """Through export's own way: with its temperature, checked, on real images."""
    shipped = bundle.load(every_precision / "bundle")
    half = onnx.load(shipped.graphs["fp16"])
    onnx.checker.check_model(half, full_check=True)
    sizes = [shipped.graphs[name].stat().st_size for name in ("fp16", "fp32")]
    assert 0.5 < sizes[0] / sizes[1] < MOST_BYTES["fp16"]
    images = np.ascontiguousarray(
        crop_middle(pixels.load(artifacts / "ingest/pixels").array[:32], 224)
    )
    (found, probabilities), (expected, wanted) = (
        open_session(shipped.graphs[name], threads=2).run(
            ["logits", "probabilities"], {"images": images}
        )
        for name in ("fp16", "fp32")
    )
    assert found.dtype == probabilities.dtype == np.float32
    # 11 bits of mantissa in some fifty layers.
    assert np.abs(found - expected).max() < 0.03 * expected.std()
    assert np.abs(probabilities - wanted).max() < 0.02
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(32), abs=1e-5)


@pytest.mark.fault("E08")
def test_normalisation_last_layer_and_temperature_stay_fp32(every_precision: Path) -> None:
    half = onnx.load(bundle.load(every_precision / "bundle").graphs["fp16"])
    types = {t.name: t.data_type for t in half.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(half, strict_mode=True).graph
    typed = [*inferred.value_info, *inferred.output]
    types |= {value.name: value.type.tensor_type.elem_type for value in typed}
    kinds = {
        (node.op_type, types[name])
        for node in half.graph.node
        for name in node.output
        if node.op_type in ("Conv", "Gemm", "Sub", "Div", "Softmax", "ReduceMean")
    }
    full, sixteen = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    exact = {(kind, full) for kind in ("Gemm", "Sub", "Div", "Softmax", "ReduceMean")}
    assert kinds == exact | {("Conv", sixteen)}
    assert types["temperature"] == types["head.0.weight"] == full


# A LayerNormalization as exporters take it apart; the features reach thousands.
NORMALISED = """<ir_version: 10, opset_import: ["" : 20]>
normalised (uint8[batch, 16] images) => (float[batch, 4] logits, float[batch, 4] probabilities)
<float gain = {GAIN}, float two = {2.0}, float small = {0.00001}, float temperature = {1.0}> {
    bytes = Cast <to = 1> (images)
    raised = Mul (bytes, gain)
    features = MatMul (raised, mixing)
    mean = ReduceMean <axes_as_input = 0> (features, axes)
    centred = Sub (features, mean)
    SQUARE
    variance = ReduceMean (squares, axes)
    above = Add (variance, small)
    deviation = Sqrt (above)
    normal = Div (centred, deviation)
    scaled = Mul (normal, gamma)
    shifted = Add (scaled, beta)
    hidden = MatMul (shifted, between)
    logits = Gemm <transB = 1> (hidden, weight, bias)
    tempered = Div (logits, temperature)
    probabilities = Softmax <axis = -1> (tempered)
}"""


def normalised(gain: float, square: str) -> onnx.ModelProto:
    text = NORMALISED.replace("GAIN", str(gain)).replace("SQUARE", square)
    model = parser.parse_model(text.replace(" <axes_as_input = 0>", ""))
    random = np.random.default_rng(0)
    for name, array in {
        "axes": np.array([-1]),
        "mixing": np.eye(16, dtype=np.float32),
        "gamma": random.uniform(0.5, 2, 16).astype(np.float32),
        "beta": random.normal(0, 0.1, 16).astype(np.float32),
        "between": random.normal(0, 0.5, (16, 8)).astype(np.float32),
        "weight": random.normal(0, 0.5, (4, 8)).astype(np.float32),
        "bias": np.zeros(4, np.float32),
    }.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


class Rows:
    """Images (N, 16), where a sample has squares of pixels."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def batches(self, size: int) -> list[np.ndarray]:
        return [self.images[i : i + size] for i in range(0, len(self.images), size)]


@pytest.mark.fault("E08")
@pytest.mark.parametrize(
    "square", ["Pow (centred, two)", "Mul (centred, centred)", "Mul (features, features)"]
)
@pytest.mark.parametrize(("gain", "dimmed"), [(10.0, 64), (400.0, 1)])
def test_a_normalisation_does_not_overflow(gain: float, dimmed: int, square: str) -> None:
    """Run by ONNX's own reference, which computes every fp16 node in fp16.

    At a gain of 10 features reach 2550 and their squares 6.5 million; the sample is so dim that
    nothing in it exceeds fp16. At 400 the features themselves do.
    """
    exact = normalised(gain, f"squares = {square}")
    images = np.random.default_rng(1).integers(0, 256, (8, 16), np.uint8)
    sample = Rows(images // dimmed)
    half = onnx.load_from_string(
        graph.finished(precisions.to_fp16(exact, sample, 2), 1.5, {})  # type: ignore[arg-type]
    )
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds.values()
    expected, wanted = ReferenceEvaluator(
        onnx.load_from_string(graph.finished(exact, 1.5, {}))
    ).run(None, {"images": images})
    found, probabilities = ReferenceEvaluator(half).run(None, {"images": images})
    assert np.abs(found - expected).max() < 0.005 * expected.std()
    assert np.abs(probabilities - wanted).max() < 0.005


@pytest.mark.fault("E08")
def test_results_beyond_fp16_stay_fp32_in_any_node() -> None:
    """A ReLU network whose sums reach 200,000 between two layers; ONNX Runtime's CPU hides it."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    wide (uint8[batch, 16] images) => (float[batch, 4] logits)
    <float temperature = {1.0}> {
        bytes = Cast <to = 1> (images)
        sums = MatMul (bytes, first)
        kept = Relu (sums)
        small = MatMul (kept, second)
        positive = Relu (small)
        more = MatMul (positive, third)
        logits = Gemm (more, weight)
    }"""
    model = parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, scale, shape in (
        ("first", 100, (16, 16)),
        ("second", 1e-4, (16, 16)),
        ("third", 1.0, (16, 8)),
        ("weight", 1.0, (8, 4)),
    ):
        array = random.normal(0, scale, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "temperature"))
    images = random.integers(0, 256, (8, 16), np.uint8)
    half = precisions.to_fp16(model, Rows(images), 2)  # type: ignore[arg-type]
    onnx.checker.check_model(half, full_check=True)
    types = {t.name: t.data_type for t in half.graph.initializer}
    assert types["first"] == onnx.TensorProto.FLOAT
    assert {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16} == {
        "third.float16"
    }
    (expected,) = ReferenceEvaluator(model).run(["logits"], {"images": images})
    (found,) = ReferenceEvaluator(half).run(["logits"], {"images": images})
    assert np.abs(found - expected).max() < 0.005 * expected.std()
    by_runtime = open_session(half.SerializeToString(), threads=1, device="cpu")
    assert by_runtime.run(["logits"], {"images": images})[0] == pytest.approx(
        found, rel=0.01, abs=0.01
    )


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
    path = bundle.load(every_precision / "bundle").graphs["int8"]
    assert assert_cannot_saturate(onnx.load(path)) >= 40
    precisions.check_no_saturation(path.read_bytes())


@pytest.fixture(scope="session")
def resnet(family: Callable[[str], Family]) -> Family:
    return family("resnet18")


@pytest.fixture(scope="session")
def rounded(resnet: Family) -> onnx.ModelProto:
    """ResNet-18 in eight bits, made of the first 24 of 32 images."""
    return precisions.to_int8(resnet.graph, resnet.sample(24), 2, calibration_images=24)[0]


@pytest.mark.fault("E06")
def test_no_convolution_of_another_network_can_saturate(rounded: onnx.ModelProto) -> None:
    assert assert_cannot_saturate(rounded) == 19  # of 20; the first one holds next to no weights
    copy = onnx.ModelProto()
    copy.CopyFrom(rounded)
    precisions.check_no_saturation(graph.finished(copy, 1.0, {}))


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
        assert precisions.largest_pair(weight, 0) <= 128


@pytest.mark.slow
@pytest.mark.fault("E06")
def test_no_matrix_of_a_transformer_can_saturate(family: Callable[[str], Family]) -> None:
    given = family("timm/vit_tiny_patch16_224")
    model, _ = precisions.to_int8(given.graph, given.sample(8), 2, calibration_images=8)
    assert assert_cannot_saturate(model) == 49
    assert {node.op_type for node, _, _ in layers(model)} == {"Conv", "MatMul"}
    precisions.check_no_saturation(graph.finished(model, 1.0, {}))


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
    found: np.ndarray = np.clip(pairs, -32768, 32767).sum(axis=1)
    return found


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
            precisions.check_no_saturation(content)
        else:
            with pytest.raises(
                ParityError,
                match=r"without VNNI: the layer the layer has int8 weights, two of which sum to "
                r"129 in one channel, with zero points up to 0; expected int8, at most 128 and 0",
            ):
                precisions.check_no_saturation(content)
    unsigned = one_layer(np.zeros((8, 3), np.uint8), 128)
    with pytest.raises(ParityError, match=r"has uint8 weights, .* zero points up to 128"):
        precisions.check_no_saturation(unsigned.SerializeToString())


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
        precisions.check_no_saturation(broken.SerializeToString())


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
    """The first activation's range is the mean, over batches of 8, of what 64 images give it."""
    shipped = bundle.load(every_precision / "bundle")
    rows = [
        row
        for row, image in enumerate(load_split(artifacts / "split/split.csv"))
        if image.split == "train"
    ]
    chosen = [rows[int(i * len(rows) / 128)] for i in range(128)][::2]
    stored = pixels.load(artifacts / "ingest/pixels").array[chosen]
    images = np.ascontiguousarray(crop_middle(stored, 224))
    rounded, exact = onnx.load(shipped.graphs["int8"]), onnx.load(shipped.model)
    first = next(node for node in rounded.graph.node if node.op_type == "QuantizeLinear")
    tensors = {t.name: numpy_helper.to_array(t) for t in rounded.graph.initializer}
    value = helper.make_tensor_value_info(first.input[0], onnx.TensorProto.FLOAT, None)
    assert first.input[0] in {name for node in exact.graph.node for name in node.output}
    exact.graph.output.append(value)
    session = open_session(exact.SerializeToString(), threads=2, device="cpu")
    batches = [
        session.run([first.input[0]], {"images": images[i : i + 8]})[0] for i in range(0, 64, 8)
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
        graph.in_onnx(content.SerializeToString(), 2)(resnet.images[24:])
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
        graph.in_onnx(m.SerializeToString(), 2)(resnet.images[:24]) for m in (exact, rounded, plain)
    )
    assert abs(fitted - expected).mean() < 0.7 * abs(unfitted - expected).mean()


@pytest.mark.slow
def test_a_head_with_hidden_units_is_rounded_but_for_its_last_layer(
    family: Callable[[str], Family],
) -> None:
    given = family("timm/test_resnet")
    random = np.random.default_rng(0)
    ((weight, _),) = given.model.head
    hidden = random.normal(0, 0.05, (64, weight.shape[1])).astype(np.float32)
    last = random.normal(0, 0.3, (5, 64)).astype(np.float32)
    zeros = np.zeros(64, np.float32), np.zeros(5, np.float32)
    model = frozen_model(given.backbone, (hidden, zeros[0]), (last, zeros[1]))
    exact = graph.classifier(given.backbone, given.weights, model)
    rounded, _ = precisions.to_int8(exact, given.sample(24), 2, calibration_images=24)
    names = {node.name for node, _, _ in layers(rounded)}
    assert "head.0" in names
    assert "head.1" not in names
    assert_cannot_saturate(rounded)
    expected, found = (
        graph.in_onnx(m.SerializeToString(), 2)(given.images[24:]) for m in (exact, rounded)
    )
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.97
