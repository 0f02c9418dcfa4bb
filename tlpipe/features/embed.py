"""Stage ``embed``: run the frozen part of the backbone once over every image."""

import logging
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator

from tlpipe import files
from tlpipe.data import pixels as packed
from tlpipe.data.images import Sampling, crop_middle
from tlpipe.errors import ParamsError, WeightsError
from tlpipe.features import activations as stored
from tlpipe.features import weights as pretrained
from tlpipe.features.backbone import describe
from tlpipe.features.frozen import frozen_graph
from tlpipe.params import Section
from tlpipe.progress import track
from tlpipe.runtime import open_session

_log = logging.getLogger(__name__)
_BATCH = 8
FREEZE_LEVELS = ("all",)


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
        description="'imagenet', 'none' for random ones, or a .safetensors or .pth file.",
    )
    weights_sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="The hash that a file of weights must have.",
    )
    freeze: str = Field(
        default="all", description="What keeps its pretrained weights: 'all' but the head."
    )
    threads: int = Field(
        default=2,
        ge=1,
        le=256,
        description="Threads to compute with, here and in later stages; part of the provenance.",
    )

    @field_validator("freeze")
    @classmethod
    def _known_freeze(cls, level: str) -> str:
        if level not in FREEZE_LEVELS:
            raise ValueError(f"it must be one of: {', '.join(FREEZE_LEVELS)}")
        return level


def run(*, pixels: Path, activations: Path, params: Params) -> None:
    """Write the activations of every image at the freeze boundary.

    Raises:
        ParamsError: the pixels were stored in another way than the backbone wants them.
        WeightsError: the weights are missing or not the pinned ones.
    """
    images = packed.load(pixels)
    check_sampling(images.sampling, params)
    backbone = describe(params.backbone)
    weights = pretrained.find(
        backbone.name, backbone.pretrained, params.weights, params.weights_sha256
    )
    session = open_session(frozen_graph(backbone, weights), threads=params.threads)
    count, width = len(images.array), session.get_outputs()[0].shape[1]
    _log.info("%s x %s activations, %.1f MiB", count, width, count * width * 2 / 2**20)
    with files.replacing_folder(activations) as folder:
        array = stored.create(folder, count, width)
        starts = range(0, count, _BATCH)
        for start in track(starts, total=len(starts), description="embed"):
            batch = crop_middle(
                images.array[start : start + _BATCH], backbone.preprocessing.crop_px
            )
            features = session.run(None, {"images": np.ascontiguousarray(batch)})[0]
            if not (np.abs(features) < np.finfo(np.float16).max).all():
                raise WeightsError(
                    f"{params.backbone} gives activations that are not finite or beyond float16 "
                    f"for images {start} to {start + len(batch) - 1}; check embed.weights."
                )
            array[start : start + _BATCH] = features
        array.flush()
        origin = stored.Origin(
            backbone=backbone.name,
            weights=params.weights,
            weights_sha256=weights.sha256,
            freeze=params.freeze,
            boundary=backbone.stages[-1].name,
            preprocessing=backbone.preprocessing,
            data_sha256=images.data_sha256,
            data_version=images.data_version,
            provider=session.get_providers()[0],
            threads=params.threads,
        )
        stored.finish(folder, origin)


def check_sampling(found: Sampling, params: Params) -> None:
    """Check that images are stored as the backbone was trained to see them.

    Raises:
        ParamsError: another side or another interpolation, or no such backbone.
    """
    expected = describe(params.backbone).preprocessing
    for key in Sampling.model_fields:
        if (value := getattr(found, key)) != (wanted := getattr(expected, key)):
            raise ParamsError(
                f"ingest.{key} is {value}; the backbone {params.backbone} was trained with "
                f"{wanted}. Set ingest.{key}: {wanted} in params.yaml."
            )
