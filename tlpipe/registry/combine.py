"""Write one bundle of several members: all of them answer, or their weights are averaged."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tlpipe import bundle as bundles
from tlpipe import files, held_out
from tlpipe.bundle import ANY_SIZE
from tlpipe.data import pixels as packed
from tlpipe.data.images import Preprocessing
from tlpipe.data.manifest import Assignment, load_split, rows_of
from tlpipe.data.pixels import PackedPixels
from tlpipe.errors import DataError, ParamsError
from tlpipe.export import export
from tlpipe.held_out import HeldOut
from tlpipe.registry import tracking
from tlpipe.registry.gate import Measured
from tlpipe.registry.members import Member
from tlpipe.resampling import group_numbers
from tlpipe.training import model as trained
from tlpipe.training.train import HISTORY

if TYPE_CHECKING:
    from tlpipe.export.graph import Sample
    from tlpipe.export.pool import Floats, Labels
    from tlpipe.export.pool import Member as Part

_log = logging.getLogger(__name__)
_PACKAGES = ("numpy", "onnx", "pillow", "scipy")
_LEAST = 8  # independent images held out
_ANY_SIZE_IMAGES = 8


@dataclass(frozen=True)
class Answers:
    """Log probabilities for images that no member has trained on, by row.

    ``rows``, ``labels``: (N,); ``members``: (M, N, C); ``together``: (N, C), of a mixture each
    image's with weights that were fitted without it; ``weights``: (M,).
    """

    rows: "Labels"
    labels: "Labels"
    members: "Floats"
    together: "Floats"
    weights: "Floats"


def mix(
    found: Sequence[Member],
    measured: Measured,
    folder: Path,
    _: Path,
    params: export.Params,
) -> Answers:
    """Write a graph in which all members answer, with weights and a temperature fitted."""
    from tlpipe.export import pool

    stored, assignments = packed.load(measured.pixels), load_split(measured.split)
    common = pool.common_preprocessing([one.preprocessing for one in found], stored.sampling)
    threads = max(one.bundle.provenance["origin"]["threads"] for one in found)
    parts = [_part(member) for member in found]
    rows, labels, answers = _held_out(found, parts, stored, assignments, common, threads)
    groups = [assignments[row].group for row in rows]
    if (independent := len(np.unique(group_numbers(groups)))) < _LEAST:
        raise DataError(
            f"weights cannot be fitted: {independent} independent images were held out of every "
            f"member; expected {_LEAST} at least. Add images."
        )
    weights = pool.rounded(pool.solve_weights(answers, labels))
    together = pool.cross_fit(answers, labels, groups)
    logits = together.astype(np.float32)
    temperature = held_out.fit_temperature(logits, labels)
    kept = np.flatnonzero(weights).tolist()
    _check_several(
        [one.name for one in found], kept, len(rows), "mixture has a lower log loss than"
    )
    provenance = _provenance(found, weights, temperature, common, measured, threads)
    _save_bundle(
        folder,
        [parts[number] for number in kept],
        weights[kept],
        common,
        _sample(stored, assignments, rows_of(assignments, "test"), found[0], common),
        found[0].bundle.labels,
        provenance,
        params,
    )
    (folder / "model").mkdir()
    none = np.zeros(len(rows), np.int64)
    held_out.save(folder / "model" / held_out.NAME, HeldOut(rows, labels, logits, none))
    files.write_json(folder / "model" / tracking.ENSEMBLE, provenance["ensemble"])
    _save_history(folder / "history.csv", labels, answers, groups)
    calibrated = pool.log_softmax(logits, temperature)
    return Answers(rows, labels, answers, calibrated, weights)


def _check_several(names: Sequence[str], kept: Sequence[int], images: int, gain: str) -> None:
    """Check that more than one member is left; say which are not.

    Raises:
        ParamsError: there is one alone.
    """
    others = ", ".join(name for number, name in enumerate(names) if number not in kept)
    if len(kept) < 2:
        raise ParamsError(
            f"nothing was made: on {images} images held out, no {gain} {names[kept[0]]} "
            f"alone, so {others} would be left out; expected members that err on other images. "
            f"Promote that one, or name others."
        )
    if others:
        _log.info("left out, since on images held out nothing is gained by it: %s", others)


def _part(member: Member) -> "Part":
    """Return a member's exact graph as the pool takes it."""
    import onnx
    from onnx import numpy_helper

    from tlpipe.export import graph, pool

    model = onnx.load(member.bundle.model)
    divisor = next(t for t in model.graph.initializer if t.name == graph.TEMPERATURE)
    return pool.Member(model, float(numpy_helper.to_array(divisor)), member.preprocessing)


def _held_out(
    found: Sequence[Member],
    parts: "Sequence[Part]",
    stored: PackedPixels,
    assignments: Sequence[Assignment],
    common: Preprocessing,
    threads: int,
) -> "tuple[Labels, Labels, Floats]":
    """Return the images held out of all members: rows, labels, log probabilities (M, N, C).

    Members that were trained on other squares than are stored here are asked again, as the ensemble
    shows images to them: a linear probe by the heads of its folds, since it has itself trained on
    these images.
    """
    from tlpipe.export import pool

    rows = sorted(set.intersection(*({*member.held.rows.tolist()} for member in found)))
    again = [number for number, one in enumerate(found) if one.sampling != stored.sampling]
    taken = {}
    if again and rows:
        sample = _sample(stored, assignments, rows, found[0], common)
        asked = [parts[number] for number in again]
        inputs = pool.last_inputs(asked, common, sample, threads)
        taken = dict(zip(again, inputs, strict=True))
    held = [_in_order(member.held.only(rows)) for member in found]
    logits = [
        pool.held_out_logits(part, one, taken[number]) if number in taken else one.logits
        for number, (part, one) in enumerate(zip(parts, held, strict=True))
    ]
    answers = [
        pool.log_softmax(one, part.temperature) for one, part in zip(logits, parts, strict=True)
    ]
    return np.array(rows, np.int64), held[0].labels, np.stack(answers)


def _in_order(held: HeldOut) -> HeldOut:
    """Return the same, by row."""
    order = np.argsort(held.rows)
    return HeldOut(
        held.rows[order], held.labels[order], held.logits[order], held.folds[order], held.heads
    )


def _sample(
    stored: PackedPixels,
    assignments: Sequence[Assignment],
    rows: Sequence[int],
    member: Member,
    common: Preprocessing,
) -> "Sample":
    from tlpipe.export.graph import Sample

    numbers = {label: number for number, label in enumerate(member.bundle.labels)}
    truth = np.array([numbers[assignments[row].label] for row in rows], np.int64)
    groups = [assignments[row].group for row in rows]
    return Sample(stored.array, common.crop_px, rows, truth, groups)


def _provenance(
    found: Sequence[Member],
    weights: "Floats",
    temperature: float,
    common: Preprocessing,
    measured: Measured,
    threads: int,
) -> dict[str, Any]:
    """Return what the ensemble was made of; equal members give equal bytes, at any commit."""
    import onnxruntime

    origins = [member.bundle.provenance["origin"] for member in found]
    mixed = [
        {
            "model": member.name,
            "bundle": member.bundle.digest,
            "weight": weight,
            "temperature": member.bundle.provenance["temperature"],
            "backbone": origin["backbone"],
            "freeze": origin["freeze"],
            "preprocessing": member.preprocessing.model_dump(),
        }
        for member, origin, weight in zip(found, origins, weights.tolist(), strict=True)
        if weight
    ]
    return {
        "ensemble": mixed,
        "origin": {
            "backbone": "ensemble",
            "weights": "",
            "weights_sha256": "",
            "freeze": "",
            "preprocessing": common.model_dump(),
            "data_sha256": files.sha256(measured.manifest),
            "data_version": origins[0]["data_version"],
            "threads": threads,
        },
        "split_sha256": files.sha256(measured.split),
        "git_commit": "",
        "temperature": temperature,
        "packages": {package: version(package) for package in _PACKAGES}
        | {"onnxruntime": onnxruntime.__version__},
    }


def _save_bundle(
    folder: Path,
    parts: "Sequence[Part]",
    weights: "Floats",
    common: Preprocessing,
    test: "Sample",
    labels: tuple[str, ...],
    provenance: dict[str, Any],
    params: export.Params,
) -> None:
    """Write the bundle once its graphs have proven equal to the members, and the parity report."""
    from tlpipe.export import graph, pool

    threads, temperature = provenance["origin"]["threads"], provenance["temperature"]
    metadata = bundles.metadata(labels, common, provenance)
    whole = pool.merged(parts, weights, common)
    exact = graph.finished(whole, temperature, metadata)
    tested = test.first(params.parity_images)
    tolerance = params.parity_tolerance
    parity = pool.check_pool(exact, parts, weights, common, tested, tolerance, threads)
    resizing = graph.finished(graph.with_any_size(whole, common), temperature, metadata)
    graph.check_any_size(
        resizing,
        graph.in_onnx(exact, threads),
        tested.first(_ANY_SIZE_IMAGES),
        common,
        tolerance=tolerance,
        threads=threads,
    )
    bundles.save(
        folder / "bundle",
        graphs={"fp32": exact, ANY_SIZE: resizing},
        labels=labels,
        preprocessing=common,
        provenance=provenance,
    )
    report = {**asdict(parity), "temperature": temperature, "precisions": {}}
    files.write_json(folder / "parity.json", report)


def _save_history(path: Path, labels: "Labels", answers: "Floats", groups: Sequence[str]) -> None:
    """Write what the best member alone comes to, the best two, and so on, by their log loss."""
    from tlpipe.export import pool

    losses = [pool.log_loss(one, labels) for one in answers]
    order = np.argsort(losses, kind="stable")
    rows = []
    for count in range(1, len(order) + 1):
        chosen = answers[order[:count]]
        fitted = pool.mix(chosen, pool.solve_weights(chosen, labels))
        crossed = pool.cross_fit(chosen, labels, groups)
        accuracy = float(hits(crossed, labels).mean())
        numbers = (pool.log_loss(fitted, labels), pool.log_loss(crossed, labels), accuracy)
        rows.append((count, *(f"{number:.6f}" for number in numbers), ""))
    files.write_csv(path, HISTORY, rows)


def average(
    found: Sequence[Member],
    measured: Measured,
    folder: Path,
    workspace: Path,
    params: export.Params,
) -> Answers:
    """Write the model of mean weights, and export it as the stage does."""
    from tlpipe.export import pool, soup

    stored, assignments = packed.load(measured.pixels), load_split(measured.split)
    ingredients = [
        soup.Ingredient(one.name, trained.load(one.content.model), _in_order(one.held))
        for one in found
    ]
    soup.check(ingredients)
    held = ingredients[0].held
    sample = _sample(stored, assignments, held.rows.tolist(), found[0], found[0].preprocessing)
    chosen, logits = soup.greedy(ingredients, sample)
    _check_several(
        [one.name for one in found], chosen, len(held.rows), "mean of weights is as accurate as"
    )
    model = soup.average([ingredients[number] for number in chosen], logits)
    none = np.zeros(len(held.rows), np.int64)
    answers = HeldOut(held.rows, held.labels, logits, none)
    trained.save(folder / "model", model, answers)
    export.run(
        model=folder / "model",
        pixels=measured.pixels,
        split=measured.split,
        bundle=folder / "bundle",
        parity=folder / "parity.json",
        workspace=workspace,
        params=params,
    )
    temperature = bundles.load(folder / "bundle").provenance["temperature"]
    together = pool.log_softmax(logits, temperature)
    loss, accuracy = pool.log_loss(together, held.labels), hits(together, held.labels).mean()
    row = (len(chosen), "", f"{loss:.6f}", f"{accuracy:.6f}", "")
    files.write_csv(folder / "history.csv", HISTORY, [row])
    weights = np.zeros(len(found))
    weights[chosen] = 1 / len(chosen)
    alone = [
        pool.log_softmax(one.held.logits, member.bundle.provenance["temperature"])
        for one, member in zip(ingredients, found, strict=True)
    ]
    return Answers(held.rows, held.labels, np.stack(alone), together, weights)


def hits(answers: "Floats", truth: "Labels") -> npt.NDArray[np.bool_]:
    """Return which images are answered rightly, by log probabilities (N, C)."""
    right: npt.NDArray[np.bool_] = answers.argmax(axis=1) == truth
    return right
