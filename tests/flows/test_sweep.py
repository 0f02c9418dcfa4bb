"""A sweep as users run it: the command, a real Ray, a real Prefect server, real DVC and MLflow."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import PATIENCE_S, Workspace, free_port, wait_until
from tests.sweep.conftest import project as project
from tests.sweep.conftest import split_once as split_once
from tlpipe import cells

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SWEEP = ("sweep", "--freeze", "all,none", "--images", "8,12", "--set", "train.epochs=2")


def records(project: Workspace) -> dict[str, int]:
    """Return when each record was written."""
    folder = project.path / cells.FOLDER / "cells"
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.json")}


@pytest.mark.fault("O09")
def test_a_killed_sweep_goes_on_where_it_was(project: Workspace) -> None:
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("tlpipe")), *SWEEP],
        cwd=project.path,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: len(records(project)) >= 1)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    process.wait(PATIENCE_S)
    before = records(project)
    result = project.run("tlpipe", *SWEEP)
    after = records(project)
    assert len(after) == 4
    assert {cell: after[cell] for cell in before} == before  # not done again
    assert f"4 cells, {4 - len(before)} of them to do" in result.stdout
    for said in ("option 1", "option 2", "next: dvc exp apply"):
        assert said in result.stdout
    names = project.run("dvc", "exp", "list", "--name-only").stdout.split()
    assert len(names) == 4
    assert (project.path / "artifacts/sweep/sweep.png").stat().st_size > 10_000
    # All of it is done: nothing is started.
    again = project.run("tlpipe", *SWEEP)
    assert "4 cells, 0 of them to do" in again.stdout
    assert "Ray" not in again.stderr


def test_a_budget_that_is_over_begins_nothing_more(project: Workspace) -> None:
    # A Ray that somebody else has is none that the sweep was told to use.
    elsewhere = Workspace(project.path, {**project.env, "RAY_ADDRESS": "127.0.0.1:1"})
    elsewhere.run("tlpipe", "sweep", "--freeze", "all", "--images", "8")
    (known,) = records(project)
    path = project.path / cells.FOLDER / "cells" / f"{known}.json"
    content = path.read_text()
    assert content.count('"seconds": ') == 1
    path.write_text(json.dumps(json.loads(content) | {"seconds": 1e6}))
    result = project.run("tlpipe", "sweep", "--freeze", "all", "--images", "8,12", "--budget", "1h")
    assert "1 are left; some of them need --budget" in result.stdout
    assert "left: it would take some" in result.stderr
    assert len(records(project)) == 1


def test_a_cell_is_stopped_where_the_budget_ends(project: Workspace) -> None:
    long = ("--freeze", "none", "--images", "8,12", "--set", "train.epochs=100000")
    result = project.run("tlpipe", "sweep", "--budget", "150s", *long, code=6)
    assert "stopped: the time was up" in result.stderr  # one was at work
    assert list((project.path / cells.FOLDER / "stopped").glob("*.json"))
    assert "nothing of the sweep came to an end" in result.stderr
    assert (len(records(project)), project.run("dvc", "exp", "list").stdout) == (0, "")
    assert not list((project.path / "artifacts/sweep").glob("work/*"))


def test_a_ray_that_runs_already_does_the_cells(project: Workspace, tmp_path: Path) -> None:
    port = free_port()
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    cluster = Workspace(project.path, {**project.env, **env})
    start = ("start", "--head", "--port", str(port), "--node-ip-address", "127.0.0.1")
    ray = (sys.executable, "-m", "ray.scripts.scripts")
    more = ("--include-dashboard", "false", "--object-store-memory", "80000000")
    head = subprocess.Popen(
        [*ray, *start, *more, "--num-cpus", "2", "--block"],
        cwd=tmp_path,
        env=cluster.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"127.0.0.1:{port}"
        status = [*ray, "health-check", "--address", address]
        wait_until(
            lambda: (
                subprocess.run(
                    status, env=cluster.environment(), capture_output=True, cwd=tmp_path
                ).returncode
                == 0
            )
        )
        words = ("sweep", "--freeze", "all", "--images", "8", "--address", address)
        result = cluster.run("tlpipe", *words)
        assert "completed: test accuracy" in result.stderr
        assert len(records(project)) == 1
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        for one in (*children, psutil.Process(head.pid)):
            if one.is_running():
                one.kill()
        head.wait(PATIENCE_S)


def test_a_cell_that_does_not_end_is_stopped_by_force(project: Workspace, tmp_path: Path) -> None:
    """As where compiled code does not come back: no signal ends it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys, time\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Stuck(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tlpipe.sweep.cell' and 'default_worker' in sys.argv[0]:\n"
        "            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "            time.sleep(3600)\n"
        "sys.meta_path.insert(0, Stuck())\n"
    )
    known = project.environment().get("PYTHONPATH", "")
    paths = os.pathsep.join(filter(None, (str(tmp_path), known)))
    stuck = Workspace(project.path, {**project.env, "PYTHONPATH": paths})
    words = ("sweep", "--freeze", "all", "--images", "8", "--budget", "90s")
    result = stuck.run("tlpipe", *words, code=6)
    assert "stopped: the time was up" in result.stderr
    assert list((project.path / cells.FOLDER / "stopped").glob("*.json"))
