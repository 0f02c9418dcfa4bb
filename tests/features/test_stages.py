import pytest
import timm
import torch
import torchvision
from torch import nn

from tlpipe.errors import WeightsError
from tlpipe.features.stages import cut

# A small member of every family, and the stages that its paper tells apart.
FAMILIES = {
    "alexnet": "features0 features3 features10",
    "convnext_tiny": "stem features1 features3 features5 features7",
    "densenet121": "stem denseblock1 denseblock2 denseblock3 denseblock4",
    "efficientnet_b0": "stem features1 features2 features3 features4 features5 features6 features7",
    "efficientnet_v2_s": "stem features1 features2 features3 features4 features5 features6",
    "googlenet": "stem inception3b inception4e inception5b",
    "inception_v3": "stem Mixed_5d Mixed_6e Mixed_7c",
    "mnasnet0_5": "stem layers8 layers9 layers10 layers11 layers12 layers13",
    "mobilenet_v2": "stem features1 features3 features6 features13 features17",
    "mobilenet_v3_large": "stem features1 features3 features6 features12 features15",
    "regnet_y_400mf": "stem block1 block2 block3 block4",
    "resnet18": "stem layer1 layer2 layer3 layer4",
    "resnext50_32x4d": "stem layer1 layer2 layer3 layer4",
    "shufflenet_v2_x0_5": "stem stage2 stage3 stage4",
    "swin_t": "stem features1 features3 features5 features7",
    "swin_v2_t": "stem features1 features3 features5 features7",
    "vgg11": "features0 features3 features8 features13 features18",
    "vgg11_bn": "features0 features4 features11 features18 features25",
    "vit_b_32": "stem " + " ".join(f"encoder_layer_{i}" for i in range(12)),
    "timm/convnext_atto": "stem stages0 stages1 stages2 stages3",
    "timm/efficientvit_b0": "stem stages0 stages1 stages2 stages3",
    "timm/mobilenetv3_small_100": "stem blocks0 blocks1 blocks2 blocks3 blocks4",
    "timm/regnety_002": "stem s1 s2 s3 s4",
    "timm/repvgg_a0": "stem stages0 stages1 stages2 stages3",
    "timm/resnet18": "stem layer1 layer2 layer3 layer4",
    "timm/swin_tiny_patch4_window7_224": "stem layers0 layers1 layers2 layers3",
    "timm/vit_tiny_patch16_224": "stem " + " ".join(f"blocks{i}" for i in range(12)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_of_every_family_in_order_are_the_whole_network(name: str) -> None:
    torch.manual_seed(0)
    if name.startswith("timm/"):
        network = timm.create_model(name.removeprefix("timm/"))
    else:
        has_options = name in ("googlenet", "inception_v3")
        options = {"init_weights": False} if has_options else {}
        network = torchvision.models.get_model(name, weights=None, **options)
    side = 299 if name == "inception_v3" else 224
    images = torch.randn(2, 3, side, side)
    stages = cut(network, side)
    assert " ".join(stage for stage, _ in stages.named_children()) == FAMILIES[name] + " features"
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


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(WeightsError, match="Branching cannot be cut into stages"):
        cut(Branching(), 32)
    with pytest.raises(WeightsError, match=r"Map ends in \(1, 8, 30, 30\); expected one row"):
        cut(Map(), 32)
