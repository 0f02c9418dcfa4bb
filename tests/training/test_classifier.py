import pytest
import torch
import torchvision
from timm.layers import Conv2dSame

from tests.training import tiny
from tests.training.test_trainer import build_network
from tlpipe.backbones.stages import cut
from tlpipe.training import classifier


def small_vgg() -> torch.nn.Sequential:
    """As torchvision's, whose convolutions have biases; with little behind them."""
    layers = torchvision.models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True)
    return torch.nn.Sequential(layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


# How many BatchNorm layers, and how many follow right behind a convolution.
LAYERS = {
    "timm/tf_efficientnet_lite0": (49, 49),
    "resnet18": (20, 20),
    "densenet121": (121, 59),
    "vgg": (3, 3),
    "regnet_y_400mf": (53, 53),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folded_layers_give_the_same_and_learn_the_same(name: str) -> None:
    torch.manual_seed(0)
    stages = small_vgg() if name == "vgg" else cut(build_network(name), 64)
    stages.double().eval()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for module in stages.modules():  # statistics of their own, not zero and one
        if isinstance(module, torch.nn.BatchNorm2d):
            mean, variance = tiny.statistics(module)
            mean.normal_(0, 0.1)
            variance.uniform_(0.5, 2)
    names, weights = list(stages.state_dict()), torch.randn(1, dtype=torch.float64)

    def learned() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        stages.zero_grad()
        result = stages(images)
        (result * weights).sum().backward()
        return result.detach(), {n: tiny.gradient(p) for n, p in stages.named_parameters()}

    expected, gradients = learned()
    layers = sum(isinstance(m, torch.nn.BatchNorm2d) for m in stages.modules())
    folded = classifier.fold_batch_norms(stages, images[:2])
    assert (layers, folded) == LAYERS[name]
    # Seen upside down, which is faster than padding in a step of its own.
    assert len(stages._forward_pre_hooks) == name.startswith("timm/tf_")
    assert list(stages.state_dict()) == names
    found, others = learned()
    assert torch.allclose(found, expected, rtol=1e-9)
    for n, gradient in gradients.items():
        near = 1e-9 * float(gradient.abs().max())
        assert torch.allclose(others[n], gradient, rtol=1e-7, atol=near), n


def test_folded_layers_compile_in_one_graph() -> None:
    torch.manual_seed(0)
    stages = cut(build_network("resnet18"), 64)
    images = torch.randn(2, 3, 64, 64)
    assert classifier.fold_batch_norms(stages, images) > 0
    compiled = torch.compile(stages, fullgraph=True, backend="aot_eager")
    weight = next(stages.parameters())
    gradients = []
    for network in (stages, compiled):
        stages.zero_grad()
        network(images).square().sum().backward()
        gradients.append(tiny.gradient(weight))
    eager, traced = gradients
    assert torch.allclose(eager, traced, rtol=1e-3, atol=1e-4 * float(eager.abs().max()))


def test_what_cannot_be_seen_upside_down_is_folded_as_it_stands() -> None:
    """Where places differ, as under a position embedding, turned pictures give something else."""

    class Places(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.linspace(-1, 1, x.shape[-1])

    torch.manual_seed(0)
    padded = Conv2dSame(3, 4, 3, stride=2)
    network = torch.nn.Sequential(Places(), padded, torch.nn.BatchNorm2d(4)).eval()
    tiny.statistics(network[2])[0].normal_()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(images)
        assert classifier.fold_batch_norms(network, images) == 1
        assert torch.allclose(network(images), expected, atol=1e-5)


def test_what_is_called_twice_is_left_alone() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.layer(self.norm(self.layer(x))))
            return result

    assert classifier.fold_batch_norms(Twice().eval(), torch.randn(2, 3, 8, 8)) == 0


def test_a_folded_layer_of_kept_statistics_gives_what_it_gave_with_other_statistics_too() -> None:
    """It scales by its buffers at each call: a checkpoint that brings others changes the result."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    images = torch.randn(2, 3, 8, 8)
    assert classifier.fold_batch_norms(network, images) == 1
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    state = {n: t.clone() for n, t in network.state_dict().items()}
    state["1.running_mean"] += 0.5
    state["1.running_var"] *= 3
    for other in (network, plain):
        other.load_state_dict(state)
    assert torch.allclose(network(images), plain(images), atol=1e-6)
