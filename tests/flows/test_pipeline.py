"""The flow on a real Prefect server: run by hand, and deployed to a worker."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import (
    PATIENCE_S,
    PATIENT,
    ROOT,
    Workspace,
    copy_repository,
    free_port,
    server,
    wait_until,
)
from tests.flows.test_graph import SLEEP, change, sleeping
from tests.flows.test_graph import repository as repository

pytestmark = pytest.mark.slow

# Asked in a process of its own, with Prefect's client alone.
RUNS = """
import asyncio, json
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

async def main():
    async with get_client() as client:
        found = []
        for run in await client.read_flow_runs():
            only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
            pages = [await client.read_logs(only, offset=200 * page) for page in range(5)]
            tasks = await client.read_task_runs()
            found.append({
                "state": run.state.name, "type": run.state.type.value, "message": run.state.message,
                "deployment": run.deployment_id is not None, "start": str(run.start_time),
                "tasks": {t.name: [t.state.name, str(t.start_time), str(t.end_time)]
                          for t in tasks if t.flow_run_id == run.id},
                "logs": [log.message for logs in pages for log in logs],
            })
        found.sort(key=lambda run: run["start"])
        print(json.dumps(found))

asyncio.run(main())
"""


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


def runs(workspace: Workspace) -> list[dict]:
    return json.loads(workspace.run("python", "-c", RUNS).stdout.splitlines()[-1])


def test_each_stage_is_a_task_with_its_state_and_its_output(
    repository: Workspace, api: dict[str, str]
) -> None:
    mine = Workspace(repository.path, api)
    mine.run("python", "-m", "flows.pipeline")
    first = runs(mine)[-1]
    assert (first["state"], set(first["tasks"])) == ("Completed", {"a", "b", "c", "d"})
    assert {task[0] for task in first["tasks"].values()} == {"Completed"}
    assert "Running stage 'b':" in first["logs"]
    assert "> echo a > a.txt" in first["logs"]
    # b and c wait for one another, so they ran side by side; a came before them, d after.
    for name in "bc":
        begin, end = first["tasks"][name][1:]
        assert first["tasks"]["a"][2] <= begin < end <= first["tasks"]["d"][1]

    mine.run("python", "-m", "flows.pipeline")
    assert {task[0] for task in runs(mine)[-1]["tasks"].values()} == {"Cached"}

    mine.replace("params.yaml", "a: 1", "a: 2")
    change(mine, a="echo b > a.txt")
    mine.run("python", "-m", "flows.pipeline")
    change(mine, a="echo a > a.txt")
    mine.replace("params.yaml", "a: 2", "a: 1")
    mine.run("python", "-m", "flows.pipeline")
    assert {task[0] for task in runs(mine)[-1]["tasks"].values()} == {"Restored"}

    change(mine, c="echo 'tlpipe: c cannot' >&2; exit 4")
    mine.run("python", "-m", "flows.pipeline", code=1)
    failed = runs(mine)[-1]
    assert failed["state"] == "Failed"
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
        ["python", "-m", "flows.pipeline"],
        cwd=mine.path,
        env=mine.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(sleeping(mine)) == 2, process=flow)
    busy = mine.run("python", "-m", "flows.pipeline", code=1)
    assert f"another flow works in {mine.path}: process {flow.pid}" in busy.stderr
    flow.send_signal(signal.SIGTERM)
    flow.wait(PATIENCE_S)
    assert not sleeping(mine)
    assert runs(mine)[-2]["type"] in ("CRASHED", "CANCELLED", "FAILED")


def test_the_deployment_runs_on_a_worker(
    main_job: Workspace, api: dict[str, str], tmp_path: Path
) -> None:
    """'prefect deploy' as the README says, a worker, a triggered run of the real pipeline."""
    mine = copy_repository(tmp_path / "deployed", {**main_job.env, **api})
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
    # Those of the schedule lie in the future and have no tasks.
    done = [run for run in runs(mine) if run["deployment"] and run["tasks"]]
    (run,) = done
    assert run["state"] == "Completed", run["logs"]
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert {name: task[0] for name, task in run["tasks"].items()} == dict.fromkeys(
        stages, "Completed"
    )
    assert any("test accuracy" in message for message in run["logs"])
    assert (mine.path / "artifacts/register/receipt.json").exists()
