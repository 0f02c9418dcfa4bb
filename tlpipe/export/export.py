"""Stage ``export``: write the bundle, after its graphs have proven equal to the trained model."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from tlpipe import bundle as bundles
from tlpipe import files, held_out, versioning
from tlpipe.backbones.backbone import describe
from tlpipe.bundle import ANY_SIZE
from tlpipe.data import pixels as packed
from tlpipe.data.manifest import SPLITS, Assignment, load_split, rows_of
from tlpipe.data.pixels import Chunks
from tlpipe.held_out import HeldOut
from tlpipe.params import Section, check_effect, distinct
from tlpipe.training import model as models

if TYPE_CHECKING:
    from onnx import ModelProto

    from tlpipe.export.graph import Logits, Sample
    from tlpipe.export.precisions import Correct

_log = logging.getLogger(__name__)
_PACKAGES = (
    *("torch", "torchvision", "timm", "onnx", "onnx-ir", "onnxscript", "numpy", "scipy", "pillow"),
)
_ANY_SIZE_IMAGES = 8
_FITTED = 2  # times the calibration images: what fits the last layer of int8


class Params(Section):
    """Which graphs are written, and how exact they must be.

    ``precisions`` is int8 alone by default. fp16 is for those who serve on a GPU: on a CPU it is no
    faster than fp32, it adds half of fp32's bytes to every bundle, and checking it takes a second
    pass over the held-out images. Whoever has GPUs asks for it; a machine that happens to have one
    changes nothing, so that equal inputs give an equal choice of graphs everywhere.
    """

    parity_images: int = Field(
        default=64, ge=1, description="Test images to compare with the trained model, at most."
    )
    parity_tolerance: float = Field(
        default=1e-4,
        gt=0,
        le=0.1,
        description="Largest difference of a logit; of the logits' spread, where that exceeds 1.",
    )
    precisions: Annotated[tuple[Literal["fp16", "int8"], ...], AfterValidator(distinct)] = Field(
        default=("int8",),
        strict=False,
        description="Graphs beside fp32; fp16 is for GPUs, and made on any machine.",
    )
    calibration_images: int = Field(
        default=64,
        ge=1,
        description="Training images that set the ranges of int8; twice as many fit its last "
        "layer, at most.",
    )
    max_accuracy_drop: float = Field(
        default=0.01, ge=0, lt=1, description="Of a lower precision, on validation, at most."
    )

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> "Params":
        if "int8" not in self.precisions:
            of_int8 = ("calibration_images",) if "fp16" not in self.precisions else ()
            reason = f"export.precisions is {list(self.precisions)}"
            none = () if self.precisions else ("max_accuracy_drop",)
            check_effect("export", self, (*of_int8, *none), reason)
        return self


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
        ParityError: a graph and the model differ on real images, or int8 could saturate; nothing is
            written.
    """
    from tlpipe.export import graph

    trained = models.load(model)
    origin = trained.card.origin
    backbone = describe(origin.backbone)
    weights = backbone.find_weights(origin.weights, origin.weights_sha256)
    assignments = load_split(split)
    sample = partial(_sample, packed.load(pixels).array, assignments, trained.card)
    in_onnx = partial(graph.in_onnx, threads=origin.threads)

    whole = graph.classifier(backbone, weights, trained)
    held = held_out.load(model / held_out.NAME)
    divisor = held_out.fit_temperature(held.logits, held.labels)
    provenance = _provenance(trained.card, divisor, workspace)
    metadata = bundles.metadata(trained.card.labels, origin.preprocessing, provenance)
    finish = partial(graph.finished, temperature=divisor, metadata=metadata)

    exact = finish(whole)
    train, validation, test = (rows_of(assignments, part) for part in SPLITS)
    tested = sample(test).first(params.parity_images)
    expected = graph.compute_logits(
        graph.trained_model(trained, backbone, weights), tested, "the trained model"
    )
    measured = graph.measure_parity(
        expected, graph.compute_logits(in_onnx(exact), tested, "ONNX Runtime")
    )
    graph.check_parity(measured, params.parity_tolerance)

    checked = held.only(validation)
    others, checks = _lower_precisions(
        whole,
        exact,
        finish,
        checked,
        images=sample(checked.rows.tolist()),
        fitted=sample(train).first(_FITTED * params.calibration_images),
        threads=origin.threads,
        params=params,
    )
    resizing = finish(graph.with_any_size(whole, origin.preprocessing))
    graph.check_any_size(
        resizing,
        in_onnx(exact),
        tested.first(_ANY_SIZE_IMAGES),
        origin.preprocessing,
        tolerance=params.parity_tolerance,
        threads=origin.threads,
    )
    bundles.save(
        bundle,
        graphs={"fp32": exact, **others, ANY_SIZE: resizing},
        labels=trained.card.labels,
        preprocessing=origin.preprocessing,
        provenance=provenance,
    )
    files.write_json(parity, {**asdict(measured), "temperature": divisor, "precisions": checks})
    _log.info(
        "%.1f MB of ONNX; differs from the trained model by at most %.1e on %s images",
        len(exact) / 1e6,
        measured.max_difference,
        measured.images,
    )


def _sample(
    squares: Chunks, assignments: Sequence[Assignment], card: models.Card, rows: Sequence[int]
) -> "Sample":
    from tlpipe.export.graph import Sample

    numbers = {label: number for number, label in enumerate(card.labels)}
    chosen = [assignments[row] for row in rows]
    truth = np.array([numbers[row.label] for row in chosen], np.int64)
    groups = [row.group for row in chosen]
    return Sample(squares, card.origin.preprocessing.crop_px, rows, truth, groups)


def _lower_precisions(
    whole: "ModelProto",
    exact: bytes,
    finish: Callable[["ModelProto"], bytes],
    held: HeldOut,
    *,
    images: "Sample",
    fitted: "Sample",
    threads: int,
    params: Params,
) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
    """Return the graphs beside fp32 that are good enough to ship, and what was found of each."""
    from tlpipe.export import graph, precisions

    shipped, checks = {}, {}
    head = graph.last_layer_bytes(whole)
    for name, candidate, correct in _candidates(whole, fitted, params, threads):
        content = finish(candidate)
        verdict = precisions.judge(
            name,
            held.logits,
            _held_out_logits(name, content, held, images, correct, threads),
            held.labels,
            images.groups,
            size=(len(content) - head) / (len(exact) - head),
            max_drop=params.max_accuracy_drop,
        )
        checks[name] = asdict(verdict)
        if verdict.reason:
            _log.warning("%s does not ship: %s", name, verdict.reason)
        else:
            _log.info("%s ships: %s", name, verdict)
            shipped[name] = content
    return shipped, checks


def _candidates(
    whole: "ModelProto", fitted: "Sample", params: Params, threads: int
) -> Iterator[tuple[str, "ModelProto", "Correct | None"]]:
    """Yield the graph in each precision that was asked for, whatever this machine has.

    And what its last layer was fitted by, if it was.
    """
    from tlpipe.export import precisions

    count = params.calibration_images
    if "fp16" in params.precisions:
        yield "fp16", precisions.to_fp16(whole, fitted.first(count), threads), None
    if "int8" in params.precisions:
        yield "int8", *precisions.to_int8(whole, fitted, threads, calibration_images=count)


def _held_out_logits(
    name: str,
    content: bytes,
    held: HeldOut,
    images: "Sample",
    correct: "Correct | None",
    threads: int,
) -> "Logits":
    """Return what a graph, as it would ship, answers for images held out.

    A linear probe has trained on them, so the heads of its folds answer, on what the graph makes of
    the images up to its last layer.
    """
    import onnx

    from tlpipe.export import precisions
    from tlpipe.export.graph import compute_features, compute_logits, in_onnx

    if name == "int8":
        precisions.check_no_saturation(content)
    if not held.heads:
        return compute_logits(in_onnx(content, threads), images, name)
    taken = compute_features(onnx.load_from_string(content), images, threads)
    return precisions.out_of_fold_logits(held, taken, correct)


def _provenance(card: models.Card, divisor: float, workspace: Path) -> dict[str, Any]:
    """Return what the model was made of: no times, no paths of this machine."""
    import onnxruntime

    stated = card.model_dump(exclude={"labels"})
    if not stated["origin"]["weights"].startswith("models:/"):  # what a registry holds is no path
        stated["origin"]["weights"] = PurePath(stated["origin"]["weights"]).name
    made_at = versioning.of_inputs(workspace)
    if card.soup:  # the versions that it was made of say all, and none of it was trained here
        made_at = dict.fromkeys(made_at, "")
    return {
        **stated,
        **made_at,
        "temperature": divisor,
        "packages": {package: version(package) for package in _PACKAGES}
        | {"onnxruntime": onnxruntime.__version__},  # by this name with and without a GPU
    }
