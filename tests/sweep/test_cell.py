"""Cells, done in this process: real stages, DVC, Git and MLflow; no Ray."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.conftest import Workspace
from tlpipe import cells, files
from tlpipe.data import pixels, split
from tlpipe.data.manifest import load_split, rows_of
from tlpipe.errors import ParamsError
from tlpipe.graph import PATHS
from tlpipe.project import models
from tlpipe.sweep import cell, experiments, report, state, sweep
from tlpipe.sweep.grid import Asked

pytestmark = pytest.mark.slow

EPOCHS: dict[str, tuple[Any, ...]] = {"train.epochs": (1,)}


def plan(*freeze: str, images: tuple[int | None, ...] = (None,), **others: Any) -> dict[str, Any]:
    asked = Asked(freeze, images, **others)
    found = sweep.cells(asked, [])
    return sweep.plan(found, [], 0, "digits", lambda one: one, deadline=None, address=None)


def work(made: dict[str, Any], deadline: float | None = None) -> list[tuple[str, str]]:
    found = [cells.work(Path.cwd(), number, deadline) for number in made["todo"]]
    return [(outcome.name, outcome.said) for outcome in found]


def entries(made: dict[str, Any]) -> list[state.Entry]:
    return state.entries(made)


def record(made: dict[str, Any], number: int) -> dict[str, Any]:
    found = state.load(Path(), entries(made)[number].id)
    assert found is not None
    return found


def client() -> MlflowClient:
    return MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def children(made: dict[str, Any]) -> list[Any]:
    experiment = client().get_run(made["run"]).info.experiment_id
    return list(client().search_runs([experiment], f"tags.`mlflow.parentRunId` = '{made['run']}'"))


@pytest.mark.fault("O07")
def test_a_cell_is_what_dvc_makes_of_a_project_with_its_parameters(here: Workspace) -> None:
    """The bytes of the model, and the accuracy that ``evaluate`` measures on the exported one."""
    made = plan("all", "none", images=(12,), settings=EPOCHS)
    assert [name for name, _ in work(made)] == ["Completed", "Completed"]
    for number, entry in enumerate(entries(made)):
        lock = yaml.safe_load(
            here.run("git", "show", f"{experiment(made, number)}:dvc.lock").stdout
        )
        alone = here.path.parent / f"alone {number}"
        shutil.copytree(here.path, alone, ignore=shutil.ignore_patterns("artifacts", "mlflow.db"))
        shutil.rmtree(alone / ".dvc" / "cache")
        by_dvc = Workspace(alone, here.env)
        text = here.run("git", "show", f"{experiment(made, number)}:params.yaml").stdout
        (alone / "params.yaml").write_text(text)
        by_dvc.run("dvc", "repro", "evaluate")
        expected = yaml.safe_load((alone / "dvc.lock").read_text())
        for stage in state.STAGES:
            assert lock["stages"][stage] == expected["stages"][stage], (entry.name, stage)
        measured = files.read_json(alone / "artifacts/evaluate/report.json")["precisions"]["fp32"]
        # Plain shares at both levels, by other code than that of training.
        known = record(made, number)
        own = known["validation"]["validation_accuracy"]
        assert known["validation_accuracy"] == pytest.approx(own)
        found = known["test"]
        assert {key: found[key] for key in ("value", "low", "high")} == pytest.approx(
            {key: measured["accuracy"][key] for key in ("value", "low", "high")}
        )


def experiment(made: dict[str, Any], number: int) -> str:
    return str(record(made, number)["experiment"])


def test_dvc_shows_cells_and_applies_them_without_running_anything(here: Workspace) -> None:
    made = plan("all", images=(8, None))
    work(made)
    names = [entry.name for entry in entries(made)]
    listed = here.run("dvc", "exp", "list", "--name-only").stdout.split()
    assert sorted(listed) == sorted(names)
    shown = json.loads(here.run("dvc", "exp", "show", "--json").stdout)
    found = {
        one["name"]: one["revs"][0]["data"]
        for branch in shown
        for one in branch.get("experiments") or ()
    }
    assert found.keys() == {*names}
    for number, name in enumerate(names):
        data = found[name]
        assert data["params"]["params.yaml"]["data"]["embed"]["freeze"] == "all"
        metrics = data["metrics"]["artifacts/train/metrics.json"]["data"]
        assert metrics == record(made, number)["validation"]
    here.run("dvc", "exp", "apply", names[0], code=None)  # later stages have written nothing
    assert yaml.safe_load((here.path / "params.yaml").read_text())["split"]["images"] == 8
    said = here.run("dvc", "repro", "train").stdout
    assert said.count("didn't change, skipping") == len(state.STAGES)


def test_frozen_work_is_done_once(here: Workspace) -> None:
    made = plan("all", "none", images=(8, 12, None), seeds=2)
    logs = []
    work(made)
    for entry in entries(made):
        logs.append((here.path / cells.LOGS / f"{entry.name}.log").read_text())
    assert len({entry.frozen for entry in entries(made)}) == 2
    assert len([text for text in logs if "activations of 48 images" in text]) == 2


def test_images_limit_training_alone_and_more_contain_fewer(here: Workspace) -> None:
    made = plan("all", images=(8, 12, None), seeds=2)
    tables = {}
    for entry in entries(made):
        folder = here.path.parent / entry.id
        folder.mkdir()
        section = entry.sections(models())["split"]
        assert isinstance(section, split.Params)
        shutil.copyfile("splits.csv", folder / "splits.csv")
        split.run(
            manifest=Path("artifacts/ingest/manifest.csv"),
            split=folder / "split.csv",
            split_report=folder / "report.json",
            placements=folder / "splits.csv",
            params=section,
        )
        assert (folder / "splits.csv").read_bytes() == Path("splits.csv").read_bytes()
        tables[entry.images, entry.seed] = load_split(folder / "split.csv")
    whole = tables[None, 0]
    trains = {key: {*rows_of(table, "train")} for key, table in tables.items()}
    for key, table in tables.items():
        for part in ("validation", "test"):
            assert rows_of(table, part) == rows_of(whole, part)
        assert len(trains[key]) == (key[0] or len(trains[None, 0]))
        labels = [table[row].label for row in trains[key]]
        assert abs(labels.count("dark") - labels.count("light")) <= 2
    for seed in range(2):
        assert trains[8, seed] < trains[12, seed] < trains[None, 0]
    assert trains[8, 0] != trains[8, 1]


def test_the_limit_of_params_yaml_is_no_limit_of_a_sweep(here: Workspace) -> None:
    """As 'dvc exp apply' of a cell leaves it."""
    before = plan("all", images=(8, None))
    here.configure("split", images=8)
    here.run("dvc", "repro", "split")
    after = plan("all", images=(8, None))
    assert after["train_images"] == before["train_images"] > 8
    assert [entry.id for entry in entries(after)] == [entry.id for entry in entries(before)]
    # All of them by their number are all of them.
    whole = plan("all", images=(before["train_images"], None), seeds=2)
    assert [entry.id for entry in entries(whole)] == [entries(before)[1].id]


@pytest.mark.fault("O08")
def test_data_that_change_meanwhile_are_not_recorded(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Path("splits.csv")
    text = table.read_text()
    made = plan("all", images=(8,))
    original = cell.tested

    def elsewhere(*given: Any) -> Any:
        table.write_text(text + text.splitlines()[-1].replace("t", "x") + "\n")
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(cell, "tested", elsewhere)
        ((name, said),) = work(made)
    said = said.rpartition("; ")[0]  # the seconds
    assert name == "Failed"
    assert said.startswith("splits.csv changed while the sweep was at work; expected the images")
    ((name, again),) = work(made)
    assert (name, again.rpartition("; ")[0]) == ("Failed", said)
    assert state.load(Path(), entries(made)[0].id) is None
    assert here.run("dvc", "exp", "list", "--name-only").stdout == ""
    table.write_text(text)
    assert work(made)[0][0] == "Completed"


def test_a_cell_that_is_done_hangs_on_the_project_as_it_is(here: Workspace) -> None:
    made = plan("all", images=(8,))
    work(made)
    (name,) = (entry.name for entry in entries(made))
    stages = record(made, 0)["stages"]
    params = here.path / "params.yaml"
    params.write_text(params.read_text() + "# edited since\n")
    who = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    here.run("git", *who, "commit", "-q", "--allow-empty", "-m", "more")

    def again() -> list[int]:
        todo: list[int] = plan("all", images=(8,))["todo"]
        return todo

    def listed() -> list[str]:
        return here.run("dvc", "exp", "list", "--name-only").stdout.split()

    assert (again(), listed()) == ([], [name])
    assert "# edited since" in here.run("git", "show", f"{experiment(made, 0)}:params.yaml").stdout
    kept = experiment(made, 0)
    assert (again(), experiment(made, 0)) == ([], kept)
    # Its reference is gone, and a git that was killed has left its lock.
    here.run("dvc", "exp", "remove", name)
    commit = here.run("git", "rev-parse", "HEAD").stdout.strip()
    lock = here.path / ".git/refs/exps" / commit[:2] / commit[2:] / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (0, 0))
    assert (again(), listed()) == ([], [name])
    # Its outputs are gone.
    here.run("dvc", "gc", "--workspace", "--force")
    assert again() == [0]
    assert work(made)[0][0] == "Completed"
    assert (again(), record(made, 0)["stages"]) == ([], stages)


def test_what_a_budget_has_stopped_comes_last_and_says_what_it_needs(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan("all", "none", images=(8,))
    assert made["todo"] == [0, 1]
    assert cell.expected(made, entries(made)[0]) == 0.0
    files.write_json(cells.PLAN, made | {"deadline": time.time()})

    def stop(**_: Any) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr("tlpipe.training.train.run", stop)
        with pytest.raises(TimeoutError):
            cells.work(Path.cwd(), 0, None)
    stopped = files.read_json(cells.stopped(Path(), entries(made)[0].id))["seconds"]
    assert cell.expected(made, entries(made)[0]) > stopped > 0
    assert plan("all", "none", images=(8,))["todo"] == [1, 0]
    cells.note_stopped(Path(), entries(made)[0].id, 600.0)
    files.write_json(cells.PLAN, made)
    assert cells.work(Path.cwd(), 1, None).name == "Completed"
    known = record(made, 1)
    assert cell.expected(made, entries(made)[1]) == known["seconds"]
    assert known["seconds_once"] > 0
    result = report.collect(Path(), made | {"budget": 300.0, "room": 200.0})
    assert report.conclusion(result)[0] == (
        "1 are left; some of them need --budget 17m or more, or none at all"
    )
    assert cell.too_long(0.0, time.time() - 1) == "the time was up"


def test_activations_of_other_data_are_taken_away(here: Workspace) -> None:
    made = plan("all", images=(8,))
    work(made)
    folder = cells.FOLDER / "frozen"
    (kept,) = folder.iterdir()
    plan("none", images=(8,))  # another level may come back
    assert [*folder.iterdir()] == [kept]
    table = Path("splits.csv")
    table.write_text(table.read_text() + f"{64 * 'a'},train\n")
    plan("none", images=(8,))
    assert [*folder.iterdir()] == []


def test_more_images_than_there_are_is_an_error(here: Workspace) -> None:
    said = here.call("sweep", "--images", "5000", code=3).stderr
    assert "--images has 5000; the training split has" in said


def test_mlflow_has_a_run_for_the_sweep_and_one_for_each_cell(here: Workspace) -> None:
    made = plan("all", images=(8, None))
    work(made)
    found = {run.data.tags["tlpipe.cell"]: run for run in children(made)}
    assert found.keys() == {entry.id for entry in entries(made)}
    for number, entry in enumerate(entries(made)):
        run, known = found[entry.id], record(made, number)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["test_accuracy"] == known["test"]["value"]
        assert run.data.metrics["validation_loss"] == known["validation"]["validation_loss"]
        assert run.data.params["embed.freeze"] == "all"
        assert run.data.tags["tlpipe.dvc_experiment"] == entry.name
    # Found by content: a second time nothing is made, and what a kill left open is completed.
    opened = found[entries(made)[0].id].info.run_id
    client().update_run(opened, status="RUNNING")
    again = plan("all", images=(8, None))
    assert (again["run"], again["todo"]) == (made["run"], [])
    result = sweep.finish(again)
    assert (result.left, len(children(made))) == (0, 2)
    assert client().get_run(opened).info.status == "FINISHED"
    parent = client().get_run(made["run"])
    assert parent.info.status == "FINISHED"
    artifacts = {found.path for found in client().list_artifacts(made["run"])}
    assert artifacts == {"table.csv", "sweep.png"}


@pytest.mark.fault("O08")
def test_other_data_or_other_code_is_another_cell(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = entries(plan("all"))[0].id
    assert entries(plan("all"))[0].id == first
    here.configure("register", purpose="of no effect on a cell")
    assert entries(plan("all"))[0].id == first
    with monkeypatch.context() as patch:
        patch.setattr(state, "code", lambda stage: {"code": f"another {stage}"})
        assert entries(plan("all"))[0].id != first
    manifest = here.path / "artifacts/ingest/manifest.csv"
    text = manifest.read_text()
    manifest.unlink()  # a link into DVC's cache, maybe
    manifest.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert entries(plan("all"))[0].id != first


@pytest.mark.fault("O09")
@pytest.mark.parametrize("killed_in", ["save", "write_json"])
def test_what_is_half_written_does_not_count(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    class Killed(BaseException):
        pass

    made = plan("all", images=(8,))
    module = {"save": experiments, "write_json": files}[killed_in]
    original = getattr(module, killed_in)

    def kill(*given: Any, **named: Any) -> Any:
        if killed_in == "write_json" and "cells" not in str(given[0]):
            return original(*given, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, killed_in, kill)
        with pytest.raises(Killed):
            work(made)
    assert state.load(Path(), entries(made)[0].id) is None
    again = plan("all", images=(8,))
    assert work(again)[0][0] == "Completed"
    assert len(children(made)) == 1


def test_no_cell_begins_that_would_not_end_in_time(here: Workspace) -> None:
    made = plan("all", images=(8, None))
    first = made | {"todo": made["todo"][:1]}
    assert work(first, time.time() + 3600)[0][0] == "Completed"
    known = record(made, 0)
    files.write_json(state.record(Path(), known["id"]), known | {"seconds": 900.0})
    # More images take longer, in proportion at most.
    whole = made["train_images"]
    assert cell.expected(made, entries(made)[1]) == pytest.approx(900.0 * whole / 8)
    rest = made | {"todo": made["todo"][1:]}
    assert work(rest, time.time() + 800)[0][0] == "Left"
    assert state.load(Path(), entries(made)[1].id) is None
    result = sweep.finish(made)
    assert (result.left, len(result.rows)) == (1, 1)
    assert report.conclusion(result)[0] == "1 are left; the same command goes on"
    assert client().get_run(made["run"]).info.status == "KILLED"


def test_the_interval_is_of_test_images_and_seeds_are_averaged(here: Workspace) -> None:
    made = plan("all", images=(8,), seeds=3)
    work(made)
    row = sweep.finish(made).rows[0]
    tests = [record(made, number)["test"] for number in range(3)]
    assert row.seeds == tuple(test["value"] for test in tests)
    assert row.test["value"] == pytest.approx(sum(row.seeds) / 3)
    table = here.rows("artifacts/sweep/table.csv")
    assert (len(table), table[0]["seeds"], table[0]["images"]) == (1, "3", "8")
    assert float(table[0]["test_accuracy"]) == pytest.approx(row.test["value"], abs=1e-4)


def test_a_project_without_a_commit_says_what_to_do(here: Workspace) -> None:
    shutil.rmtree(here.path / ".git")
    (here.path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    with pytest.raises(ParamsError, match=r"'git rev-parse' failed in .* A sweep keeps"):
        plan("all")


def test_a_backbone_that_sees_other_squares_is_read_anew(here: Workspace) -> None:
    made = plan("all", backbones=("timm/test_resnet", "efficientnet_lite0"))
    found = work(made)
    assert [name for name, _ in found] == ["Completed", "Completed"], found
    assert [entry.level for entry in entries(made)] == [
        "timm/test_resnet, all",
        "efficientnet_lite0, all",
    ]
    first, second = entries(made)
    assert first.ingested == ""  # as the project's own
    anew = pixels.load(cells.FOLDER / "ingested" / second.ingested / "pixels")
    own = pixels.load(here.path / PATHS["pixels"])
    assert (own.sampling.short_side_px, anew.sampling.short_side_px) == (168, 256)
