"""Stage ``embed``: run the pretrained network once over every image."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from tlpipe import files
from tlpipe.backbones import activations as stored
from tlpipe.backbones import sampling
from tlpipe.backbones import weights as pretrained
from tlpipe.backbones.activations import ALL, AUTO, frozen_stages
from tlpipe.backbones.augment import Augmentation
from tlpipe.backbones.backbone import Backbone, describe
from tlpipe.backbones.forward import CODE, PACKAGES, compute_rows, open_forward
from tlpipe.backbones.frozen import graph_key
from tlpipe.code_digest import of_modules, versions
from tlpipe.data import pixels as packed
from tlpipe.data.manifest import Entry, file_keys, load_manifest
from tlpipe.errors import ArtifactError, ParamsError
from tlpipe.params import Section, check_effect
from tlpipe.runtime import THREADS, usable_cores

_log = logging.getLogger(__name__)
# Beside the activations: what was kept of an earlier run, and who is at it.
KEPT, _LOCK = ".activations", ".embed.lock"


class Params(Section):
    """Which pretrained network, and how much of it stays as it is."""

    backbone: str = Field(
        default="efficientnet_lite0",
        min_length=1,
        description="Name of the pretrained network; 'tlpipe backbones' lists them.",
    )
    weights: str = Field(
        default=pretrained.IMAGENET,
        min_length=1,
        description="'imagenet', 'none' for random ones, a .safetensors or .pth file, or "
        "'models:/NAME@ALIAS', a registered model.",
    )
    weights_sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="The hash that a file of weights must have.",
    )
    freeze: str | int = Field(
        default=ALL,
        description="What keeps its weights: 'all' (but the head), 'none', a number of stages, the "
        "last frozen stage, or 'auto': by the median number of images per class, below 20 all, "
        "below 1,000 all but the last stages with a quarter of the parameters, else none; or as "
        "advice says.",
    )
    advice: str | None = Field(
        default=None,
        min_length=1,
        description="A file that 'tlpipe advise' writes, such as advice.json, which freeze: auto "
        "then follows.",
    )
    views: int = Field(
        default=0, ge=0, le=64, description="Augmented views of each image to store beside it."
    )
    augmentation: Augmentation = Field(
        default=Augmentation(), description="How views, or images where nothing is frozen, vary."
    )
    max_gib: float = Field(
        default=16.0, gt=0, description="Most that the activations may take on disk, in GiB."
    )
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto",
        description="Threads to compute with, here and in later stages; auto is a thread for each "
        "core that this process may use. The number is part of the provenance.",
    )

    @model_validator(mode="after")
    def _has_effects(self) -> "Params":
        if self.weights == pretrained.NONE:
            check_effect("embed", self, ("weights_sha256",), "embed.weights is none")
        if self.freeze != AUTO:
            check_effect("embed", self, ("advice",), f"embed.freeze is {self.freeze}")
        return self


def run(*, manifest: Path, pixels: Path, activations: Path, params: Params) -> None:
    """Write the features of every image, and its activations at the freeze boundary.

    Raises:
        ArtifactError: the advice to follow is missing, or of another network or other images.
        ParamsError: the pixels were stored in another way than the backbone wants them, there is
            no such boundary, or the activations would be larger than allowed.
        TrainingError: another process embeds into the same place.
        WeightsError: the weights are missing or not the pinned ones.
    """
    images = packed.load(pixels)
    sampling.check(images.sampling, params.backbone)
    threads = usable_cores() if params.threads == "auto" else params.threads
    entries = _entries(manifest, pixels, len(images.array))
    backbone = describe(params.backbone)
    names = [stage.name for stage in backbone.stages]
    weights = backbone.find_weights(params.weights, params.weights_sha256)
    freeze = _freeze(params, weights.sha256, images.data_sha256)
    count = frozen_stages(freeze, backbone.stages, (entry.label for entry in entries))
    check_effects(params, count)
    _log.info("frozen: %s", _share(backbone, count))
    shape = _boundary_shape(backbone, count, params.views)
    _check_size(backbone, len(entries), shape, params)
    forward = open_forward(backbone, weights, _stages(backbone, count), threads=threads)
    origin = stored.Origin(
        backbone=backbone.name,
        weights=params.weights,
        weights_sha256=weights.sha256,
        graph=graph_key(backbone, weights),
        freeze=params.freeze,
        boundary=names[count - 1] if count else "",
        views=params.views,
        augmentation=params.augmentation,
        preprocessing=backbone.preprocessing.model_copy(
            update={"value_range": images.sampling.value_range}
        ),
        data_sha256=images.data_sha256,
        data_version=images.data_version,
        provider=forward.provider,
        threads=threads,
        decoder=images.decoder,
        code=of_modules(*CODE),
        packages=versions(*PACKAGES),
        pretrained_on=pretrained.pretrained_on(weights.path),
    )
    kept = activations.with_name(KEPT)
    with (
        files.locked(activations.with_name(_LOCK), "an embedding"),
        files.replacing_folder(activations) as folder,
    ):
        found = stored.load_kept(kept, origin)
        known = found[0] if found else None
        rows = _known_rows(*found, entries) if found else [None] * len(entries)
        width = backbone.stages[-1].shape[0]
        writer = stored.Writer(folder, origin, width=width, boundary=shape, known=known)
        new = [entry.key if row is None else None for entry, row in zip(entries, rows, strict=True)]
        computed = compute_rows(
            forward,
            images.array,
            new,
            backbone=backbone,
            views=params.views,
            augmentation=params.augmentation,
        )
        for entry, row in zip(entries, rows, strict=True):
            writer.append(entry.key, *(next(computed) if row is None else (row, row)))
        writer.finish(_seen(entries, weights.path))
        stored.keep(folder, kept)


def _freeze(params: Params, weights_sha256: str, data_sha256: str) -> str | int:
    """Return what is to be frozen; what decides is said where it is left to that."""
    if params.freeze != AUTO:
        return params.freeze
    if params.advice is None:
        _log.info(
            "embed.freeze is auto, by the number of images; 'tlpipe advise' measures what suits "
            "them, and embed.advice follows that"
        )
        return AUTO
    path = Path(params.advice)
    advice = stored.load_advice(path, params.backbone, weights_sha256, data_sha256)
    _log.info("embed.freeze is auto, by %s: %s", path, advice.freeze)
    return advice.freeze


def check_freeze(params: Params) -> int | None:
    """Check that the backbone has such a boundary, and that all that is set has an effect.

    Returns: how many stages stay open; None where the number of images decides.

    Raises:
        ParamsError: it has no such boundary, or an option has no effect.
    """
    stages = describe(params.backbone).stages
    count = frozen_stages(params.freeze, stages, labels=[""])
    if params.freeze == AUTO:
        return None
    check_effects(params, count)
    return len(stages) - count


def check_weights(params: Params) -> str:
    """Check that the weights are here, and are those that were pinned; say what a run would fetch.

    Raises:
        WeightsError: they are missing and cannot be fetched, or are others.
    """
    backbone = describe(params.backbone)
    if params.weights.startswith(pretrained.REGISTERED):
        return ""
    address = pretrained.address(backbone.pretrained)
    is_missing = pretrained.at_hand(backbone.pretrained) is None
    if params.weights == pretrained.IMAGENET and is_missing and address:
        return f"the weights of {params.backbone} are not here; a run fetches them: {address}"
    backbone.find_weights(params.weights, params.weights_sha256)
    return ""


def check_effects(params: Params, count: int) -> None:
    """Check that no option is set that can have no effect with ``count`` frozen stages.

    Where ``freeze`` is ``auto`` it is only said: the number of images decides, and may grow.

    Raises:
        ParamsError: views of an image that is trained whole, or augmentation of what is not shown.
    """
    default = type(params).model_fields["augmentation"].default
    said = ""
    if params.views and not count:
        said = (
            f"embed.views is {params.views} and has no effect: embed.freeze is {params.freeze}, "
            f"which freezes nothing, so images are augmented while training. Take it out, or "
            f"freeze a stage."
        )
    elif count and not params.views and params.augmentation != default:
        said = (
            f"embed.augmentation has no effect: embed.freeze is {params.freeze} and embed.views is "
            f"0, so no augmented image is ever seen. Set embed.views, or take it out."
        )
    if said and params.freeze == AUTO:
        _log.warning("%s", said)
    elif said:
        raise ParamsError(said)


def with_threads(params: Params) -> Params:
    """Return the parameters with the number of threads that somebody asks for.

    ``rebuild`` asks for as many as a version was made with: results differ by their number.

    Raises:
        ParamsError: that is no number of threads.
    """
    asked = os.environ.get(THREADS)
    if params.threads != "auto" or asked is None:
        return params
    if not (asked.isdecimal() and 1 <= int(asked) <= 256):
        raise ParamsError(
            f"{THREADS} is {asked!r}; expected a number from 1 to 256. Change or unset it."
        )
    return params.model_copy(update={"threads": int(asked)})


def _entries(manifest: Path, pixels: Path, count: int) -> list[Entry]:
    """Return the manifest's images, as many as there are pixels of."""
    entries = list(load_manifest(manifest))
    if len(entries) != count:
        raise ArtifactError(
            f"{manifest} holds {len(entries)} images and {pixels} {count}; expected the same. Run "
            f"'tlpipe run'."
        )
    return entries


def _seen(entries: Sequence[Entry], weights: Path | None) -> npt.NDArray[np.bool_] | None:
    """Return (N,) on which images' files the weights were trained; None where they do not say."""
    if (known := pretrained.images_of(weights)) is None:
        return None
    return np.isin(file_keys(entries), known)


def _share(backbone: Backbone, count: int) -> str:
    parameters = sum(stage.parameters for stage in backbone.stages[:count])
    upto = f"up to {backbone.stages[count - 1].name}, " if count else ""
    return (
        f"{count} of {len(backbone.stages)} stages, {upto}{parameters:,} of "
        f"{backbone.parameters:,} parameters"
    )


def _stages(backbone: Backbone, count: int) -> list[str]:
    """Return the stages whose results are stored: the last one, and the boundary."""
    names = [backbone.stages[-1].name]
    return (
        names if count in (0, len(backbone.stages)) else [*names, backbone.stages[count - 1].name]
    )


def _boundary_shape(backbone: Backbone, count: int, views: int) -> tuple[int, ...] | None:
    """Return the shape of what is stored at the boundary, or None where features are enough."""
    if count == 0 or (count == len(backbone.stages) and views == 0):
        return None
    return (1 + views, *backbone.stages[count - 1].shape)


def _check_size(
    backbone: Backbone, images: int, shape: tuple[int, ...] | None, params: Params
) -> None:
    """Say how much will be stored; more than is allowed is an error."""
    views = 1 + params.views

    def gib(kib: float) -> float:
        return images * kib / 2**20

    features = backbone.stages[-1].kib
    size = gib(features + (2 * int(np.prod(shape)) / 1024 if shape else 0))
    _log.info("activations of %s images: %s MiB", images, f"{1024 * size:,.2f}")
    if size <= params.max_gib:
        return
    smaller = [
        f"{stage.name} ({gib(features + views * stage.kib):.3g} GiB)"
        for stage in backbone.stages
        if gib(features + views * stage.kib) <= params.max_gib
    ]
    advice = f"freeze up to {', '.join(smaller)}; or " if smaller else ""
    fewer = "store fewer embed.views, " if params.views else ""
    raise ParamsError(
        f"the activations of {images} images would take {size:.3g} GiB; embed.max_gib allows "
        f"{params.max_gib:g}. By embed.freeze, {advice}freeze none; {fewer}or raise embed.max_gib."
    )


def _known_rows(
    known: stored.Activations, intact: npt.NDArray[np.bool_], entries: Sequence[Entry]
) -> list[int | None]:
    """Return where each image is among the known ones, or None."""
    places = {int(key): row for row, key in enumerate(known.keys) if intact[row]}
    rows = [places.get(int.from_bytes(entry.key)) for entry in entries]
    count = sum(row is not None for row in rows)
    _log.info("%s of %s images are known already", count, len(entries))
    if damaged := int((~intact).sum()):
        _log.warning("%s of the kept activations are damaged and are not used", damaged)
    return rows
