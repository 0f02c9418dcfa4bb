"""What others deleted or renamed in MLflow, found before hours of training, for ``check``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe.errors import UnreachableError
from tlpipe.registry import local, moves, tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient


def run(*, workspace: Path, name: str) -> list[str]:
    """Return a line for each change that ``register`` will not stop at, with what helps.

    Raises:
        RegistryError: a change at which ``register`` would stop.
    """
    if not tracking.is_there(workspace):
        return []
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        with tracking.connection(workspace) as client:
            said = (moves.check_name(client, name), _experiment(client, name))
    except UnreachableError as error:
        said = ("", f"what others changed in the registry is not known: {error}")
    return [line for line in said if line]


def _experiment(client: "MlflowClient", name: str) -> str:
    """Say that the experiment of a model was renamed, or is gone with its runs.

    Raises:
        RegistryError: it is deleted.
    """
    from mlflow.exceptions import MlflowException

    tracking.find_experiment(client, name)
    newest = client.search_model_versions(
        f"name = '{name}'", max_results=1, order_by=["version_number DESC"]
    )
    if not newest or not (run_id := newest[0].run_id):
        return ""
    try:
        number = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return (
            f"the run of {name} version {newest[0].version} is gone for good, and its artifacts "
            f"with it. {local.REGISTER}"
        )
    found = client.get_experiment(number)
    if found.name == name:
        return ""
    rename = ("mlflow", "experiments", "rename", "-x", number, "--new-name", name)
    return (
        f"the experiment {name} was renamed to {found.name} in MLflow: new runs go to another one "
        f"of the name {name}, and what was registered is registered once more. Take the name back "
        f"before: '{local.command(client, *rename)}'."
    )
