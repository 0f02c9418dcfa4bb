"""A sweep as a Prefect flow whose tasks run on Ray: one task a cell.

``tlpipe sweep`` plans the cells and runs this. Ray is started here for as long as the flow runs, on
this machine and for this user alone, or is a cluster that an address names: its machines need the
project under the same path, and the same packages.
"""

# ruff: noqa: E402
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

# Read when prefect and ray are imported: no telemetry, and time enough for its own server to start.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Nothing is imported from a project, whatever is in it.
os.environ.pop("PYTHONSAFEPATH", None)
_flows = Path(__file__).resolve().parent
if __name__ != "__main__" and sys.path[:2] == [str(_flows), str(_flows.parent)]:
    del sys.path[:2]

from tlpipe import cells

if __name__ == "__main__" and cells.plan(Path())["address"] is None:
    # Whoever reaches Ray's ports runs code: on this machine alone (Ray itself would make 127.0.0.1
    # the address by which others reach it), and with a password. Read when ray is imported.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)

import ray
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from prefect_ray.task_runners import PrefectRayFuture

_QUIET_S = 30.0  # after which something is said of a cell that is at work
_GRACE_S = 20.0  # after the deadline, for a task to end by itself
_LEAST_S = 1.0  # of a task: none at all would be no limit
_BYTES = 80_000_000  # the least that Ray takes for objects; a cell gives a line of text


@task(cache_policy=NO_CACHE, persist_result=False)
def work(workspace: str, number: int, deadline: float | None) -> State[None]:
    """Do one cell; what is done already is not done again."""
    outcome = cells.work(Path(workspace), number, deadline)
    made = Failed if outcome.name == "Failed" else Completed
    return made(name=outcome.name, message=outcome.said)


@flow(name="tlpipe-sweep")
def sweep(workspace: str, deadline: float | None = None) -> list[State[None]]:
    """Do the cells that ``tlpipe sweep`` has planned, as many at once as Ray has processors for.

    A task ends as Completed, Cached (it was done before), Pruned, Left (it would not end before
    ``deadline``, in seconds since 1970), Stopped (it was at work at that time) or Failed.
    """
    root, logger = Path(workspace), get_run_logger()
    plan = cells.plan(root)
    # Of a cluster, no machine may have as many as the one that planned.
    machines = [node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]]
    each = min(float(plan["threads"]), max(machines))
    # Each trial learns from those before.
    most = 1 if plan["search"] else max(int(sum(count // each for count in machines)), 1)
    waiting = list(plan["todo"])
    at_work: dict[Any, tuple[int, PrefectRayFuture[Any], float]] = {}
    states: list[State[None]] = []
    said, began = "", time.time()
    while waiting or at_work:
        # Not all at once: Ray would not keep their order, and the first ones tell the most.
        while waiting and len(at_work) < most:
            number = waiting.pop(0)
            seconds = None if deadline is None else max(deadline - time.time(), _LEAST_S)
            named = work.with_options(name=cells.title(plan, number), timeout_seconds=seconds)
            with remote_options(num_cpus=each, max_retries=0):
                future = cast(PrefectRayFuture[Any], named.submit(workspace, number, deadline))
            at_work[future.wrapped_future] = number, future, time.time()
        end = math.inf if deadline is None else deadline + _GRACE_S
        patience = min(_QUIET_S, max(end - time.time(), 0.0))
        ended, others = ray.wait(list(at_work), num_returns=1, timeout=patience)
        is_over = time.time() >= end
        for reference in [*ended, *(others if is_over else ())]:
            number, future, since = at_work.pop(reference)
            if reference in ended:
                future.wait()
                state = future.state
            else:  # it does not return
                ray.cancel(reference, force=True)
                if plan["search"] is None:
                    cells.note_stopped(root, plan["cells"][number]["id"], time.time() - since)
                state = Completed(name="TimedOut")
            if state.name == "TimedOut":
                state = Completed(name="Stopped", message="the time was up")
            states.append(state)
            if [one.name for one in states].count("Left") > 1 and state.name == "Left":
                continue  # the first says why; how many there are is said at the end
            title = f"{len(states)} of {len(plan['todo'])}, {cells.title(plan, number)}"
            logger.info("%s %s: %s", title, str(state.name).lower(), state.message)
        if not ended and (line := cells.last_said(root, began)) != said:
            logger.info("%s", line)
            said = line
        if deadline is not None and time.time() >= deadline:
            waiting.clear()
    return states


def runner(address: str | None, cores: int) -> Any:
    """Return what runs tasks: on Ray at an address, or on one of this process's own.

    ``cores``: that this machine has for cells.
    """
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        return RayTaskRunner(address=address, init_kwargs=quiet)
    local = {
        "address": "local",  # or Ray would join one that runs here already
        "include_dashboard": False,
        "num_cpus": cores,
        "object_store_memory": _BYTES,
    }
    return RayTaskRunner(init_kwargs=quiet | local)


@contextmanager
def one_server(*, is_local: bool) -> Iterator[None]:
    """Let the flow and Ray's workers share a Prefect server where none is set up.

    Without, each worker would start one of its own. Those on other machines do.
    """
    if PREFECT_API_URL.value() or not is_local:
        yield
        return
    server = SubprocessASGIServer()
    server.start()  # it ends with this process, behind the last line of the log
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield


if __name__ == "__main__":
    folder = Path().resolve()
    plan = cells.plan(folder)
    os.chdir(sys.prefix)  # Ray lets its workers import from the current folder
    chosen = sweep.with_options(task_runner=runner(plan["address"], plan["cores"]))
    with one_server(is_local=plan["address"] is None):
        end = chosen(str(folder), plan["deadline"], return_state=True)
    if not end.is_completed():
        raise SystemExit(f"tlpipe: the sweep ended as {end.name}: {end.message}")
