"""Stage ``export``: write the bundle, after the graph has proven equal to the trained model."""

import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from tlpipe import files
from tlpipe.data import pixels as packed
from tlpipe.data.manifest import evenly, load_split
from tlpipe.features.backbone import describe
from tlpipe.learning import model as models
from tlpipe.onnx_export import bundle as bundles
from tlpipe.params import Section

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "numpy", "scipy", "pillow")


class Params(Section):
    """How exact the exported graph must be."""

    parity_images: int = Field(
        default=256, ge=1, description="Test images to compare with torch, at most."
    )
    parity_tolerance: float = Field(
        default=1e-4, gt=0, le=0.1, description="Largest difference of a logit."
    )


def run(
    *, model: Path, pixels: Path, split: Path, bundle: Path, parity: Path, params: Params
) -> None:
    """Write the bundle and the parity report.

    Raises:
        ParityError: the graph and the model differ on real images; nothing is written.
    """
    from tlpipe.onnx_export import graph
    from tlpipe.onnx_export import parity as parities

    trained = models.load(model)
    origin = trained.card.origin
    backbone = describe(origin.backbone)
    weights = backbone.find_weights(origin.weights, origin.weights_sha256)
    provenance = _provenance(trained.card)
    metadata = bundles.metadata(trained.card.labels, origin.preprocessing, provenance)
    onnx_bytes = graph.classifier(backbone, weights, trained, metadata)
    test = [i for i, row in enumerate(load_split(split)) if row.split == "test"]
    rows = evenly(test, params.parity_images)
    measured = parities.measure(
        onnx_bytes, trained, backbone, weights, packed.load(pixels).array, rows
    )
    parities.check(measured, params.parity_tolerance)
    bundles.save(
        bundle,
        model=onnx_bytes,
        labels=trained.card.labels,
        preprocessing=origin.preprocessing,
        provenance=provenance,
    )
    files.write_json(parity, asdict(measured))
    _log.info(
        "%.1f MB of ONNX; differs from torch by at most %.1e on %s images",
        len(onnx_bytes) / 1e6,
        measured.max_difference,
        measured.images,
    )


def _provenance(card: models.Card) -> dict[str, Any]:
    """Return what the model was made of: no times, no paths of this machine."""
    return {
        **card.model_dump(exclude={"labels"}),
        "packages": {package: version(package) for package in _PACKAGES},
    }
