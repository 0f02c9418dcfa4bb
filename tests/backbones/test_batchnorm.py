import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from tests.training import tiny
from tests.training.test_trainer import build_network
from tlpipe.backbones.batchnorm import folded


@pytest.mark.parametrize(
    "name", ["resnet18", "timm/efficientnet_lite0", "timm/tf_mobilenetv3_small_minimal_100"]
)
def test_a_copy_normalises_by_its_convolutions_and_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for statistic in tiny.statistics(layer):
                statistic.uniform_(0.5, 1.5)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    merged = folded(network, torch.randn(2, 3, 64, 64))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in merged.modules())
    with torch.no_grad():
        expected, found = network(images), merged(images)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


class Shared(nn.Module):
    """What the convolution gives is also added to what its normalisation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 3, 1), BatchNormAct2d(3)
        for statistic in tiny.statistics(self.norm):
            statistic.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        given = self.layer(x)
        result: Tensor = given + self.norm(given)
        return result


class Stages(nn.Module):
    """Gives what each part makes; only what the second makes is more than a norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.second = Shared()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.second(first)


def test_each_of_several_results_must_stay_the_same() -> None:
    torch.manual_seed(0)
    stages = Stages().eval()
    assert folded(stages, torch.randn(2, 3, 8, 8)) is stages


def test_where_there_is_nothing_to_fold_nothing_is_copied() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU()).eval()
    assert folded(network, torch.randn(1, 3, 8, 8)) is network


@pytest.mark.parametrize("norm", [{"affine": False}, {"track_running_stats": False}])
def test_norms_without_weights_or_without_statistics_give_the_same(norm: dict[str, bool]) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, **norm), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
    network = nn.Sequential(*layers).eval()
    images = torch.randn(2, 3, 8, 8)
    merged = folded(network, images)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in list(merged.modules())[3:])
    with torch.no_grad():
        assert torch.allclose(merged(images), network(images), atol=1e-6)


def test_where_a_fold_would_give_something_else_the_module_stays() -> None:
    torch.manual_seed(0)
    network = Shared().eval()
    assert folded(network, torch.randn(2, 3, 8, 8)) is network
