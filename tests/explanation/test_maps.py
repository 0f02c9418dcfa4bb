"""Maps of a network, Grad-CAM and receptive fields, against what is computed otherwise."""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from tlpipe.explanation.maps import (
    Field,
    Network,
    Target,
    as_map,
    grad_cam,
    last_map,
    receptive_fields,
)


class Normalise(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).float() / 255 - 0.5


def network(head: nn.Module, **stages: nn.Module) -> Network:
    """Return a network of traced stages, its weights drawn with a seed."""
    generator = torch.Generator().manual_seed(1)
    traced = OrderedDict(
        (name, fx.GraphModule(stage, fx.Tracer().trace(stage))) for name, stage in stages.items()
    )
    for part in (*traced.values(), head):
        part.eval()
        for parameter in part.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        part.requires_grad_(False)
    return Network(Normalise(), traced, head)


def photos(count: int, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def convolutional() -> Network:
    """Two convolutions; the pooling stands in the stage of the second one, as in a ResNet."""
    return network(
        nn.Linear(6, 3),
        stem=nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU()),
        last=nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
    )


def test_grad_cam_of_a_pooled_map_is_the_weighted_sum_of_its_channels() -> None:
    tiny, images = convolutional(), photos(3, 16)
    target = last_map(tiny, images)
    assert target == Target("last", "_1")  # the second ReLU: what is pooled
    classes = np.array([2, 0, 1])
    stem, last = tiny.stages.values()
    with torch.no_grad():
        seen = tiny.normalise(torch.from_numpy(images))
        convolution = last.get_submodule("0")
        given = torch.relu(convolution(stem(seen))).numpy()
    # Of a mean over S x S places and a linear head the gradient is its weight over S squared.
    weight = tiny.head.get_parameter("weight").numpy()[classes]
    expected = np.maximum(np.einsum("bc,bcij->bij", weight, given) / given.shape[2] ** 2, 0)
    assert expected.max() > 0
    np.testing.assert_allclose(grad_cam(tiny, target, images, classes), expected, atol=1e-6)


class Tokens(nn.Module):
    """Patches of 4 pixels as tokens, behind a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)


class FirstToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norm(x)
        return normalised[:, 0]


def transformer() -> Network:
    def block() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        return nn.Sequential(layer)

    return network(
        nn.Linear(8, 2), stem=Tokens(), block0=block(), block1=block(), features=FirstToken()
    )


def test_where_a_class_token_answers_the_map_is_what_the_last_block_gets() -> None:
    tiny, images = transformer(), photos(2, 24)
    target = last_map(tiny, images)
    assert target is not None
    assert target.stage == "block0"
    classes = np.array([1, 0])
    with torch.no_grad():
        tokens = tiny.stages["block0"](
            tiny.stages["stem"](tiny.normalise(torch.from_numpy(images)))
        )
    tokens.requires_grad_()
    with torch.enable_grad():
        logits = tiny.head(tiny.stages["features"](tiny.stages["block1"](tokens)))
        logits[[0, 1], classes].sum().backward()
    assert tokens.grad is not None
    weights = tokens.grad[:, 1:].mean(dim=1, keepdim=True)
    expected = (weights * tokens.detach()[:, 1:]).sum(-1).relu().reshape(2, 6, 6).numpy()
    assert expected.max() > 0
    np.testing.assert_allclose(grad_cam(tiny, target, images, classes), expected, atol=1e-5)


def test_a_network_without_places_has_no_map() -> None:
    flat = network(nn.Linear(5, 2), only=nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5)))
    assert last_map(flat, photos(1, 8)) is None


def test_hidden_units_that_are_off_on_noise_are_probed_with_images() -> None:
    tiny, white = convolutional(), np.full((1, 16, 16, 3), 255, np.uint8)
    first = nn.Linear(6, 4).requires_grad_(requires_grad=False)
    first.weight.fill_(1)
    # On for a white image, whose features add up to twice as much as those of noise.
    *_, (_, bright) = tiny.stage_results(white)
    first.bias.fill_(-0.8 * float(bright.sum()))
    head = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 3))
    hidden = Network(tiny.normalise, tiny.stages, head)
    assert last_map(hidden, photos(3, 16)) is None
    assert last_map(hidden, white) == Target("last", "_1")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 5, 7, 7), (2, 5, 7, 7)),
        ((2, 7, 7, 5), (2, 5, 7, 7)),
        ((2, 197, 5), (2, 5, 14, 14)),  # a class token
        ((2, 201, 5), (2, 5, 14, 14)),  # and four registers
        ((2, 49, 5), (2, 5, 7, 7)),
        ((2, 60, 5), None),
        ((2, 5, 1, 1), None),
        ((2, 5), None),
    ],
)
def test_maps_are_known_by_their_shapes(
    shape: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    found = as_map(torch.arange(math.prod(shape)).reshape(shape))
    assert (None if found is None else tuple(found.shape)) == expected
    if len(shape) == 3 and found is not None:  # the first place is the first token of a place
        prefix = shape[1] - found.shape[2] ** 2
        assert found[0, 0, 0, 0] == prefix * shape[2]
        assert found[0, 0, 0, 1] == (prefix + 1) * shape[2]


def seen_by_change(network: Network, name: str, side: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return (S, W): whether the middle row's places change with each column of the image."""

    def given(image: Tensor) -> Tensor:
        current = image
        for stage, module in network.stages.items():
            current = module(current)
            if stage == name:
                break
        grid = as_map(current)
        assert grid is not None
        return grid

    with torch.no_grad():
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(7))
        plain, columns = given(image), []
        for column in range(side):
            changed = image.clone()
            changed[..., column] += 3
            apart = (given(changed) != plain).any(dim=1)[0]
            columns.append(apart.any(dim=0).numpy())
    return np.array(columns).T


def test_receptive_fields_are_the_columns_that_change_what_a_place_gives() -> None:
    side = 40
    deep = network(
        nn.Identity(),
        stem=nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Hardswish()),
        middle=nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.AvgPool2d(2), nn.Hardswish()
        ),
        valid=nn.Sequential(nn.Conv2d(8, 8, 3), nn.Hardswish()),
        whole=nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Upsample(scale_factor=2)),
    )
    found = receptive_fields(deep, side)
    # 3 pixels; then 5 taps of 2 pixels and one more of pooling; then two strides of 4 more.
    assert found["stem"] == Field(start=-1, stride=2, size=3)
    assert found["middle"] == Field(start=-5, stride=4, size=13)
    assert found["valid"] == Field(start=-5, stride=4, size=21)
    for name in ("stem", "middle", "valid"):
        field = found[name]
        assert field is not None
        for place, is_seen in enumerate(seen_by_change(deep, name, side)):
            low, high = field.seen(place, side)
            assert is_seen.nonzero()[0][[0, -1]].tolist() == [low, high - 1]


def test_places_that_see_all_of_the_image_have_no_field() -> None:
    found = receptive_fields(transformer(), 24)
    assert found["stem"] == Field(start=0, stride=4, size=4)  # a patch each
    assert found["block0"] is None
    assert found["features"] is None
