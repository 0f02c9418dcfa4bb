"""Command ``ensemble``: several registered versions as one, measured, registered and gated as any.

Either all of them answer, and their probabilities are mixed, or their weights are averaged (a
soup). What decides is what they answer for images held out, which each member's run keeps; test
images decide nothing. All lies in one folder, which is replaced whole, and registered from there.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tlpipe import files, held_out
from tlpipe.data import charts, ingest
from tlpipe.data import pixels as packed
from tlpipe.data.manifest import Assignment, load_split
from tlpipe.errors import ArtifactError
from tlpipe.evaluation import evaluate
from tlpipe.export import export
from tlpipe.registry import Registered, combine, members, register, tracking
from tlpipe.registry.combine import Answers
from tlpipe.registry.gate import Measured
from tlpipe.registry.members import Member
from tlpipe.resampling import paired_difference, share_interval

if TYPE_CHECKING:
    from tlpipe.export.pool import Floats


@dataclass(frozen=True)
class Settings:
    """The parameters of the stages whose work is done here, and from where images come."""

    export: export.Params
    evaluate: evaluate.Params
    register: register.Params
    source: ingest.Params


@dataclass(frozen=True)
class Row:
    """What one member, or all together, came to.

    Attributes:
        name: of the member; empty for all together.
        weight: of the member, 0 where nothing was gained by it and it was left out.
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
    """What was made, of which members; ``best`` of them by accuracy on images held out.

    Attributes:
        members: in the order in which they were named.
        together: the ensemble.
        best: name of the member.
        change: by how much more often than that one the ensemble is right on the test split, as
            ``paired_difference`` gives it.
        images: how many were held out of all members.
        tested: how many test images there are.
        is_soup: whether weights were averaged; its members were then chosen on these images.
    """

    members: tuple[Row, ...]
    together: Row
    best: str
    change: dict[str, float]
    images: int
    tested: int
    is_soup: bool


def run(
    *,
    models: Sequence[Registered | Path],
    is_soup: bool,
    measured: Measured,
    folder: Path,
    workspace: Path,
    settings: Settings,
) -> Made:
    """Make, evaluate and register one model of several versions; write all into ``folder``.

    Args:
        models: a bundle's folder is the version of the project's model that has its content.
        is_soup: average weights, instead of mixing probabilities.
        measured: images of the project, which must be those that all members were trained on.
        folder: is replaced whole.
        workspace: the project.
        settings: of the project.

    Raises:
        ArtifactError: a member was trained on other data, or something is damaged.
        DataError: too few images were held out.
        ParamsError: members differ in labels, are too few, or nothing is gained by them.
        ParityError: the graph answers otherwise than its members.
        RegistryError: a version does not exist, or its run does not keep what is needed.
        TrainingError: another ensemble is made here.
    """
    lock = files.locked(folder.with_name(f".{folder.name}.lock"), "an ensemble")
    with lock, TemporaryDirectory() as temporary:
        with tracking.connection(workspace) as client:
            found = [
                members.fetch(client, model, settings.register.name, Path(temporary, str(number)))
                for number, model in enumerate(models)
            ]
        members.check(found)
        members.check_data(found, measured.split)
        stored = packed.load(measured.pixels).sampling
        members.check_squares(found, stored, is_exact=is_soup)
        # What is known of the data hangs on the squares that were looked at: those stored here.
        base = next((one for one in found if one.sampling == stored), found[0])
        with files.replacing_folder(folder) as new:
            make = combine.average if is_soup else combine.mix
            answers = make(found, measured, new, workspace, settings.export)
            evaluate.run(
                pixels=measured.pixels,
                manifest=measured.manifest,
                split=measured.split,
                held_out=new / "model" / held_out.NAME,
                leaks_report=base.content.leaks_report,
                params=settings.evaluate,
                **{name: new / place for name, place in _WRITTEN.items() if name in _MEASURED},
            )
            made = _compare(found, answers, measured.split, new, is_soup)
            files.write_json(new / "members.json", asdict(made))
            (new / "plots" / "training.png").unlink()  # of epochs, which there were none of
            _draw(new / "plots" / "ensemble.png", made)
        kept = {name: folder / place for name, place in _WRITTEN.items() if name != "tables"}
        register.run(
            content=replace(base.content, **kept, manifest=measured.manifest, split=measured.split),
            measured=measured,
            receipt=folder / "receipt.json",
            workspace=workspace,
            source=settings.source,
            params=settings.register,
        )
    return made


# By the names of graph.PATHS.
_MEASURED = ("bundle", "history", "report", "speed", "predictions", "tables", "plots", "examples")
_WRITTEN = {
    "model": "model",
    "bundle": "bundle",
    "parity": "parity.json",
    "history": "history.csv",
    "report": "report.json",
    "speed": "speed.json",
    "predictions": "predictions.csv",
    "tables": "tables",
    "plots": "plots",
    "examples": "examples",
}


def _compare(
    found: Sequence[Member], answers: Answers, split: Path, folder: Path, is_soup: bool
) -> Made:
    """Compare all together with each member: on images held out, and on the test split.

    What members answered for test images is what ``evaluate`` has written of them.
    """
    from tlpipe.export import pool

    assignments = load_split(split)
    groups = [assignments[row].group for row in answers.rows]
    tested = [row for row in assignments if row.split == "test"]
    place = [row.group for row in tested]
    report = files.read_json(folder / "report.json")
    confidence = report["precisions"]["fp32"]["accuracy"]["confidence"]

    def row(name: str, weight: float, given: "Floats", test: npt.NDArray[np.bool_]) -> Row:
        return Row(
            name=name,
            weight=weight,
            held_out=share_interval(combine.hits(given, answers.labels), groups, confidence),
            log_loss=pool.log_loss(given, answers.labels),
            test=share_interval(test, place, confidence),
        )

    hits = [_tested(member.content.predictions, tested) for member in found]
    each = zip(found, answers.weights.tolist(), answers.members, hits, strict=True)
    rows = [row(member.name, weight, given, test) for member, weight, given, test in each]
    by_accuracy = [(row.held_out["value"], -row.log_loss) for row in rows]
    best = by_accuracy.index(max(by_accuracy))
    own = _tested(folder / "predictions.csv", tested)
    return Made(
        members=tuple(rows),
        together=row("", 1.0, answers.together, own),
        best=rows[best].name,
        change=paired_difference(hits[best], own, place, confidence),
        images=len(answers.rows),
        tested=len(tested),
        is_soup=is_soup,
    )


def _tested(predictions: Path, tested: Sequence[Assignment]) -> npt.NDArray[np.bool_]:
    """Return which of the test images were answered rightly, by a table of ``evaluate``.

    Raises:
        ArtifactError: it is of other images.
    """
    rows = list(files.read_csv(predictions, evaluate.PREDICTIONS))
    if [row[:2] for row in rows] != [[row.path, row.label] for row in tested]:
        raise ArtifactError(
            f"{predictions} is of other test images than the split table; expected the same. "
            f"Register the version anew."
        )
    return np.array([label == predicted for _, label, predicted, *_ in rows], bool)


def _draw(path: Path, made: Made) -> None:
    """Draw the accuracy of each member and of all together, and the weights."""
    rows = [*made.members, made.together]
    places = np.arange(len(rows))
    figure = charts.new_figure(11, 1.8 + 0.5 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    kinds = (
        ([row.held_out for row in rows], -0.12, f"{made.images:,} images held out"),
        ([row.test for row in rows], 0.12, f"{made.tested:,} test images"),
    )
    for found, offset, label in kinds:
        values = [one["value"] for one in found]
        spread = charts.error_bars(found, "value")
        left.errorbar(values, places + offset, xerr=spread, fmt="o", capsize=3, label=label)
    left.set_yticks(places, [row.name or "ensemble" for row in rows])
    left.invert_yaxis()
    left.set_xlabel(f"accuracy, {rows[0].test['confidence']:.0%} intervals", fontsize=12)
    left.legend()
    weights = [row.weight for row in made.members]
    right.barh(places[:-1], weights, height=0.5, color="gray")
    for place, weight in enumerate(weights):
        right.text(weight, place, f" {weight:.3f}", va="center")
    right.set_xlim(0, 1.35 * max(weights))
    right.set_xlabel("weight", fontsize=12)
    charts.save_figure(figure, path)
