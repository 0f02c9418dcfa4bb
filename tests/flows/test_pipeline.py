"""The flow on a real Prefect server: run by hand, and deployed to a worker."""

import json
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.conftest import (
    PATIENCE_S,
    PATIENT,
    ROOT,
    Workspace,
    free_port,
    server,
    wait_until,
)
from tests.flows.test_graph import SLEEP, change, sleeping
from tests.flows.test_graph import repository as repository

pytestmark = pytest.mark.slow

FLOW = str(ROOT / "flows" / "pipeline.py")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a client of a Prefect server that starts empty."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    env = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        **PATIENT,
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    start = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with server(Workspace(home, env), *start, ready=f"{env['PREFECT_API_URL']}/health"):
        yield env


def ask(workspace: Workspace, kind: str, **wanted: object) -> list[dict[str, Any]]:
    """Return what the server has of one kind, by its REST API."""
    found: list[dict[str, Any]] = []
    while len(found) % 200 == 0:  # as many as the server returns at once
        request = urllib.request.Request(
            f"{workspace.env['PREFECT_API_URL']}/{kind}/filter",
            json.dumps(wanted | {"offset": len(found)}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            page = json.loads(response.read())
        if not page:
            break
        found += page
    return found


def runs(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the flow runs that have begun, in their order; others are of the schedule."""
    found = []
    for run in ask(workspace, "flow_runs"):
        if run["start_time"] is None:
            continue
        of_run = {"id": {"any_": [run["id"]]}}
        tasks = ask(workspace, "task_runs", flow_runs=of_run)
        logs = ask(workspace, "logs", logs={"flow_run_id": of_run["id"]}, sort="TIMESTAMP_ASC")
        state = run["state"]
        found.append(
            {
                **{key: state[key] for key in ("name", "type", "message")},
                "deployment": run["deployment_id"] is not None,
                "start": run["start_time"],
                "tasks": {
                    task["name"]: [task["state"]["name"], task["start_time"], task["end_time"]]
                    for task in tasks
                },
                "logs": [log["message"] for log in logs],
            }
        )
    return sorted(found, key=lambda run: run["start"])


def test_each_stage_is_a_task_with_its_state_and_its_output(
    repository: Workspace, api: dict[str, str]
) -> None:
    mine = Workspace(repository.path, api)
    mine.run("python", FLOW)
    mine.run("python", FLOW)
    (mine.path / "dvc.lock").unlink()
    (mine.path / "a.txt").unlink()
    mine.run("python", FLOW)
    change(mine, c="echo 'tlpipe: c cannot' >&2; exit 4")
    mine.run("python", FLOW, code=1)
    first, again, restored, failed = runs(mine)[-4:]

    assert (first["name"], set(first["tasks"])) == ("Completed", {"a", "b", "c", "d"})
    assert {task[0] for task in first["tasks"].values()} == {"Completed"}
    assert "Running stage 'b':" in first["logs"]
    assert "> echo a > a.txt" in first["logs"]
    # b and c wait for one another, so they ran side by side; a came before them, d after.
    for name in "bc":
        begin, end = first["tasks"][name][1:]
        assert first["tasks"]["a"][2] <= begin < end <= first["tasks"]["d"][1]

    assert {task[0] for task in again["tasks"].values()} == {"Cached"}
    assert {task[0] for task in restored["tasks"].values()} == {"Restored"}
    assert (mine.path / "a.txt").read_text() == "a\n"

    assert failed["name"] == "Failed"
    assert {name: task[0] for name, task in failed["tasks"].items() if name != "d"} == {
        "a": "Cached",
        "b": "Cached",
        "c": "Failed",
    }
    assert any("c cannot" in message for message in failed["logs"])


def test_a_cancelled_flow_leaves_no_process(repository: Workspace, api: dict[str, str]) -> None:
    mine = Workspace(repository.path, api)
    change(mine, a=f"{SLEEP} & {SLEEP}")
    flow = subprocess.Popen(
        ["python", FLOW],
        cwd=mine.path,
        env=mine.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(sleeping(mine)) == 2, process=flow)
    busy = mine.run("python", FLOW, code=1)
    assert f"another flow works in {mine.path}: process {flow.pid}" in busy.stderr
    flow.send_signal(signal.SIGTERM)
    flow.wait(PATIENCE_S)
    assert not sleeping(mine)
    assert runs(mine)[-2]["type"] in ("CRASHED", "CANCELLED", "FAILED")


def test_the_deployment_runs_on_a_worker(workspace: Workspace, api: dict[str, str]) -> None:
    """'prefect deploy' as the README says, a worker, a triggered run of the real pipeline."""
    mine = Workspace(workspace.path, {**workspace.env, **api})
    mine.use_small_network()
    mine.replace("data/digits.yaml", "images_per_class: 100", "images_per_class: 12")
    pool = "tlpipe"
    mine.run("prefect", "work-pool", "create", pool, "--type", "process")
    mine.run("prefect", "--no-prompt", "deploy", "--name", "nightly")
    inspected = json.loads(
        mine.run("prefect", "deployment", "inspect", "tlpipe/nightly", "--output", "json").stdout
    )
    (schedule,) = inspected["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 3 * * *", True)
    assert inspected["work_pool_name"] == pool
    health = free_port()
    worker = Workspace(
        mine.path,
        {
            **mine.env,
            "PREFECT_WORKER_WEBSERVER_PORT": str(health),
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        },
    )
    start = ("prefect", "worker", "start", "--pool", pool, "--with-healthcheck")
    with server(worker, *start, ready=f"http://127.0.0.1:{health}/health"):
        mine.run("prefect", "deployment", "run", "tlpipe/nightly", "--watch")
    (run,) = [run for run in runs(mine) if run["deployment"]]
    assert run["name"] == "Completed", run["logs"]
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert {name: task[0] for name, task in run["tasks"].items()} == dict.fromkeys(
        stages, "Completed"
    )
    assert any("test accuracy" in message for message in run["logs"])
    assert (mine.path / "artifacts/register/receipt.json").exists()
