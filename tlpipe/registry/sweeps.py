"""A sweep in MLflow: a run for it, and a run below that for each of its cells.

Both are found by what they are of, so a sweep that goes on after a kill completes its runs instead
of making others.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlpipe.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_KIND, _SWEEP, _CELL = "tlpipe.kind", "tlpipe.sweep", "tlpipe.cell"
_LONGEST_VALUE = 500  # of a parameter


def begin(workspace: Path, name: str, sweep: str, params: Mapping[str, str]) -> str:
    """Return the id of a sweep's run, which is made where there is none yet.

    ``name``: of the experiment; ``sweep``: the digest of what is swept.

    Raises:
        RegistryError: MLflow cannot be reached, or rejects a request.
    """
    with tracking.connection(workspace, create=True) as client:
        experiment = tracking.experiment(client, name, workspace)
        found = _search(client, experiment, f"tags.`{_SWEEP}` = '{sweep}'")
        runs = [run for run in found if run.data.tags.get(_KIND) == "sweep"]
        if runs:
            client.update_run(runs[0].info.run_id, status="RUNNING")
            return str(runs[0].info.run_id)
        run = client.create_run(experiment, run_name="sweep", tags={_KIND: "sweep", _SWEEP: sweep})
        _log(client, run.info.run_id, params, {})
        return str(run.info.run_id)


def record(workspace: Path, parent: str, cells: Iterable[Mapping[str, Any]]) -> None:
    """Let each of these cells have its run; what is there already stays.

    A cell has ``id``, ``name``, ``params``, ``metrics``, ``tags`` and ``status``.

    Raises:
        RegistryError: as ``begin``.
    """
    with tracking.connection(workspace) as client:
        experiment = client.get_run(parent).info.experiment_id
        below = f"tags.`mlflow.parentRunId` = '{parent}'"
        known = {run.data.tags.get(_CELL): run for run in _search(client, experiment, below)}
        for cell in cells:
            run = known.get(cell["id"])
            if run is None:
                tags = {
                    **cell["tags"],
                    _KIND: "cell",
                    _CELL: cell["id"],
                    "mlflow.parentRunId": parent,
                }
                run = client.create_run(experiment, run_name=cell["name"], tags=tags)
            elif run.info.status == cell["status"] and {*cell["metrics"]} <= {*run.data.metrics}:
                continue
            _log(client, run.info.run_id, cell["params"], cell["metrics"])
            client.set_terminated(run.info.run_id, cell["status"])


def end(workspace: Path, parent: str, files: Sequence[Path], *, is_whole: bool) -> None:
    """Put the table and the picture beside a sweep's run; ``is_whole``: no cell is left.

    Raises:
        RegistryError: as ``begin``.
    """
    with tracking.connection(workspace) as client:
        for path in files:
            client.log_artifact(parent, str(path))
        client.set_terminated(parent, "FINISHED" if is_whole else "KILLED")


def _search(client: "MlflowClient", experiment: str, wanted: str) -> "list[Run]":
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], wanted, max_results=1000, page_token=token)
        found += page
        if not (token := page.token):
            return found


def _log(
    client: "MlflowClient", run_id: str, params: Mapping[str, str], metrics: Mapping[str, float]
) -> None:
    import time

    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
        params=[Param(key, str(value)[:_LONGEST_VALUE]) for key, value in params.items()],
    )
