"""Parameter groups, learning rates and EMA against timm's; the layout of restored tensors."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

from tests.training import tiny
from tlpipe.backbones.stages import cut
from tlpipe.training import loop
from tlpipe.training.classifier import build
from tlpipe.training.optimiser import (
    is_token_normalised,
    make_optimiser,
    restore_optimiser,
    warmed_up_ema_decay,
)
from tlpipe.training.recipe import Recipe
from tlpipe.training.schedule import LearningRates


def groups_of(
    stages: nn.Sequential, recipe: Recipe, learning_rates: LearningRates
) -> dict[str, dict[str, float]]:
    """Return the options of each parameter's group, by the parameter's name."""
    model = build(stages, 4, (), 2, seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimiser = make_optimiser(model, learning_rates, recipe, tiny.CPU)
    found = [(names[id(p)], group) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())  # each one, once
    return dict(found)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",  # pos_embed, cls_token
        "swin_tiny_patch4_window7_224",  # relative_position_bias_table
        "levit_128s",  # attention_biases
        "resnet18",
        "pvt_v2_b0",
    ],
)
def test_what_decays_is_what_decays_in_timm(name: str) -> None:
    network = timm.create_model(name, num_classes=0)
    spared = getattr(network, "no_weight_decay", set)()
    groups = param_groups_weight_decay(network, 0.05, no_weight_decay_list=spared)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    expected = {n: decays[id(p)] for n, p in network.named_parameters()}
    assert set(expected.values()) == {0.0, 0.05}

    found = groups_of(cut(network, 224), Recipe(weight_decay=0.05), LearningRates(1e-3, 1e-3, 1.0))
    ours = {n.split(".", 2)[2]: g["weight_decay"] for n, g in found.items() if "stages" in n}
    assert ours == expected
    assert (found["head.0.weight"]["weight_decay"], found["head.0.bias"]["weight_decay"]) == (
        0.05,
        0.0,
    )


def test_position_embeddings_of_torchvision_do_not_decay() -> None:
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16)
    network.heads = nn.Identity()  # type: ignore[assignment]
    found = groups_of(cut(network, 32), Recipe(weight_decay=0.05), LearningRates(1e-3, 1e-3, 1.0))
    decays = {n.split(".")[-1]: g["weight_decay"] for n, g in found.items()}
    assert decays["class_token"] == decays["pos_embedding"] == 0
    assert decays["in_proj_weight"] == 0.05


def test_rates_fall_with_depth_and_the_head_has_its_own() -> None:
    found = groups_of(
        tiny.stages(), Recipe(), LearningRates(head=0.5, backbone=0.1, layer_decay=0.3)
    )
    expected = {"head": 0.5, "three": 0.1, "two": 0.1 * 0.3, "one": 0.1 * 0.3 * 0.3}
    for name, group in found.items():
        part = next(part for part in expected if part in name.split("."))
        assert group["peak_lr"] == pytest.approx(expected[part]), name


NETWORKS = {
    "pvt_v2_b0": True,
    "twins_pcpvt_small": True,
    "hiera_tiny_224": True,
    "resmlp_12_224": True,
    "poolformer_s12": True,
    "convnext_atto": True,
    "xcit_nano_12_p16_224": True,
    "efficientvit_b0": False,
    "efficientvit_m0": False,
    "repvit_m0_9": False,
    "levit_128s": False,
    "resnet18": False,
    "resnetv2_50x1_bit": False,  # GroupNorm
    "nfnet_f0": False,  # no normalisation
    "mobilevit_xxs": False,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_tell_how_a_network_normalises(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    assert is_token_normalised(network) == NETWORKS[name]


def test_a_tie_is_a_network_with_batch_norm() -> None:
    layers = (nn.LayerNorm(3), nn.BatchNorm2d(3))
    assert not is_token_normalised(nn.Sequential(*layers))
    assert is_token_normalised(nn.Sequential(*layers, nn.GroupNorm(1, 3)))
    assert not is_token_normalised(nn.Sequential(*layers, nn.GroupNorm(3, 3)))


def test_rates_follow_the_network_and_what_is_set_wins() -> None:
    def learning_rates(network: nn.Module, recipe: Recipe) -> LearningRates:
        given = tiny.task([0, 1])
        given.classifier.stages = nn.Sequential(nn.Sequential(network))
        return loop.Training(given, recipe, None).learning_rates

    with torch.device("meta"):
        tokens = timm.create_model("pvt_v2_b0", num_classes=0)
    assert learning_rates(tiny.stages(), Recipe()) == (1e-3, 1e-3, 0.8)
    assert learning_rates(tokens, Recipe()) == (1e-3, 5e-5, 0.75)
    assert learning_rates(tokens, Recipe(optimiser="sgd")) == pytest.approx((0.05, 1e-3, 0.75))
    assert learning_rates(tokens, Recipe(backbone_lr=0.5, layer_decay=0.9)) == (1e-3, 0.5, 0.9)
    assert learning_rates(tokens, Recipe(head_lr=0.5)).head == 0.5


def test_the_average_is_timm_s() -> None:
    """Weights, running statistics and the integer that counts batches, with the warm-up."""
    given = tiny.task([0, 1] * 6, batch_stats=True)
    reference = ModelEmaV3(given.classifier, decay=0.6, use_warmup=True)
    training = loop.Training(given, Recipe(batch_size=4, ema_decay=0.6), None)
    training.model.open_last(3)
    training.set_learning_rates(1.0)
    decays = [warmed_up_ema_decay(update, 0.6) for update in range(1, 9)]
    assert decays == pytest.approx([reference.get_decay(update) for update in range(1, 9)])
    assert decays[0] == 0 and decays[-1] == 0.6
    for update in range(8):  # of epochs of three steps
        training.state.epoch, step = divmod(update, 3)
        training.take_step(given.train.rows[:4], step)
        reference.update(training.model, step=update + 1)
    ours, expected = training.eval_model.state_dict(), reference.module.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-6, atol=1e-8), name
    counts = [t for n, t in ours.items() if n.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [8, 8, 8]


def test_a_short_training_is_not_averaged_with_its_start() -> None:
    """Of 70 updates at a decay of 0.999, without a warm-up 93 % would be the starting weights."""
    left = 1.0
    for update in range(1, 71):
        left *= warmed_up_ema_decay(update, 0.999)
    assert left == 0


@pytest.mark.fault("T14")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_state_comes_back_in_the_layout_of_its_parameter(optimiser: str) -> None:
    given = tiny.task([0, 1] * 4)
    training = loop.Training(given, Recipe(batch_size=4, optimiser=optimiser), None)
    training.model.open_last(3)
    training.take_step(given.train.rows[:4], 0)
    saved = training.optimiser.state_dict()["state"]
    contiguous = {
        number: {
            name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in s.items()
        }
        for number, s in saved.items()
    }
    expected = copy.deepcopy(saved)
    restore_optimiser(training.optimiser, contiguous)
    found = training.optimiser.state_dict()["state"]
    differ = 0
    for number, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[number][name], tensor), name
            assert found[number][name].stride() == tensor.stride(), name
            differ += tensor.stride() != contiguous[number][name].stride()
    assert differ >= 3  # a 3x3 convolution in every stage: without it, this test shows nothing
