"""A search, done in this process: a real study of Optuna, real training; no Ray."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.conftest import Workspace
from tlpipe import cells, files
from tlpipe.sweep import experiments, search, state, sweep
from tlpipe.sweep.grid import Asked

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

RANGES = ("train.head_lr=1e-4..1e-1", "train.label_smoothing=0..0.2")
FEW = {"train.epochs": (2,)}


def plan(trials: int) -> dict[str, Any]:
    ranges = [search.read_range(text) for text in RANGES]
    found = sweep.cells(Asked(("none",), (12,), settings=FEW), ranges)
    return sweep.plan(found, ranges, trials, "digits", lambda one: one, deadline=None, address=None)


def work(made: dict[str, Any], upto: int | None = None) -> list[str]:
    return [cells.work(Path.cwd(), number, None).name for number in made["todo"][:upto]]


def values(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial.params for trial in search.ended(search.study(made))]


def records() -> list[dict[str, Any]]:
    return [files.read_json(path) for path in sorted((cells.FOLDER / "cells").glob("*.json"))]


def test_the_best_on_validation_is_measured_on_test_once(here: Workspace) -> None:
    made = plan(3)
    assert made["todo"] == [0, 1, 2, 3]
    assert work(made, 3) == ["Completed"] * 3
    assert not [record for record in records() if "test" in record]
    fewer = plan(2)  # than are done: what is left is to measure the best of all
    assert (fewer["todo"], sweep.describe(fewer)[:30]) == ([2], "2 trials, 0 of them to do, the")
    assert cells.work(Path.cwd(), 2, None).name == "Completed"
    assert (plan(2)["todo"], sweep.finish(fewer).left) == ([], 0)
    made = plan(3)
    assert made["todo"] == []
    study = search.study(made)
    best = state.load(Path(), study.best_trial.user_attrs["cell"])
    assert best is not None
    assert [record["id"] for record in records() if "test" in record] == [best["id"]]
    assert best["validation"]["validation_loss"] == study.best_value
    assert study.best_value == min(r["validation"]["validation_loss"] for r in records())
    for trial in study.trials:
        assert 1e-4 <= trial.params["train.head_lr"] <= 1e-1
        assert 0 <= trial.params["train.label_smoothing"] <= 0.2
        assert len(trial.intermediate_values) == 3  # the start, and two epochs
        assert trial.value == pytest.approx(min(trial.intermediate_values.values()), abs=1e-6)
    result = sweep.finish(made)
    assert (result.left, len(result.trials), len(result.rows)) == (0, 3, 1)
    said = here.call("sweep", *options(3)).stdout  # nothing is left to do
    assert "3 trials, 0 of them ended early; the least validation loss is" in said
    assert f"train.head_lr: {study.best_params['train.head_lr']}" in said
    assert len(here.rows("artifacts/sweep/table.csv")) == 3


def options(trials: int) -> list[str]:
    found = ["--freeze", "none", "--images", "12", "--set", "train.epochs=2"]
    for text in RANGES:
        found += ["--search", text]
    return [*found, "--trials", str(trials)]


@pytest.mark.fault("O10")
def test_a_killed_search_proposes_what_it_would_have_proposed(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    made = plan(6)
    work(made, 6)
    whole = values(made)
    journal = cells.FOLDER / "studies" / f"{made['id']}.log"
    journal.unlink()
    for path in (cells.FOLDER / "cells").glob("*.json"):
        path.unlink()
    work(plan(6), 2)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "save", kill)  # trained, and nothing kept
        with pytest.raises(Killed):
            cells.work(Path.cwd(), 2, None)
    again = plan(6)
    assert again["todo"] == [2, 3, 4, 5, 6]
    work(again, 4)
    assert values(again) == whole


def test_a_trial_that_is_worse_than_the_others_is_pruned(here: Workspace) -> None:
    made = plan(7)
    study = search.study(made)
    ranges = [search.read_range(text) for text in RANGES]
    drawn = {each.key: search.distribution(each) for each in ranges}
    for number in range(5):
        study.add_trial(
            optuna.trial.create_trial(
                params={"train.head_lr": 1e-3, "train.label_smoothing": 0.01 * number},
                distributions=drawn,
                value=1e-6,
                intermediate_values={0: 1e-6, 1: 1e-6, 2: 1e-6},
                user_attrs={"cell": "0" * 32},
            )
        )
    outcome = cells.work(Path.cwd(), 5, None)
    assert outcome.name == "Pruned"
    assert "pruned after 1 epochs" in outcome.said
    assert records() == []
    client = MlflowClient(f"sqlite:///{here.path / 'mlflow.db'}")
    experiment = client.get_run(made["run"]).info.experiment_id
    (run,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{made['run']}'")
    assert (run.info.status, run.data.tags["tlpipe.pruned"]) == ("KILLED", "true")
    assert here.run("dvc", "exp", "list", "--name-only").stdout.strip() == ""
