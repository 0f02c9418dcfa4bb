"""Every family of backbones becomes a graph that answers as torch does; weights are random."""

from collections.abc import Callable

import pytest

from tests.backbones.test_stages import FAMILIES
from tests.export.conftest import Family, opened
from tlpipe.export import fp16, graph, parity

# The same architectures, in timm, as those of torchvision above.
TWINS = (
    *("timm/convnext_atto", "timm/regnety_002", "timm/resnet18"),
    "timm/swin_tiny_patch4_window7_224",
)
# Residual convolutions, channels split and shuffled, attention.
REPRESENTATIVE = ("resnet18", "shufflenet_v2_x0_5", "timm/vit_tiny_patch16_224")
NAMES = [
    pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.slow)
    for name in FAMILIES
    if name not in TWINS
]


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_graph_answers_as_torch_does(
    name: str, family: Callable[[str], Family]
) -> None:
    """Logits are scaled to a spread of one, so that a difference means something.

    Half precision keeps 11 bits, so that logits may differ by some thousandths of their spread.
    """
    given = family(name)
    few = given.images[:4]
    expected = parity.in_torch(given.model, given.backbone, given.weights)(few)
    assert expected.std() > 0.2
    exact = given.graph
    found = parity.in_onnx(graph.finished(exact, 1.0, {}), threads=2)(few)
    parity.check(parity.compare(expected, found), 1e-4)
    # Random weights let next to nothing through some networks, less than fp16 has numbers for.
    is_seen = abs(parity.features(exact, given.sample(4), 2)).max() > 1e-3
    assert is_seen or name not in REPRESENTATIVE
    if is_seen:
        half = graph.finished(fp16.to_fp16(exact, given.sample(4), 2), 1.0, {})
        assert abs(parity.in_onnx(half, threads=2)(few) - expected).max() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_trained_stages_are_merged_behind_the_frozen_ones(
    name: str, family: Callable[[str], Family]
) -> None:
    """Stages open behind a boundary have names of their own, and weights other than pretrained."""
    given = family(name)
    few = given.images[:4]
    model = opened(given, 2)
    expected = parity.in_torch(model, given.backbone, given.weights)(few)
    pretrained = parity.in_torch(given.model, given.backbone, given.weights)(few)
    assert abs(expected - pretrained).max() > 0.01
    whole = graph.classifier(given.backbone, given.weights, model)
    found = parity.in_onnx(graph.finished(whole, 1.0, {}), threads=2)(few)
    parity.check(parity.compare(expected, found), 1e-4)
