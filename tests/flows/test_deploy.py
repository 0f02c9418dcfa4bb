"""'prefect deploy' as a person runs it, and a server that restarts during a night's run."""

import json
import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from tests.conftest import PATIENT, ROOT, Workspace, free_port, server, wait_until
from tests.flows.test_graph import change
from tests.flows.test_graph import repository as repository
from tests.flows.test_pipeline import ask, runs

pytestmark = pytest.mark.slow


@contextmanager
def prefect(home: Path, port: int) -> Iterator[dict[str, str]]:
    """Run a Prefect server on what it has kept in a folder; yield the environment of clients."""
    env = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        **PATIENT,
        "PYTHONPATH": str(ROOT),
    }
    start = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with server(Workspace(home, env), *start, ready=f"{env['PREFECT_API_URL']}/health"):
        yield env


def in_a_terminal(workspace: Workspace, *command: str) -> tuple[int | None, str]:
    """Run a command in a terminal in which nobody answers.

    Return its exit code and what it said; None where it asks, and is silent for a minute then.
    """
    here, there = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=workspace.path,
        env={**workspace.environment(), "TERM": "xterm"},
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
    )
    os.close(there)
    said = b""
    try:
        while b"[y/n]" not in said and select.select([here], [], [], 60)[0]:
            try:
                said += os.read(here, 4096)
            except OSError:  # the other side is closed
                return process.wait(), said.decode()
    finally:
        process.kill()
        process.wait()
        os.close(here)
    return None, said.decode()


@pytest.mark.xfail(strict=True, reason="issue 19: 'prefect deploy' asks; Enter means a fresh clone")
def test_deploy_asks_nothing_and_works_in_the_workspace(
    workspace: Workspace, tmp_path: Path
) -> None:
    home = tmp_path / "prefect"
    home.mkdir()
    workspace.run("git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    with prefect(home, free_port()) as env:
        mine = Workspace(workspace.path, {**workspace.env, **env})
        mine.run("prefect", "work-pool", "create", "tlpipe", "--type", "process")
        code, said = in_a_terminal(mine, "prefect", "deploy", "--name", "nightly")
        assert code == 0, said
        inspect = ("prefect", "deployment", "inspect", "tlpipe/nightly", "--output", "json")
        steps = json.loads(mine.run(*inspect).stdout)["pull_steps"]
    assert not any("git_clone" in name for step in steps or [] for name in step)


@pytest.mark.fault("O02")
def test_a_server_that_restarts_ends_no_run(repository: Workspace, tmp_path: Path) -> None:
    home, port, root = tmp_path / "prefect", free_port(), repository.path
    home.mkdir()
    shutil.copytree(ROOT / "flows", root / "flows")
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    (deployment,) = content["deployments"]
    assert "concurrency_limit" not in deployment  # its lease is renewed every 225 s, and then lost
    deployment["schedules"] = []
    (root / "prefect.yaml").write_text(yaml.safe_dump(content))
    change(repository, a="touch begun; until test -e go; do sleep 0.2; done; echo a > a.txt")
    health = free_port()
    worker = {
        "PREFECT_WORKER_WEBSERVER_PORT": str(health),
        "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    start = ("prefect", "worker", "start", "--pool", "tlpipe", "--with-healthcheck")
    ready = f"http://127.0.0.1:{health}/health"
    with ExitStack() as stack:
        with prefect(home, port) as env:
            mine = Workspace(root, env)
            mine.run("prefect", "work-pool", "create", "tlpipe", "--type", "process")
            mine.run("prefect", "--no-prompt", "deploy", "--name", "nightly")
            stack.enter_context(server(Workspace(root, {**env, **worker}), *start, ready=ready))
            mine.run("prefect", "deployment", "run", "tlpipe/nightly")
            wait_until((root / "begun").exists)
        time.sleep(10)
        with prefect(home, port):
            time.sleep(10)
            (root / "go").touch()
            final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
            wait_until(lambda: ask(mine, "flow_runs")[-1]["state"]["type"] in final)
            (run,) = runs(mine)
            assert run["name"] == "Completed", (run["message"], run["logs"])
