"""Every family of backbones becomes a graph that answers as torch does; weights are random."""

from collections.abc import Callable

import pytest

from tests.backbones.test_stages import FAMILIES
from tests.export.conftest import Family, opened
from tlpipe.export import graph, precisions

# Residual convolutions, channels split and shuffled, attention.
REPRESENTATIVE = ("resnet18", "shufflenet_v2_x0_5", "timm/vit_tiny_patch16_224")
# Parallel blocks, windows of tokens, LayerNorm behind channels, attention without softmax,
# depthwise convolutions and gates, branches of BatchNorm alone.
DISTINCT = (
    *("googlenet", "swin_t", "timm/test_convnext", "timm/efficientvit_b0"),
    *("timm/mobilenetv3_small_050", "timm/repvgg_a0"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Export the families whose graphs are of different operators, or all that are asked for.

    An export takes up to a minute; all families are a quarter of an hour of two cores.
    """
    every = metafunc.config.getoption("--every-family")
    slow = [name for name in (FAMILIES if every else DISTINCT) if name not in REPRESENTATIVE]
    names = [*REPRESENTATIVE, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]
    metafunc.parametrize("name", names)


def test_the_exported_graph_answers_as_torch_does(
    name: str, family: Callable[[str], Family]
) -> None:
    """Logits are scaled to a spread of one, so that a difference means something.

    Half precision keeps 11 bits, so that logits may differ by some thousandths of their spread.
    """
    given = family(name)
    few = given.images[:4]
    expected = graph.in_torch(given.model, given.backbone, given.weights)(few)
    assert expected.std() > 0.2
    exact = given.graph
    found = graph.in_onnx(graph.finished(exact, 1.0, {}), threads=2)(few)
    graph.check_parity(graph.measure_parity(expected, found), 1e-4)
    # Random weights let next to nothing through some networks, less than fp16 has numbers for.
    is_seen = abs(graph.compute_features(exact, given.sample(4), 2)).max() > 1e-3
    assert is_seen or name not in REPRESENTATIVE
    if is_seen:
        half = graph.finished(precisions.to_fp16(exact, given.sample(4), 2), 1.0, {})
        assert abs(graph.in_onnx(half, threads=2)(few) - expected).max() < 0.05


def test_trained_stages_are_merged_behind_the_frozen_ones(
    name: str, family: Callable[[str], Family]
) -> None:
    """Stages open behind a boundary have names of their own, and weights other than pretrained."""
    given = family(name)
    few = given.images[:4]
    model = opened(given, 2)
    expected = graph.in_torch(model, given.backbone, given.weights)(few)
    pretrained = graph.in_torch(given.model, given.backbone, given.weights)(few)
    assert abs(expected - pretrained).max() > 0.01
    whole = graph.classifier(given.backbone, given.weights, model)
    found = graph.in_onnx(graph.finished(whole, 1.0, {}), threads=2)(few)
    graph.check_parity(graph.measure_parity(expected, found), 1e-4)
