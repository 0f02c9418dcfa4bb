"""Search for hyperparameters with Optuna: TPE proposes, the median of earlier trials prunes.

Trials go by the validation loss alone; the test images are measured once, for the best. The study
is a journal in the project, so a search that was killed goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlpipe import params
from tlpipe.cells import FOLDER
from tlpipe.errors import DataError, Interrupted, ParamsError, TlpipeError
from tlpipe.project import models
from tlpipe.registry import sweeps
from tlpipe.sweep import experiments, grid, state
from tlpipe.sweep.state import Entry
from tlpipe.training.model import Step

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

# Trials before TPE proposes and medians prune; epochs of each before it may be pruned.
_RANDOM, _WARM = 5, 1
_LOGARITHMIC = 10  # a range whose ends are so many times apart is searched by powers
_CELL, _SECONDS, _FAILED = "cell", "seconds", "failed"


@dataclass(frozen=True)
class Range:
    """What is searched of one key: from ``low`` to ``high``, or one of ``choices``."""

    key: str
    low: float | int | None
    high: float | int | None
    choices: tuple[Any, ...] = ()

    @property
    def is_logarithmic(self) -> bool:
        """Return whether it is searched by powers."""
        low, high = self.low, self.high
        return low is not None and high is not None and low > 0 and high / low >= _LOGARITHMIC


def read_range(text: str) -> Range:
    """Return what a ``--search`` names, such as 'train.head_lr=1e-4..1e-2'.

    Raises:
        ParamsError: it has another form, or names a key that is not searched.
    """
    key, _, values = text.partition("=")
    example = "--search train.head_lr=1e-4..1e-2"
    grid.check_key(key, f"--search {text}", example)
    if not key.startswith("train."):
        raise ParamsError(
            f"--search {text} names {key}; the search is over keys of train, such as {example}."
        )
    ends = values.split("..")
    if len(ends) == 2:
        low, high = (_number(end) for end in ends)
        if low is not None and high is not None and low < high:
            return Range(key, low, high)
    elif len(ends) == 1 and values:
        choices = grid.read_setting(text)[1]
        if len(choices) > 1 and all(isinstance(each, (str, int, float)) for each in choices):
            return Range(key, None, None, choices)
    raise ParamsError(
        f"--search {text} is no range; expected LOW..HIGH with LOW below HIGH, or words or "
        f"numbers with commas between: {example}, --search train.optimiser=adamw,sgd."
    )


def _number(text: str) -> float | int | None:
    found = params.parse(f"value: {text}" if text else "value:", Path("--search"))["value"]
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return found if is_number else None


def distribution(found: Range) -> "BaseDistribution":
    """Return what Optuna draws from."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if found.choices:
        return CategoricalDistribution(found.choices)
    low, high = found.low, found.high
    assert low is not None and high is not None
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=found.is_logarithmic)
    return FloatDistribution(low, high, log=found.is_logarithmic)


def study(plan: Mapping[str, Any]) -> "Study":
    """Open the study of a plan, with what its earlier runs have found.

    The sampler's seed goes by how many trials have ended, so that a search that goes on proposes
    what it would have proposed.
    """
    import optuna
    from optuna.pruners import MedianPruner
    from optuna.samplers import TPESampler
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = FOLDER / "studies" / f"{plan['id']}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = optuna.create_study(
        study_name=plan["id"],
        storage=JournalStorage(JournalFileBackend(str(path))),
        pruner=MedianPruner(_RANDOM, _WARM),
        direction="minimize",
        load_if_exists=True,
    )
    found.sampler = TPESampler(n_startup_trials=_RANDOM, seed=len(ended(found)))
    return found


def ended(found: "Study") -> "list[FrozenTrial]":
    """Return the trials that came to an end, pruned or failed ones too; not those of a kill."""
    from optuna.trial import TrialState

    trials = found.get_trials(deepcopy=False)
    whole = (TrialState.COMPLETE, TrialState.PRUNED)
    return [trial for trial in trials if trial.state in whole or _FAILED in trial.user_attrs]


def todo(plan: Mapping[str, Any]) -> list[int]:
    """Return the trials that are left, and behind them the number of measuring the best on test.

    Nothing, where the best of all is measured.
    """
    from optuna.trial import TrialState

    found, trials = study(plan), plan["search"]["trials"]
    done = ended(found)
    if len(done) >= trials and any(trial.state == TrialState.COMPLETE for trial in done):
        best = found.best_trial.user_attrs[_CELL]
        if state.measured(Path(), best) is not None:
            return []
    return list(range(min(len(done), trials), trials + 1))


def cells(plan: Mapping[str, Any]) -> list[Entry]:
    """Return the cells of the trials that have left a record."""
    trials = [trial for trial in ended(study(plan)) if _CELL in trial.user_attrs]
    done = [each for each in trials if state.load(Path(), each.user_attrs[_CELL]) is not None]
    return [entry_of(plan, trial.params) for trial in done]


def run(plan: Mapping[str, Any], number: int, deadline: float | None) -> tuple[str, str]:
    """Do the next trial, or, where all have ended, measure the best one on the test images."""
    from optuna.trial import TrialState

    from tlpipe.sweep import cell as work

    found = study(plan)
    done = ended(found)
    is_last = number == plan["search"]["trials"]
    if not is_last and number < len(done):
        return "Cached", _said(done[number])
    if is_last and len(done) < number:
        return "Left", "trials are left, and the test images are shown to the best of all"
    if needed := work.too_long(expected(found), deadline):
        return "Left", needed
    if is_last and all(trial.state != TrialState.COMPLETE for trial in done):
        return "Left", "every trial failed"
    if is_last:
        return _measure_best(plan, found)
    for trial in found.get_trials(False, states=(TrialState.RUNNING,)):  # its process was killed
        found.tell(trial.number, state=TrialState.FAIL)
        found.enqueue_trial(trial.params)
    return _trial(plan, found)


def expected(found: "Study") -> float:
    """Return the seconds that a whole trial will take, as far as earlier ones tell."""
    known = [0.0]
    for trial in found.get_trials(deepcopy=False):
        known.append(trial.user_attrs.get(_SECONDS, 0.0))
        if not trial.state.is_finished() and _CELL in trial.user_attrs:
            known.append(state.expected_of_stopped(Path(), trial.user_attrs[_CELL]))
    return max(known)


def _trial(plan: Mapping[str, Any], found: "Study") -> tuple[str, str]:
    import optuna

    from tlpipe.sweep import cell as work

    ranges = [Range(**each) for each in plan["search"]["ranges"]]
    trial = found.ask({each.key: distribution(each) for each in ranges})
    entry = entry_of(plan, trial.params)
    trial.set_user_attr(_CELL, entry.id)

    def live(steps: Sequence[Step]) -> None:
        last = len(steps) - 1
        for step in (0, last) if last == 1 else (last,):  # the start comes with the first epoch
            trial.report(steps[step].validation.loss, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    experiments.renew(Path(), [entry], plan["baseline"], plan["tree"])
    known = state.load(Path(), entry.id)  # of another search
    try:
        record = known or work.compute(plan, entry, live)
    except optuna.TrialPruned:
        found.tell(trial, state=optuna.trial.TrialState.PRUNED)
        sweeps.record(Path(), plan["run"], [_of_pruned(entry, trial)])
        return "Pruned", _said(found.trials[trial.number])
    except (Interrupted, DataError):  # it says nothing of this trial
        raise
    except TlpipeError as error:  # such as a loss that is no number: others may do better
        state.check_unchanged(Path(), plan)
        said = " ".join(str(error).split())
        trial.set_user_attr(_FAILED, said)
        found.tell(trial, state=optuna.trial.TrialState.FAIL)
        return "Pruned", f"failed: {said}"
    sweeps.record(Path(), plan["run"], [work.of_mlflow(record)])
    trial.set_user_attr(_SECONDS, record["seconds"])
    found.tell(trial, record["validation"]["validation_loss"])
    return "Completed", _said(found.trials[trial.number])


def entry_of(plan: Mapping[str, Any], found: Mapping[str, Any]) -> Entry:
    """Return the cell of a trial's parameters.

    Raises:
        ParamsError: they do not fit each other.
    """
    base = plan["search"]
    content, known = base["content"], models()
    values = {**base["values"], **found}
    made = grid.cell(values, content, known, seed=0)
    pinned = base["weights_sha256"]
    return state.entry(
        made, Path(), known, lambda frozen: frozen.model_copy(update={"weights_sha256": pinned})
    )


def _said(trial: "FrozenTrial") -> str:
    shown = ", ".join(f"{key} {_shown(value)}" for key, value in trial.params.items())
    loss = min(trial.intermediate_values.values(), default=trial.value)
    if trial.value is not None and trial.state.name == "COMPLETE":
        return f"validation loss {trial.value:.4f} with {shown}"
    return f"pruned after {len(trial.intermediate_values) - 1} epochs at {loss:.4f} with {shown}"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _of_pruned(entry: Entry, trial: "Trial") -> dict[str, Any]:
    losses = trial.study.trials[trial.number].intermediate_values
    return {
        "id": entry.id,
        "name": entry.name,
        "params": {**entry.values, "seed": entry.seed},
        "metrics": {"epochs": float(len(losses) - 1), "validation_loss": min(losses.values())},
        "tags": {"tlpipe.level": entry.level, "tlpipe.pruned": "true"},
        "status": "KILLED",
    }


def _measure_best(plan: Mapping[str, Any], found: "Study") -> tuple[str, str]:
    """Measure the best trial on the test images, once."""
    from tlpipe.sweep import cell as work

    entry = entry_of(plan, found.best_trial.params)
    record = state.load(Path(), entry.id)
    if record is None or "test" not in record:
        record = work.compute(plan, entry)
        sweeps.record(Path(), plan["run"], [work.of_mlflow(record)])
    test = record["test"]
    return "Completed", (
        f"the best has test accuracy {test['value']:.3f} ({test['low']:.3f} to {test['high']:.3f})"
    )
