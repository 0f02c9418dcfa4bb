"""The pipeline as a Prefect flow: DVC's graph, one task a stage.

Run it with ``tlpipe flow``, or deploy it: ``prefect.yaml`` has a nightly schedule.
"""

# ruff: noqa: E402
import os
import sys
from pathlib import Path
from typing import Any, cast

# Read when prefect is imported: no telemetry, and time enough for its own server to start.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
# Nothing is imported from a project, whatever is in it: prefect.yaml says so for Prefect's process,
# not for the stages, and Prefect puts two folders of it first when it loads this file.
os.environ.pop("PYTHONSAFEPATH", None)
_flows = Path(__file__).resolve().parent
if __name__ != "__main__" and sys.path[:2] == [str(_flows), str(_flows.parent)]:
    del sys.path[:2]

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tlpipe import graph


@task(cache_policy=NO_CACHE, persist_result=False)
def reproduce(runner: graph.Runner, stage: str) -> State[None]:
    """Reproduce one stage; DVC alone decides whether there is anything to do."""
    outcome = runner.reproduce(stage, get_run_logger().info)
    return Completed(name=outcome.value, message=f"{stage}: {outcome.value.lower()}")


_side_by_side = cast(TaskRunner[PrefectFuture[Any]], ThreadPoolTaskRunner[Any](max_workers=8))


@flow(name="tlpipe", task_runner=_side_by_side)
def pipeline(
    workspace: str = ".", stage_timeout_s: float = 86_400, retries: int = 0
) -> list[State[None]]:
    """Reproduce every stage of the workspace's ``dvc.yaml``, independent ones side by side.

    A task ends as Completed, Cached (nothing to do) or Restored (out of DVC's run cache); a stage
    that fails, or takes longer than ``stage_timeout_s`` seconds, is tried ``retries`` times more.
    """
    root = Path(workspace)
    futures: dict[str, PrefectFuture[State[None]]] = {}
    with graph.exclusive(root) as lock:
        runner = graph.Runner(root, timeout_s=stage_timeout_s, inherit=(lock,))
        try:
            for stage in graph.read(root):
                named = reproduce.with_options(
                    name=stage.name, task_run_name=stage.name, retries=retries
                )
                upstream = [futures[name] for name in stage.upstream]
                futures[stage.name] = named.submit(
                    runner, stage.name, return_state=False, wait_for=upstream
                )
            wait(list(futures.values()))
        finally:
            # Also on cancel and Ctrl-C, when stages are still at work.
            runner.close()
    return [future.state for future in futures.values()]


if __name__ == "__main__":
    end = pipeline(return_state=True)
    if not end.is_completed():
        raise SystemExit(f"tlpipe: the flow ended as {end.name}: {end.message}")
