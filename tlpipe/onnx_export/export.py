"""Stage ``export``: write the bundle, after its graphs have proven equal to the trained model."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tlpipe import files, lineage
from tlpipe.data import pixels as packed
from tlpipe.data.chunks import Chunks
from tlpipe.data.manifest import Assignment, load_split
from tlpipe.features.backbone import describe
from tlpipe.features.device import has_cuda
from tlpipe.learning import model as models
from tlpipe.onnx_export import bundle as bundles
from tlpipe.onnx_export.bundle import ANY_SIZE, EXACT
from tlpipe.params import Section

if TYPE_CHECKING:
    from onnx import ModelProto

    from tlpipe.onnx_export.parity import Sample

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "numpy", "scipy", "pillow")
_ANY_SIZE_IMAGES = 8


class Params(Section):
    """Which graphs are written, and how exact they must be."""

    parity_images: int = Field(
        default=256, ge=1, description="Test images to compare with torch, at most."
    )
    parity_tolerance: float = Field(
        default=1e-4, gt=0, le=0.1, description="Largest difference of a logit."
    )
    precisions: tuple[Literal["fp16", "int8"], ...] = Field(
        default=("fp16", "int8"),
        strict=False,
        description="Graphs beside fp32; fp16 is made where there is a GPU.",
    )
    calibration_images: int = Field(
        default=128, ge=1, description="Training images that set the ranges of int8, at most."
    )
    accuracy_loss: float = Field(
        default=0.01, ge=0, lt=1, description="Of a lower precision, on validation, at most."
    )


def run(
    *,
    model: Path,
    pixels: Path,
    split: Path,
    bundle: Path,
    parity: Path,
    workspace: Path,
    params: Params,
) -> None:
    """Write the bundle and the parity report.

    Raises:
        ParityError: the graph and the model differ on real images; nothing is written.
    """
    from tlpipe.onnx_export import any_size, graph, precisions, temperature
    from tlpipe.onnx_export import parity as parities

    trained = models.load(model)
    origin = trained.card.origin
    backbone = describe(origin.backbone)
    weights = backbone.find_weights(origin.weights, origin.weights_sha256)
    sample = partial(_sample, packed.load(pixels).array, load_split(split), trained.card)
    in_onnx = partial(parities.in_onnx, threads=origin.threads)

    whole = graph.classifier(backbone, weights, trained)
    validation = sample("validation")
    logits = parities.logits(in_onnx(whole.SerializeToString()), validation, "temperature")
    divisor = temperature.fit(logits, validation.truth)
    provenance = _provenance(trained.card, divisor, workspace)
    metadata = bundles.metadata(trained.card.labels, origin.preprocessing, provenance)
    finish = partial(graph.finished, temperature=divisor, metadata=metadata)

    exact = finish(whole)
    test = sample("test").first(params.parity_images)
    in_torch = parities.logits(parities.in_torch(trained, backbone, weights), test, "torch")
    measured = parities.compare(in_torch, parities.logits(in_onnx(exact), test, "ONNX Runtime"))
    parities.check(measured, params.parity_tolerance)

    others, verdicts = {}, {}
    for name, candidate in _candidates(whole, sample("train"), params, origin.threads):
        content = finish(candidate)
        found = parities.logits(in_onnx(content), validation, name)
        verdict = precisions.judge(
            name,
            logits,
            found,
            validation.truth,
            size=len(content) / len(exact),
            loss=params.accuracy_loss,
        )
        verdicts[name] = asdict(verdict)
        if verdict.refused:
            _log.warning("%s does not ship: %s", name, verdict.refused)
        else:
            others[name] = content
    resizing = finish(any_size.with_any_size(whole, origin.preprocessing))
    few = test.first(_ANY_SIZE_IMAGES)
    squares = replace(few, crop_px=origin.preprocessing.short_side_px)
    resized = parities.logits(in_onnx(resizing), squares, "any size")
    parities.check(
        parities.compare(parities.logits(in_onnx(exact), few, "any size"), resized),
        params.parity_tolerance,
    )
    bundles.save(
        bundle,
        graphs={EXACT: exact, **others, ANY_SIZE: resizing},
        labels=trained.card.labels,
        preprocessing=origin.preprocessing,
        provenance=provenance,
    )
    files.write_json(parity, {**asdict(measured), "temperature": divisor, "precisions": verdicts})
    _log.info(
        "%.1f MB of ONNX; differs from torch by at most %.1e on %s images",
        len(exact) / 1e6,
        measured.max_difference,
        measured.images,
    )


def _sample(
    squares: Chunks, assignments: Sequence[Assignment], card: models.Card, part: str
) -> "Sample":
    from tlpipe.onnx_export.parity import Sample

    rows = [i for i, row in enumerate(assignments) if row.split == part]
    numbers = {label: number for number, label in enumerate(card.labels)}
    truth = np.array([numbers[assignments[row].label] for row in rows], np.int64)
    return Sample(squares, card.origin.preprocessing.crop_px, rows, truth)


def _candidates(
    whole: "ModelProto", train: "Sample", params: Params, threads: int
) -> Iterator[tuple[str, "ModelProto"]]:
    """Yield the graph in each precision that was asked for and makes sense here."""
    from tlpipe.onnx_export import precisions

    if "fp16" in params.precisions and has_cuda():
        yield "fp16", precisions.to_fp16(whole)
    if "int8" in params.precisions:
        chosen = train.first(params.calibration_images)
        yield "int8", precisions.to_int8(whole, chosen, threads)


def _provenance(card: models.Card, divisor: float, workspace: Path) -> dict[str, Any]:
    """Return what the model was made of: no times, no paths of this machine."""
    import onnxruntime

    return {
        **card.model_dump(exclude={"labels"}),
        **lineage.of_inputs(workspace),
        "temperature": divisor,
        "packages": {package: version(package) for package in _PACKAGES}
        | {"onnxruntime": onnxruntime.__version__},  # by this name with and without a GPU
    }
