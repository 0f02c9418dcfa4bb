"""Command ``ensemble``: several registered versions as one, measured, registered and gated as any.

Weights and temperature are fitted on answers for images held out, which each member's run keeps;
test images decide nothing. Everything lies in one folder, which is replaced whole, before it is
registered from there.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tlpipe import bundle as bundles
from tlpipe import files, held_out
from tlpipe.bundle import ANY_SIZE, Bundle
from tlpipe.data import charts, ingest
from tlpipe.data import pixels as packed
from tlpipe.data.images import Preprocessing, Sampling
from tlpipe.data.manifest import Assignment, load_split, rows_of
from tlpipe.errors import ArtifactError, DataError, ParamsError, RegistryError
from tlpipe.evaluation import evaluate
from tlpipe.export import export
from tlpipe.held_out import HeldOut
from tlpipe.registry import Registered, moves, register, tracking, versions
from tlpipe.registry.gate import Measured, sampling_of
from tlpipe.registry.publishing import Content
from tlpipe.resampling import group_numbers, paired_difference, share_interval
from tlpipe.training.train import HISTORY

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tlpipe.export.graph import Parity, Sample
    from tlpipe.export.pool import Floats, Labels
    from tlpipe.export.pool import Member as PoolMember

_log = logging.getLogger(__name__)
_LEAST = 8  # independent images held out
_ANY_SIZE_IMAGES = 8
_PACKAGES = ("numpy", "onnx", "pillow", "scipy")


@dataclass(frozen=True)
class Member:
    """A registered version, and what its run keeps; ``name``: ``NAME@VERSION``."""

    name: str
    bundle: Bundle
    content: Content
    held: HeldOut

    @property
    def preprocessing(self) -> Preprocessing:
        """How it wants images."""
        return self.bundle.preprocessing

    @property
    def sampling(self) -> Sampling:
        """How images were stored that it was trained on."""
        return sampling_of(self.bundle)


@dataclass(frozen=True)
class Row:
    """What one member, or all together, came to.

    Attributes:
        name: of the member; empty for all together.
        weight: in the ensemble; 0 where it adds nothing and was left out.
        held_out: accuracy on images held out, as ``share_interval`` gives it.
        log_loss: on these, in nats.
        test: accuracy on the test split.
    """

    name: str
    weight: float
    held_out: dict[str, float]
    log_loss: float
    test: dict[str, float]


@dataclass(frozen=True)
class Made:
    """What was made, of which members; ``best`` of them on images held out.

    ``change``: by how much more often than that one it is right on the test split, as
    ``paired_difference`` gives it; ``images``: how many were held out.
    """

    members: tuple[Row, ...]
    together: Row
    best: str
    change: dict[str, float]
    images: int
    tested: int


@dataclass(frozen=True)
class Settings:
    """The parameters of the stages whose work is done here, and what the gate reads."""

    export: export.Params
    evaluate: evaluate.Params
    register: register.Params
    source: ingest.Params


def run(
    *,
    models: Sequence[Registered | Path],
    measured: Measured,
    folder: Path,
    workspace: Path,
    settings: Settings,
) -> Made:
    """Make, evaluate and register an ensemble of registered versions; write all into ``folder``.

    A bundle's folder is taken for the version of the project's model that has its content.

    Raises:
        ArtifactError: the members' data are not those of this project, or something is damaged.
        DataError: too few images were held out.
        ParamsError: members differ in labels, cannot see what is stored, or are too few.
        ParityError: the graph answers otherwise than its members.
        RegistryError: a version does not exist, or its run does not keep what is needed.
    """
    name = settings.register.name
    with TemporaryDirectory() as temporary:
        with tracking.connection(workspace) as client:
            members = [
                _fetch(client, model, name, Path(temporary, str(number)))
                for number, model in enumerate(models)
            ]
        _check(members)
        assignments = _check_data(members, measured)
        content = _content(members[0].content, folder, measured)
        with files.replacing_folder(folder) as new:
            made = _make(members, assignments, measured, new, settings)
        register.run(
            content=content,
            measured=measured,
            receipt=folder / "receipt.json",
            workspace=workspace,
            source=settings.source,
            params=settings.register,
        )
    return made


def _fetch(client: "MlflowClient", model: Registered | Path, name: str, folder: Path) -> Member:
    """Fetch a version with all that its run keeps."""
    if isinstance(model, Path):
        digest = bundles.load(model).digest
        try:
            found = tracking.find_version(client, name, digest)
        except RegistryError:
            raise RegistryError(
                f"{model} is no version of {name}, and a bundle alone does not say what it answers "
                f"for images held out; expected what is registered. Register it: 'tlpipe run', or "
                f"name another."
            ) from None
    else:
        found = tracking.find_version(client, model.name, model.which)
        if model.which == moves.CHAMPION:
            tracking.check_promoted(client, found)
    folder.mkdir()
    content, bundle, _ = versions.fetch(client, found, folder)
    called = f"{found.name}@{found.version}"
    if names := bundles.members(bundle.provenance):
        raise ParamsError(
            f"{called} is itself made of {', '.join(names)}; expected versions that were trained. "
            f"Name those."
        )
    return Member(called, bundle, content, held_out.load(content.model / held_out.NAME))


def _check(members: Sequence[Member]) -> None:
    """Check that there are several members, with the same labels.

    Raises:
        ParamsError: there are not.
    """
    if len(members) < 2:
        raise ParamsError(
            f"an ensemble of {members[0].name} alone is {members[0].name}; expected two versions "
            f"or more. Name another: 'tlpipe models' lists them."
        )
    first, *others = members
    known = {first.bundle.digest: first.name}
    for member in others:
        if same := known.get(member.bundle.digest):
            raise ParamsError(
                f"{same} and {member.name} are the same bundle, sha256 "
                f"{member.bundle.digest[:16]}...; expected each once. Take one away."
            )
        known[member.bundle.digest] = member.name
        if member.bundle.labels != first.bundle.labels:
            theirs, ours = {*member.bundle.labels}, {*first.bundle.labels}
            apart = [f"has {one}" for one in sorted(theirs - ours)]
            apart += [f"lacks {one}" for one in sorted(ours - theirs)]
            raise ParamsError(
                f"{member.name} has other labels than {first.name}: it "
                f"{', '.join(apart) or 'has them in another order'}; expected the same in the same "
                f"order. Leave it out, or train it on the same data."
            )


def _check_data(members: Sequence[Member], measured: Measured) -> list[Assignment]:
    """Check that all members were trained on what is here, split as it is; return the split table.

    Groups may differ: whether two images are nearly equal is looked up in squares of the size that
    a backbone wants.

    Raises:
        ArtifactError: a member was trained on other images, labels or splits.
    """
    here = load_split(measured.split)
    facts = [(row.key, row.label, row.split) for row in here]
    for member in members:
        theirs = [(row.key, row.label, row.split) for row in load_split(member.content.split)]
        if theirs == facts:
            continue
        apart = len({*theirs} ^ {*facts})
        what = f"{apart} rows differ" if apart else "the order differs"
        raise ArtifactError(
            f"{member.name} was trained on other data than {measured.split} holds: of "
            f"{len(theirs)} images there and {len(here)} here, {what} in image, label or split; "
            f"expected the same. Leave it out, train it on these, or check out the data of all "
            f"members."
        )
    return here


def _content(known: Content, folder: Path, measured: Measured) -> Content:
    """Return what the run keeps: what is made here, and what a member's run knows of the data."""
    made = {
        name: folder / place
        for name, place in (
            *(("model", "model"), ("bundle", "bundle"), ("parity", "parity.json")),
            *(("report", "report.json"), ("speed", "speed.json"), ("plots", "plots")),
            *(("predictions", "predictions.csv"), ("examples", "examples")),
            ("history", "history.csv"),
        )
    }
    return replace(known, **made, manifest=measured.manifest, split=measured.split)


def _make(
    members: Sequence[Member],
    assignments: Sequence[Assignment],
    measured: Measured,
    folder: Path,
    settings: Settings,
) -> Made:
    """Fit weights and temperature, write the bundle and what its run keeps, and evaluate it."""
    from tlpipe.export import pool

    stored = packed.load(measured.pixels)
    common = _common(members, stored.sampling)
    threads = max(member.bundle.provenance["origin"]["threads"] for member in members)
    parts = [_part(member) for member in members]
    held = _held_out(members, parts, stored, assignments, common, threads)
    groups = [assignments[row].group for row in held.rows]
    if (independent := len(np.unique(group_numbers(groups)))) < _LEAST:
        raise DataError(
            f"weights cannot be fitted: {independent} independent images were held out of every "
            f"member; expected {_LEAST} at least. Add images."
        )
    weights = pool.rounded(pool.solve_weights(held.answers, held.labels))
    pooled = pool.cross_fit(held.answers, held.labels, groups)
    logits = pooled.astype(np.float32)
    temperature = held_out.fit_temperature(logits, held.labels)
    kept = _with_weight(members, weights, len(held.rows))
    parity = _save_bundle(
        folder / "bundle",
        [parts[number] for number in kept],
        weights[kept],
        common,
        sample=_sample(
            stored.array,
            assignments,
            rows_of(assignments, "test"),
            members[0].bundle.labels,
            common,
        ).first(settings.export.parity_images),
        tolerance=settings.export.parity_tolerance,
        labels=members[0].bundle.labels,
        provenance=_provenance(members, weights, temperature, common, measured, threads),
    )
    files.write_json(
        folder / "parity.json", {**asdict(parity), "temperature": temperature, "precisions": {}}
    )
    (folder / "model").mkdir()
    alone = np.zeros(len(held.rows), np.int64)
    held_out.save(folder / "model" / held_out.NAME, HeldOut(held.rows, held.labels, logits, alone))
    _save_history(folder / "history.csv", held, groups)
    _evaluate(members[0].content, measured, folder, settings.evaluate)
    made = _compare(
        members,
        weights,
        held,
        pooled,
        assignments,
        folder / "predictions.csv",
        settings.evaluate.confidence,
    )
    files.write_json(folder / "model" / tracking.MEMBERS, asdict(made))
    (folder / "plots" / "training.png").unlink()  # of epochs, which there were none of
    _draw(folder / "plots" / "ensemble.png", made)
    return made


def _with_weight(
    members: Sequence[Member], weights: "Floats", images: int
) -> npt.NDArray[np.int64]:
    """Return the numbers of the members that have a weight, at least two.

    Raises:
        ParamsError: there is one alone.
    """
    kept = np.flatnonzero(weights)
    without = np.flatnonzero(weights == 0).tolist()
    others = ", ".join(members[number].name for number in without)
    if len(kept) < 2:
        raise ParamsError(
            f"no ensemble was made: on {images} images held out, no mixture has a lower log loss "
            f"than {members[kept[0]].name} alone, and {others} would get no weight; expected two "
            f"members that err on other images. Promote that one, or name others."
        )
    if others:
        _log.info("left out, since on images held out nothing is gained by it: %s", others)
    return kept


def _save_bundle(
    folder: Path,
    parts: "Sequence[PoolMember]",
    weights: "Floats",
    common: Preprocessing,
    *,
    sample: "Sample",
    tolerance: float,
    labels: tuple[str, ...],
    provenance: Mapping[str, Any],
) -> "Parity":
    """Write the bundle, once its graphs have proven equal to the members."""
    from tlpipe.export import graph, pool

    threads, temperature = provenance["origin"]["threads"], provenance["temperature"]
    metadata = bundles.metadata(labels, common, provenance)
    whole = pool.merged(parts, weights, common)
    exact = graph.finished(whole, temperature, metadata)
    parity = pool.check_pool(
        exact, parts, weights, common, sample, tolerance=tolerance, threads=threads
    )
    resizing = graph.finished(graph.with_any_size(whole, common), temperature, metadata)
    graph.check_any_size(
        resizing,
        graph.in_onnx(exact, threads),
        sample.first(_ANY_SIZE_IMAGES),
        common,
        tolerance=tolerance,
        threads=threads,
    )
    graphs = {"fp32": exact, ANY_SIZE: resizing}
    bundles.save(folder, graphs=graphs, labels=labels, preprocessing=common, provenance=provenance)
    return parity


def _common(members: Sequence[Member], stored: Sampling) -> Preprocessing:
    """Return how the ensemble wants images: as they are stored here.

    Raises:
        ParamsError: a member was trained on larger squares, or on another range of values.
    """
    from tlpipe.export import pool

    for member in members:
        sees, origin = member.preprocessing, member.bundle.provenance["origin"]
        if sees.short_side_px > stored.short_side_px:
            raise ParamsError(
                f"{member.name} was trained on squares of {sees.short_side_px} px, and those "
                f"stored here have {stored.short_side_px}; expected as large ones, from which all "
                f"others can be made. Set embed.backbone: {origin['backbone']} in params.yaml, run "
                f"'dvc repro split', then this again."
            )
        if sees.value_range != stored.value_range:
            raise ParamsError(
                f"{member.name} was trained with ingest.value_range {sees.value_range}, and images "
                f"are stored here with {stored.value_range}; expected the same. Leave it out, or "
                f"train it anew."
            )
    return pool.common_preprocessing([member.preprocessing for member in members], stored)


def _part(member: Member) -> "PoolMember":
    """Return a member's exact graph as the pool takes it."""
    import onnx
    from onnx import numpy_helper

    from tlpipe.export import graph, pool

    model = onnx.load(member.bundle.model)
    divisor = next(t for t in model.graph.initializer if t.name == graph.TEMPERATURE)
    return pool.Member(model, float(numpy_helper.to_array(divisor)), member.preprocessing)


@dataclass(frozen=True)
class _Held:
    """Images that no member has trained on: rows (N,), labels (N,), log probabilities (M, N, C)."""

    rows: "Labels"
    labels: "Labels"
    answers: "Floats"


def _held_out(
    members: Sequence[Member],
    parts: "Sequence[PoolMember]",
    stored: packed.PackedPixels,
    assignments: Sequence[Assignment],
    common: Preprocessing,
    threads: int,
) -> _Held:
    """Return what the members answer for images that were held out of all of them.

    Those that were trained on squares of another kind than is stored here are asked again, as the
    ensemble shows images to them: a linear probe by the heads of its folds, since it has itself
    trained on these images.
    """
    from tlpipe.export import pool

    rows = sorted(set.intersection(*({*member.held.rows.tolist()} for member in members)))
    again = [number for number, one in enumerate(members) if one.sampling != stored.sampling]
    taken = {}
    if again and rows:
        sample = _sample(stored.array, assignments, rows, members[0].bundle.labels, common)
        asked = [parts[number] for number in again]
        taken = dict(zip(again, pool.last_inputs(asked, common, sample, threads), strict=True))
    labels, answers = np.empty(0, np.int64), []
    for number, (member, part) in enumerate(zip(members, parts, strict=True)):
        held = _in_order(member.held.only(rows))
        labels, logits = held.labels, held.logits
        if number in taken:
            logits = pool.held_out_logits(part, held, taken[number])
        answers.append(pool.log_softmax(logits, part.temperature))
    return _Held(np.array(rows, np.int64), labels, np.stack(answers))


def _in_order(held: HeldOut) -> HeldOut:
    """Return the same, by row."""
    order = np.argsort(held.rows)
    return HeldOut(
        held.rows[order], held.labels[order], held.logits[order], held.folds[order], held.heads
    )


def _sample(
    squares: packed.Chunks,
    assignments: Sequence[Assignment],
    rows: Sequence[int],
    labels: Sequence[str],
    common: Preprocessing,
) -> "Sample":
    from tlpipe.export.graph import Sample

    numbers = {label: number for number, label in enumerate(labels)}
    truth = np.array([numbers[assignments[row].label] for row in rows], np.int64)
    groups = [assignments[row].group for row in rows]
    return Sample(squares, common.crop_px, rows, truth, groups)


def _provenance(
    members: Sequence[Member],
    weights: "Floats",
    temperature: float,
    common: Preprocessing,
    measured: Measured,
    threads: int,
) -> dict[str, Any]:
    """Return what the ensemble was made of; equal members give equal bytes, at any commit."""
    import onnxruntime

    first = members[0].bundle.provenance["origin"]
    return {
        "ensemble": [
            {
                "model": member.name,
                "bundle": member.bundle.digest,
                "weight": weight,
                "backbone": member.bundle.provenance["origin"]["backbone"],
                "freeze": member.bundle.provenance["origin"]["freeze"],
                "temperature": member.bundle.provenance["temperature"],
                "preprocessing": member.preprocessing.model_dump(),
            }
            for member, weight in zip(members, weights.tolist(), strict=True)
            if weight
        ],
        "origin": {
            "backbone": "ensemble",
            "weights": "",
            "weights_sha256": "",
            "freeze": "",
            "preprocessing": common.model_dump(),
            "data_sha256": files.sha256(measured.manifest),
            "data_version": first["data_version"],
            "threads": threads,
        },
        "split_sha256": files.sha256(measured.split),
        "git_commit": "",
        "temperature": temperature,
        "packages": {package: version(package) for package in _PACKAGES}
        | {"onnxruntime": onnxruntime.__version__},
    }


def _save_history(path: Path, held: _Held, groups: Sequence[str]) -> None:
    """Write what the best member alone comes to, the best two, and so on, by their log loss."""
    from tlpipe.export import pool

    losses = [pool.log_loss(one, held.labels) for one in held.answers]
    order = np.argsort(losses, kind="stable")
    rows = []
    for count in range(1, len(order) + 1):
        chosen = held.answers[order[:count]]
        fitted = pool.mix(chosen, pool.solve_weights(chosen, held.labels))
        fair = pool.cross_fit(chosen, held.labels, groups)
        accuracy = float(_hits(fair, held.labels).mean())
        numbers = (pool.log_loss(fitted, held.labels), pool.log_loss(fair, held.labels), accuracy)
        rows.append((count, *(f"{number:.6f}" for number in numbers), ""))
    files.write_csv(path, HISTORY, rows)


def _hits(answers: "Floats", truth: "Labels") -> npt.NDArray[np.bool_]:
    right: npt.NDArray[np.bool_] = answers.argmax(axis=1) == truth
    return right


def _evaluate(known: Content, measured: Measured, folder: Path, params: evaluate.Params) -> None:
    evaluate.run(
        bundle=folder / "bundle",
        pixels=measured.pixels,
        manifest=measured.manifest,
        split=measured.split,
        held_out=folder / "model" / held_out.NAME,
        history=folder / "history.csv",
        leaks_report=known.leaks_report,
        report=folder / "report.json",
        speed=folder / "speed.json",
        predictions=folder / "predictions.csv",
        tables=folder / "tables",
        plots=folder / "plots",
        examples=folder / "examples",
        params=params,
    )


def _compare(
    members: Sequence[Member],
    weights: "Floats",
    held: _Held,
    pooled: "Floats",
    assignments: Sequence[Assignment],
    predictions: Path,
    confidence: float,
) -> Made:
    """Compare the ensemble with its members: on images held out, and on the test split.

    What members answered on the test split is what ``evaluate`` has written of them.
    """
    from tlpipe.export import pool

    groups = [assignments[row].group for row in held.rows]
    tested = [row for row in assignments if row.split == "test"]
    place = [row.group for row in tested]

    def row(name: str, weight: float, answers: "Floats", test: npt.NDArray[np.bool_]) -> Row:
        return Row(
            name,
            weight,
            share_interval(_hits(answers, held.labels), groups, confidence),
            pool.log_loss(answers, held.labels),
            share_interval(test, place, confidence),
        )

    hits = [_tested(member.content.predictions, tested) for member in members]
    rows = [
        row(member.name, weight, answers, test)
        for member, weight, answers, test in zip(
            members, weights.tolist(), held.answers, hits, strict=True
        )
    ]
    by_accuracy = [(row.held_out["value"], -row.log_loss) for row in rows]
    best = by_accuracy.index(max(by_accuracy))
    own = _tested(predictions, tested)
    return Made(
        members=tuple(rows),
        together=row("", 1.0, pooled, own),
        best=rows[best].name,
        change=paired_difference(hits[best], own, place, confidence),
        images=len(held.rows),
        tested=len(tested),
    )


def _tested(predictions: Path, tested: Sequence[Assignment]) -> npt.NDArray[np.bool_]:
    """Return which of the test images were answered rightly, by a table of ``evaluate``.

    Raises:
        ArtifactError: it is of other images.
    """
    rows = list(files.read_csv(predictions, evaluate.PREDICTIONS))
    if [(path, label) for path, label, *_ in rows] != [(row.path, row.label) for row in tested]:
        raise ArtifactError(
            f"{predictions} is of other test images than the split table; expected the same. "
            f"Register the version anew."
        )
    return np.array([label == predicted for _, label, predicted, *_ in rows], bool)


def _draw(path: Path, made: Made) -> None:
    """Draw the accuracy of each member and of all together, and the weights."""
    rows = [*made.members, made.together]
    names = [row.name or "ensemble" for row in rows]
    places = np.arange(len(rows))
    figure = charts.new_figure(11, 1.8 + 0.5 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for which, offset, label in (
        ("held_out", -0.12, f"{made.images} images held out"),
        ("test", 0.12, f"{made.tested} test images"),
    ):
        found = [getattr(row, which) for row in rows]
        values = [one["value"] for one in found]
        spread = charts.error_bars(found, "value")
        left.errorbar(values, places + offset, xerr=spread, fmt="o", capsize=3, label=label)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel(f"accuracy, {rows[0].test['confidence']:.0%} intervals")
    left.legend()
    weights = [row.weight for row in made.members]
    right.barh(places[:-1], weights, color="gray")
    for place, weight in enumerate(weights):
        right.text(weight, place, f" {weight:.3f}", va="center")
    right.set_xlim(0, 1.2 * max(weights))
    right.set_xlabel("weight")
    charts.save_figure(figure, path)
