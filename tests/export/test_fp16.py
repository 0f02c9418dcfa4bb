"""Half precision: the file that ships is checked and run, and nothing in it overflows."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from tlpipe.data import pixels as packed
from tlpipe.data.images import crop_middle
from tlpipe.export import bundle as bundles
from tlpipe.export import fp16, graph, parity
from tlpipe.export.precisions import MOST_BYTES
from tlpipe.runtime import open_session


@pytest.mark.fault("E08")
def test_the_shipped_graph_answers_as_fp32_does(every_precision: Path, artifacts: Path) -> None:
    """Through export's own way: with its temperature, checked, on real images."""
    shipped = bundles.load(every_precision / "bundle")
    half = onnx.load(shipped.graphs["fp16"])
    onnx.checker.check_model(half, full_check=True)
    sizes = [shipped.graphs[name].stat().st_size for name in ("fp16", "fp32")]
    assert 0.5 < sizes[0] / sizes[1] < MOST_BYTES["fp16"]
    images = np.ascontiguousarray(
        crop_middle(packed.load(artifacts / "ingest/pixels").array[:32], 224)
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
    half = onnx.load(bundles.load(every_precision / "bundle").graphs["fp16"])
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
        graph.finished(fp16.to_fp16(exact, sample, 2), 1.5, {})  # type: ignore[arg-type]
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
    half = fp16.to_fp16(model, Rows(images), 2)  # type: ignore[arg-type]
    onnx.checker.check_model(half, full_check=True)
    types = {t.name: t.data_type for t in half.graph.initializer}
    assert types["first"] == onnx.TensorProto.FLOAT
    assert {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16} == {
        "third.float16"
    }
    (expected,) = ReferenceEvaluator(model).run(["logits"], {"images": images})
    (found,) = ReferenceEvaluator(half).run(["logits"], {"images": images})
    assert np.abs(found - expected).max() < 0.005 * expected.std()
    by_runtime = parity.open_session(half.SerializeToString(), threads=1, device="cpu")
    assert by_runtime.run(["logits"], {"images": images})[0] == pytest.approx(
        found, rel=0.01, abs=0.01
    )
