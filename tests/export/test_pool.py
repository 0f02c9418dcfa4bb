"""Weights of a linear opinion pool, and its graph, against NumPy, SciPy, Pillow and the members."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from tests.export.conftest import CLASSES, Family
from tlpipe.data.images import Preprocessing, Sampling
from tlpipe.errors import ArtifactError, ParityError
from tlpipe.export import graph, pool
from tlpipe.export.graph import Sample
from tlpipe.export.pool import Member

Answers = tuple[np.ndarray, np.ndarray]


def drawn(members: int, images: int, seed: int = 0) -> Answers:
    """Return log probabilities (M, N, C) that err on other images, and the truth (N,)."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, CLASSES, images)
    logits = random.normal(size=(members, images, CLASSES))
    sharpness = np.linspace(1, 1.5, members)[:, None]
    logits[:, np.arange(images), truth] += sharpness + random.normal(size=(members, images))
    return log_softmax(logits, axis=2), truth


def loss(weights: np.ndarray, answers: np.ndarray, truth: np.ndarray) -> float:
    likely = np.exp(answers[:, np.arange(len(truth)), truth])
    return float(-np.log(weights @ likely).mean())


@pytest.mark.parametrize("members", [2, 3, 6])
def test_weights_are_those_of_a_constrained_solver(members: int) -> None:
    answers, truth = drawn(members, 300)
    found = pool.solve_weights(answers, truth)
    expected = minimize(
        lambda w: loss(w, answers, truth),
        np.full(members, 1 / members),
        method="SLSQP",
        bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)
    assert loss(found, answers, truth) <= expected.fun + 1e-9
    np.testing.assert_allclose(found, expected.x, atol=1e-3)


def test_what_only_errs_gets_no_weight_and_twins_share_theirs() -> None:
    answers, truth = drawn(2, 200)
    wrong = np.full_like(answers[0], np.log(0.0001))
    wrong[np.arange(200), (truth + 1) % CLASSES] = np.log(1 - 0.0004)
    weights = pool.solve_weights(np.stack([*answers, wrong, answers[1]]), truth)
    assert weights[2] == 0
    assert weights[1] == pytest.approx(weights[3], abs=1e-6)
    # A member that has never heard of any true class leaves a loss that is a number.
    never = np.full_like(answers, -800.0)
    assert np.isfinite(pool.solve_weights(never, truth)).all()


def test_rounded_weights_sum_to_one() -> None:
    np.testing.assert_array_equal(pool.rounded(np.full(3, 1 / 3)), [0.334, 0.333, 0.333])
    np.testing.assert_array_equal(pool.rounded(np.array([0.9996, 0.0004])), [1, 0])
    np.testing.assert_array_equal(pool.rounded(np.array([0.25, 0.75])), [0.25, 0.75])


def test_an_image_is_answered_by_weights_that_its_group_has_not_fitted() -> None:
    answers, truth = drawn(2, 60)
    groups = [f"g{number // 3}" for number in range(60)]
    before = pool.cross_fit(answers, truth, groups)
    # Whatever the members say of one group changes what is said of others, not of itself.
    changed = answers.copy()
    changed[0, :3], changed[1, :3] = answers[1, :3], answers[0, :3]
    after = pool.cross_fit(changed, truth, groups)
    inside = np.array([group == "g0" for group in groups])

    def weight(pooled: np.ndarray, given: np.ndarray) -> np.ndarray:
        first, second = np.exp(given)
        widest = np.arange(60), np.abs(first - second).argmax(axis=1)
        found: np.ndarray = ((np.exp(pooled) - second) / (first - second))[widest]
        return found

    moved = np.abs(weight(after, changed) - weight(before, answers))
    assert moved[inside].max() < 1e-9
    assert moved[~inside].max() > 1e-3
    found = weight(before, answers)
    assert len(np.unique(found.round(6))) == pool.FOLDS
    assert all(np.ptp(found[3 * n : 3 * n + 3]) < 1e-9 for n in range(20))


def tiny(seed: int, side: int, *, opset: int = 20) -> onnx.ModelProto:
    """A classifier: the mean of each channel, times random weights."""
    weight = np.random.default_rng(seed).normal(size=(CLASSES, 3)).astype(np.float32) / 20
    text = f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    tiny (uint8[batch, {side}, {side}, 3] images) => (float[batch, {CLASSES}] logits)
    <int64[2] axes = {{1, 2}}, float temperature = {{1.0}}>
    {{
      numbers = Cast <to = 1> (images)
      means = ReduceMean <keepdims = 0> (numbers, axes)
      logits = Gemm <transB = 1> (means, weight, bias)
    }}
    """
    model = onnx.parser.parse_model(text)
    for name, array in (("weight", weight), ("bias", np.zeros(CLASSES, np.float32))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def sees(short: int, crop: int, interpolation: str = "bilinear") -> Preprocessing:
    return Preprocessing(
        short_side_px=short,
        interpolation=interpolation,  # type: ignore[arg-type]
        crop_px=crop,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def stored(side: int) -> Sampling:
    return Sampling(short_side_px=side, interpolation="bilinear")


def pictures(count: int, side: int) -> np.ndarray:
    """Smooth pictures: of noise, one grey level more or less would count."""
    random = np.random.default_rng(3)
    coarse = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    grown = [np.asarray(Image.fromarray(one).resize((side, side), 2)) for one in coarse]
    return np.stack(grown)


def sample_of(images: np.ndarray, crop: int) -> Sample:
    n = len(images)
    return Sample(images, crop, range(n), np.zeros(n, np.int64), [""] * n)  # type: ignore[arg-type]


def viewed(images: np.ndarray, member: Preprocessing) -> np.ndarray:
    """Return the middle of squares that Pillow has resized."""
    side, crop = member.short_side_px, member.crop_px
    method = Image.Resampling[member.interpolation.upper()]
    resized = np.stack(
        [np.asarray(Image.fromarray(i).resize((side, side), method)) for i in images]
    )
    start = (side - crop) // 2
    return np.ascontiguousarray(resized[:, start : start + crop, start : start + crop])


def logits_of(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: np.ndarray = session.run(["logits"], {"images": images})[0]
    return found


def test_each_member_sees_its_own_crop_of_its_own_size() -> None:
    views = [sees(48, 40), sees(32, 28, "bicubic"), sees(48, 48)]
    members = [
        Member(tiny(number, view.crop_px), temperature, view)
        for number, (view, temperature) in enumerate(zip(views, (1.0, 0.5, 2.0), strict=True))
    ]
    common = pool.common_preprocessing(views, stored(48))
    assert (common.short_side_px, common.crop_px) == (48, 48)
    weights = np.array([0.5, 0.3, 0.2])
    content = graph.finished(pool.merged(members, weights, common), 1.5, {})
    images = pictures(6, 48)
    session = onnxruntime.InferenceSession(content)
    logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
    answers = np.stack(
        [
            log_softmax(logits_of(one.graph, viewed(images, view)) / one.temperature, axis=1)
            for one, view in zip(members, views, strict=True)
        ]
    )
    expected = logsumexp(answers, axis=0, b=weights[:, None, None])
    np.testing.assert_allclose(logits, expected, atol=1e-2)  # a grey level here and there
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.log(probabilities), log_softmax(logits / 1.5, axis=1), atol=1e-5)
    assert pool.check_pool(
        content, members, weights, common, sample_of(images, 48), 1e-4, 1
    ).same_top1 == len(images)
    # Held against other weights, or a member that takes another part of the image, it differs.
    with pytest.raises(ParityError, match="the ensemble's graph differs from its members: logits"):
        pool.check_pool(content, members, weights[::-1], common, sample_of(images, 48), 1e-4, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_borders_are_resized_as_pillow_resizes_them(interpolation: str) -> None:
    """Where a crop is the whole square, as it is of an ensemble; edges are sharp there."""
    view = sees(48, 48, interpolation)
    images = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)
    images = np.where(images > 127, 255, 0).astype(np.uint8)
    model = tiny(0, 48)
    content = graph.with_any_size(model, view).SerializeToString()
    exact = graph.in_onnx(model.SerializeToString(), 1)
    graph.check_any_size(content, exact, sample_of(images, 48), view, tolerance=1e-3, threads=1)


def test_equal_views_are_taken_as_they_are_and_equal_tensors_are_kept_once() -> None:
    view = sees(48, 40)
    same = tiny(0, 40)
    members = [Member(same, 1.0, view), Member(same, 2.0, view)]
    common = pool.common_preprocessing([view, view], stored(48))
    assert common.crop_px == 40
    model = pool.merged(members, np.array([0.5, 0.5]), common)
    assert "Resize" not in {node.op_type for node in model.graph.node}
    weights = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [CLASSES, 3]]
    assert len(weights) == 1
    # All but the two temperatures and what follows is one, and answers as the members do alone.
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds["ReduceMean"], kinds["Gemm"], kinds["LogSoftmax"]) == (1, 1, 2)
    images = pictures(4, 40)
    alone = [pool.log_softmax(logits_of(same, images), divisor) for divisor in (1.0, 2.0)]
    expected = pool.mix(np.stack(alone), np.array([0.5, 0.5]))
    np.testing.assert_allclose(logits_of(model, images), expected, atol=1e-5)
    apart = pool.merged(members, np.array([0.5, 0.5]), common, is_joined=False)
    assert Counter(node.op_type for node in apart.graph.node)["Gemm"] == 2
    larger = pool.common_preprocessing([view, view], stored(64))
    assert larger.crop_px == 64
    model = pool.merged(members, np.array([0.5, 0.5]), larger)
    assert [node.op_type for node in model.graph.node].count("Resize") == 1


def test_a_graph_of_another_opset_is_one_line() -> None:
    view = sees(48, 40)
    members = [Member(tiny(0, 40), 1.0, view), Member(tiny(1, 40, opset=18), 1.0, view)]
    with pytest.raises(ArtifactError, match="member 2 has a graph of opset 18; expected 20"):
        pool.merged(members, np.array([0.5, 0.5]), view)


@pytest.mark.slow
def test_vgg_inception_and_resnet_answer_as_one(family: Callable[[str], Family]) -> None:
    """Each on its own size: 224 of 256 for two of them, 299 of 342 for Inception."""
    names = ("vgg11_bn", "inception_v3", "resnet18")
    families = [family(name) for name in names]
    members = [Member(one.graph, 1.0, one.backbone.preprocessing) for one in families]
    views = [member.preprocessing for member in members]
    assert [view.crop_px for view in views] == [224, 299, 224]
    common = pool.common_preprocessing(views, stored(342))
    weights = np.array([0.2, 0.3, 0.5])
    content = graph.finished(pool.merged(members, weights, common), 1.0, {})
    images = pictures(4, 342)
    parity = pool.check_pool(content, members, weights, common, sample_of(images, 342), 1e-4, 2)
    assert parity.images == parity.same_top1 == 4
    answers = np.stack(
        [
            log_softmax(logits_of(one.graph, viewed(images, view)), axis=1)
            for one, view in zip(members, views, strict=True)
        ]
    )
    expected = logsumexp(answers, axis=0, b=weights[:, None, None])
    session = onnxruntime.InferenceSession(content)
    found = session.run(["logits"], {"images": images})[0]
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=0.05)
