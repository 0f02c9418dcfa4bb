"""What a sweep has found: a table, a picture, and what to do next."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlpipe import files
from tlpipe.cells import FOLDER
from tlpipe.data import charts
from tlpipe.resampling import share_interval
from tlpipe.sweep import state
from tlpipe.sweep.cell import CONFIDENCE, expected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
TABLE, PICTURE = FOLDER / "table.csv", FOLDER / "sweep.png"
COLUMNS = (
    *("level", "option", "images", "seeds", "validation_accuracy", "test_accuracy", "low", "high"),
    *("lowest_seed", "highest_seed", "experiment"),
)


@dataclass(frozen=True)
class Row:
    """The cells of one level and one number of images, over seeds.

    Attributes:
        validation: mean accuracy over seeds on the validation split, which is to choose by.
        test: mean accuracy over seeds on the test split, with the interval for other test images.
        seeds: the accuracy of each seed on the test split.
        experiment: that of the first seed.
    """

    level: str
    option: str
    images: int
    validation: float
    test: Mapping[str, float]
    seeds: tuple[float, ...]
    experiment: str


@dataclass(frozen=True)
class Trial:
    """One trial of a search: its validation loss, or the least one before it ended early."""

    loss: float
    is_pruned: bool
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What there is of a plan.

    Attributes:
        rows: level by level, images rising.
        records: of the cells, or trials, that are done.
        left: how many are not.
        trials: of a search.
        levels: how many are asked for.
        needed: seconds of a budget that each of those left would end in; 0: the one given, or any.
    """

    rows: list[Row]
    records: list[dict[str, Any]]
    left: int
    trials: list[Trial]
    levels: int = 1
    needed: float = 0.0

    @property
    def done(self) -> int:
        """Return how many came to an end."""
        return len(self.trials) or len(self.records)


def collect(root: Path, plan: Mapping[str, Any]) -> Found:
    """Read what there is of a plan."""
    if plan["search"] is not None:
        return _collect_search(root, plan)
    cells = state.entries(plan)
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    records = []
    for cell in cells:
        if (record := state.measured(root, cell.id)) is not None:
            records.append(record)
            found[cell.level, cell.images or plan["train_images"]].append(record)
    levels = list(dict.fromkeys(cell.level for cell in cells))
    order = sorted(found, key=lambda key: (levels.index(key[0]), key[1]))
    rows = [_row(level, images, found[level, images]) for level, images in order]
    left = [cell for cell in cells if state.measured(root, cell.id) is None]
    needed = _needed(plan, [expected(plan, cell) for cell in left])
    return Found(rows, records, len(left), [], len(levels), needed)


def _needed(plan: Mapping[str, Any], seconds: Sequence[float]) -> float:
    """Return the seconds of a budget that what is left would end in, if it is more than there was.

    ``seconds``: that each of it is expected to take.
    """
    longest = max(seconds, default=0.0)
    room = plan["room"]
    return 0.0 if room is None or longest <= room else longest + plan["budget"] - room


def _collect_search(root: Path, plan: Mapping[str, Any]) -> Found:
    from tlpipe.sweep import search

    study = search.study(plan)
    done = search.ended(study)
    trials, records = [], []
    for trial in done:
        is_whole = trial.value is not None and trial.state.name == "COMPLETE"
        least = min(trial.intermediate_values.values(), default=math.inf)
        loss = float(trial.value) if is_whole else least
        trials.append(Trial(loss, not is_whole, dict(trial.params)))
        if (record := state.load(root, trial.user_attrs["cell"])) is not None:
            records.append(record)
    rows = []
    if any(not trial.is_pruned for trial in trials):
        record = state.measured(root, study.best_trial.user_attrs["cell"])
        if record is not None:
            rows = [_row(record["level"], record["validation"]["images"], [record])]
    left = max(plan["search"]["trials"] - len(trials), 0)
    return Found(rows, records, left, trials, needed=_needed(plan, [search.expected(study)]))


def _row(level: str, images: int, records: Sequence[Mapping[str, Any]]) -> Row:
    groups = records[0]["test"]["groups"]
    if others := [record["name"] for record in records if record["test"]["groups"] != groups]:
        _log.warning("%s: of other test images than %s; left out", others, records[0]["name"])
        records = [record for record in records if record["name"] not in others]
    tests = [record["test"] for record in records]
    # Of each test image the share of seeds that are right: seeds are no other images.
    right = np.array([[hit == "1" for hit in test["hits"]] for test in tests]).mean(axis=0)
    validation = [record["validation_accuracy"] for record in records]
    return Row(
        level=level,
        option=records[0]["option"],
        images=images,
        validation=float(np.mean(validation)),
        test=share_interval(right, tests[0]["groups"], CONFIDENCE),
        seeds=tuple(test["value"] for test in tests),
        experiment=records[0]["name"],
    )


def save(root: Path, found: Found) -> None:
    """Write the table and the picture."""
    if found.trials:
        keys = list(found.trials[0].params)
        header = ("trial", "validation_loss", "pruned", *keys)
        table = [
            (number, f"{trial.loss:.6f}", str(trial.is_pruned).lower(), *trial.params.values())
            for number, trial in enumerate(found.trials)
        ]
        files.write_csv(root / TABLE, header, table)
        charts.save_figure(draw_trials(found.trials), root / PICTURE)
        return
    files.write_csv(
        root / TABLE,
        COLUMNS,
        [
            (
                *(row.level, row.option, row.images, len(row.seeds), f"{row.validation:.4f}"),
                *(f"{row.test[name]:.4f}" for name in ("value", "low", "high")),
                *(f"{min(row.seeds):.4f}", f"{max(row.seeds):.4f}", row.experiment),
            )
            for row in found.rows
        ],
    )
    charts.save_figure(draw(found.rows), root / PICTURE)


def draw(found: Sequence[Row]) -> "Figure":
    """Draw accuracy over the number of images, a line a level."""
    figure = charts.new_figure(9, 5.4)
    axes = figure.subplots()
    levels = list(dict.fromkeys(row.level for row in found))
    for number, level in enumerate(levels):
        line = [row for row in found if row.level == level]
        images = np.array([row.images for row in line], float)
        # Side by side, or intervals would hide each other.
        images *= 1.012 ** (number - (len(levels) - 1) / 2)
        option = line[0].option
        axes.errorbar(
            images,
            [row.test["value"] for row in line],
            charts.error_bars([row.test for row in line], "value"),
            fmt="o-",
            capsize=3,
            linewidth=2.4 if option else 1.4,
            label=f"freeze {level}" + (f" ({option})" if option else ""),
        )
    charts.scale_by_logarithm(axes)
    ticks = sorted({row.images for row in found})
    axes.set_xticks(ticks, [f"{images:,}" for images in ticks])
    axes.set_xlabel("training images", fontsize=12)
    axes.set_ylabel("accuracy on the test split", fontsize=12)
    axes.set_title(title(found), fontsize=12)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=10, framealpha=1)
    return figure


def title(found: Sequence[Row]) -> str:
    """Say what was measured, for the picture and above the table."""
    seeds = {len(row.seeds) for row in found}
    count = f"{max(seeds)} seeds" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)} seeds"
    mean = f"mean over {count}" if max(seeds) > 1 else "one seed"
    return f"Trained weights in float32, {mean}, {CONFIDENCE:.0%} intervals for other test images"


def draw_trials(found: Sequence[Trial]) -> "Figure":
    """Draw the validation loss of each trial, and the least one so far."""
    figure = charts.new_figure(9, 5.4)
    axes = figure.subplots()
    for is_pruned, label in ((False, "a trial"), (True, "ended early, its least loss")):
        chosen = [
            (n, trial.loss) for n, trial in enumerate(found, 1) if trial.is_pruned == is_pruned
        ]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "x" if is_pruned else "o", label=label)
    whole = [np.inf if trial.is_pruned else trial.loss for trial in found]
    numbers = range(1, len(found) + 1)
    axes.step(numbers, np.minimum.accumulate(whole), where="post", label="the least so far")
    axes.set_xlabel("trial", fontsize=12)
    axes.set_ylabel("validation loss", fontsize=12)
    axes.set_title(f"Search over {', '.join(found[0].params)}", fontsize=12)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", fontsize=10, framealpha=1)
    return figure


def conclusion(found: Found) -> list[str]:
    """Say what is best on validation, what that is on test, what is left, what to do next."""
    said = []
    if found.left and found.needed:
        budget = f"--budget {math.ceil(found.needed / 60)}m"
        said.append(f"{found.left} are left; some of them need {budget} or more, or none at all")
    elif found.left:
        said.append(f"{found.left} are left; the same command goes on")
    if found.trials:
        return [*_of_search(found), *said]
    images: dict[str, set[int]] = defaultdict(set)
    for row in found.rows:
        images[row.level].add(row.images)
    common = set.intersection(*images.values()) or set.union(*images.values())
    most = max(common)
    at_most = [row for row in found.rows if row.images == most]
    best = max(at_most, key=lambda row: row.validation)
    among = "" if len(at_most) == found.levels else f", of {len(at_most)} of {found.levels} levels"
    seeds = sorted({len(row.seeds) for row in at_most})
    unequal = f", over {seeds[0]} to {seeds[-1]} seeds each" if len(seeds) > 1 else ""
    said.append(
        f"best on validation with {most:,} training images{among}{unequal}: freeze {best.level} "
        f"({best.validation:.3f}); on test {shown(best.test)}"
    )
    options = {row.option.partition(":")[0]: row for row in at_most if row.option}
    if len(options) == 2:
        first, second = options["option 1"], options["option 2"]
        said.append(
            f"on test, option 1 (train only the output layer) has {shown(first.test)}, option 2 "
            f"(train everything from these weights) {shown(second.test)}"
        )
    return [*said, _next(best.experiment)]


def _of_search(found: Found) -> list[str]:
    whole = [trial for trial in found.trials if not trial.is_pruned]
    pruned = len(found.trials) - len(whole)
    if not whole:
        return ["every trial failed: the logs say why. Search elsewhere, or take smaller steps"]
    best = min(whole, key=lambda trial: trial.loss)
    said = [
        f"{len(found.trials)} trials, {pruned} of them ended early; the least validation loss is "
        f"{best.loss:.4f}",
        "put into params.yaml: " + ", ".join(f"{k}: {v}" for k, v in best.params.items()),
    ]
    for row in found.rows:
        said += [f"on test, measured once: {shown(row.test)}", _next(row.experiment)]
    return said


def _next(experiment: str) -> str:
    return (
        f"next: dvc exp apply {experiment}; tlpipe run. The first puts its parameters and its "
        f"model here, the second exports and evaluates it"
    )


def shown(found: Mapping[str, float]) -> str:
    """Return a share with its interval."""
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
