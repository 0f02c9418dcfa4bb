import pytest
import timm
import torch
import torchvision
from torch import nn

from tlpipe.backbones.activations import frozen_stages
from tlpipe.backbones.backbone import describe
from tlpipe.backbones.stages import cut
from tlpipe.errors import WeightsError

# A small member of every family, and the stages that its paper tells apart.
FAMILIES = {
    "alexnet": "features0 features3 features10 features",
    "convnext_tiny": "stem features1 features3 features5 features7",
    "densenet121": "stem denseblock1 denseblock2 denseblock3 denseblock4",
    "efficientnet_b0": "stem " + " ".join(f"features{i}" for i in range(1, 8)) + " features",
    "efficientnet_v2_s": "stem " + " ".join(f"features{i}" for i in range(1, 7)) + " features",
    "googlenet": "stem inception3b inception4e inception5b",
    "inception_v3": "stem Mixed_5d Mixed_6e Mixed_7c",
    "mnasnet0_5": "stem layers8 layers9 layers10 layers11 layers12 layers13 features",
    "mobilenet_v2": "stem features1 features3 features6 features13 features17 features",
    "mobilenet_v3_large": "stem features1 features3 features6 features12 features15 features",
    "regnet_y_400mf": "stem block1 block2 block3 block4",
    "resnet18": "stem layer1 layer2 layer3 layer4",
    "resnext50_32x4d": "stem layer1 layer2 layer3 layer4",
    "shufflenet_v2_x0_5": "stem stage2 stage3 stage4 features",
    "swin_t": "stem features1 features3 features5 features7",
    "swin_v2_t": "stem features1 features3 features5 features7",
    "vgg11": "features0 features3 features8 features13 features18 features",
    "vgg11_bn": "features0 features4 features11 features18 features25 features",
    "vit_b_32": "stem " + " ".join(f"encoder_layer_{i}" for i in range(12)),
    "timm/convnext_atto": "stem stages0 stages1 stages2 stages3",
    "timm/efficientvit_b0": "stem stages0 stages1 stages2 stages3 features",
    "timm/mobilenetv3_small_100": "stem blocks0 blocks1 blocks2 blocks3 blocks4 features",
    "timm/regnety_002": "stem s1 s2 s3 s4",
    "timm/repvgg_a0": "stem stages0 stages1 stages2 stages3",
    "timm/resnet18": "stem layer1 layer2 layer3 layer4",
    "timm/swin_tiny_patch4_window7_224": "stem layers0 layers1 layers2 layers3",
    "timm/vit_tiny_patch16_224": "stem " + " ".join(f"blocks{i}" for i in range(12)),
}


# One plain network, one with residual, dense and parallel blocks each, one of tokens, one of NHWC.
REPRESENTATIVE = (
    "alexnet",
    "densenet121",
    "googlenet",
    "resnet18",
    "swin_t",
    "timm/vit_tiny_patch16_224",
)


def built(name: str) -> nn.Module:
    """Build a network without its classifier, not by way of tlpipe."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        without: nn.Module = timm.create_model(name.removeprefix("timm/"), num_classes=0)
        return without
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    # Those of the auxiliary outputs stand before the last stages.
    *_, classifier = (path for path, m in network.named_modules() if isinstance(m, nn.Linear))
    network.set_submodule(classifier, nn.Identity())
    return network


@pytest.mark.fault("T18")
@pytest.mark.parametrize(
    "name",
    [n if n in REPRESENTATIVE else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES],
)
def test_the_stages_of_every_family_in_order_are_the_whole_network(name: str) -> None:
    network = built(name)
    side = 299 if name == "inception_v3" else 224
    images = torch.randn(2, 3, side, side)
    stages = cut(network, side)
    assert " ".join(stage for stage, _ in stages.named_children()) == FAMILIES[name]
    with torch.inference_mode():
        result = images
        for stage in stages:
            result = stage(result)
        assert torch.equal(result, network.eval()(images))
    # Every parameter is in one stage, but for those of the outputs that only training uses.
    auxiliary = ("aux", "AuxLogits")
    owned = {id(p) for key, p in network.named_parameters() if not key.startswith(auxiliary)}
    found = [id(p) for stage in stages for p in stage.parameters()]
    assert len(found) == len(set(found))
    assert set(found) == owned
    # Every stage has a matrix or a kernel to train, not just numbers that normalise.
    for stage in stages:
        assert any(p.dim() > 1 for p in stage.parameters())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(images.mean(dim=(2, 3)))
        return result if result.sum() > 0 else -result


class Map(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU())


class Flat(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branching(), "Branching cannot be cut into stages .TraceError: symbolically traced"),
        (Map(), r"Map ends in \(1, 8, 30, 30\); expected one row"),
        # Traced, but not to be run at this size, or without a block to name stages by.
        (built("timm/vit_tiny_patch16_224"), r"cut into stages \(.*expected .* images of 32 px"),
        (Flat(), r"Flat has no layer that gives a map or tokens .* Choose another backbone"),
    ],
)
def test_what_cannot_be_cut_is_an_error_in_one_line(network: nn.Module, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        cut(network, 32)
    assert "\n" not in str(error.value)


@pytest.mark.fault("T18")
@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("resnet50", "layer4"),
        ("vit_b_16", "encoder_layer_8 encoder_layer_9 encoder_layer_10 encoder_layer_11"),
        ("timm/vit_tiny_patch16_224", "blocks8 blocks9 blocks10 blocks11"),
        ("efficientnet_lite0", "blocks6 features"),
        ("convnext_tiny", "features7"),
        ("swin_t", "features7"),
        ("densenet121", "denseblock4"),
    ],
)
def test_auto_opens_the_last_stages_that_hold_a_quarter_of_the_parameters(
    name: str, opened: str
) -> None:
    stages = describe(name).stages
    count = frozen_stages("auto", stages, ["a", "b"] * 100)
    assert " ".join(stage.name for stage in stages[count:]) == opened
    sizes = [stage.parameters for stage in stages]
    assert sum(sizes[count:]) >= sum(sizes) / 4 > sum(sizes[count + 1 :])
