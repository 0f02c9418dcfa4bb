"""Talk to MLflow: where it is, which experiment is ours, which version serves.

``MLFLOW_TRACKING_URI`` names the server; without it the store is an SQLite file and a folder in
the workspace.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe import files
from tlpipe.errors import RegistryError
from tlpipe.onnx_export.bundle import LABELS, Bundle, load

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_log = logging.getLogger(__name__)
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
CHAMPION, CHALLENGER = "champion", "challenger"
# DVC alone would say that nothing has changed: it does not see the registry.
_REGISTER = "Register what was built: 'dvc repro --force --single-item register'."
BUNDLE_TAG, BUNDLE_FOLDER = "tlpipe.bundle", "bundle"


@contextmanager
def connection(workspace: Path, *, create: bool = False) -> Iterator["MlflowClient"]:
    """Yield a client of the registry; bounded retries, and one line where it cannot be used.

    ``create``: make the workspace's own store where there is none yet.

    Raises:
        RegistryError: MLflow refuses a request or cannot be reached, or there is no store.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for chatty in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    address = os.environ.get("MLFLOW_TRACKING_URI") or _local_address(workspace)
    database = workspace / DATABASE
    if address == _local_address(workspace) and not database.exists():
        if not create:
            raise RegistryError(
                f"there is no registry yet: {database} is missing and MLFLOW_TRACKING_URI is not "
                f"set. {_REGISTER}"
            )
        _create(database)
    mlflow.set_tracking_uri(address)
    try:
        yield mlflow.MlflowClient()
    except (MlflowException, SQLAlchemyError, ConnectionError) as error:
        line = _without_credentials(" ".join(str(error).split()))[:300]
        raise RegistryError(
            f"MLflow at {_without_credentials(address)} does not answer as expected: {line}. "
            f"Check that it runs; what was built is kept, and the same command goes on from here."
        ) from error


def experiment(client: "MlflowClient", name: str, workspace: Path) -> str:
    """Return the id of the experiment, created where it does not exist."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    is_local = client.tracking_uri == _local_address(workspace)
    root = (workspace.resolve() / ARTIFACTS).as_uri() if is_local else None
    return str(client.create_experiment(name, artifact_location=root))


def find_version(client: "MlflowClient", name: str, alias: str) -> "ModelVersion":
    """Return the model version behind an alias.

    Raises:
        RegistryError: the model or the alias does not exist.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RegistryError(f"the registry has no model {name}@{alias}. {_REGISTER}") from None


def champion_labels(workspace: Path, name: str) -> frozenset[str] | None:
    """Return the labels of the model in production; None if there is none, or nobody answers."""
    if "MLFLOW_TRACKING_URI" not in os.environ and not (workspace / DATABASE).exists():
        return None
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        with connection(workspace) as client:
            version = find_version(client, name, CHAMPION)
            from mlflow.artifacts import load_dict

            return frozenset(load_dict(f"runs:/{version.run_id}/{BUNDLE_FOLDER}/{LABELS}"))
    except RegistryError as error:
        _log.info("what is in production is not known: %s", error)
        return None


def fetch_bundle(workspace: Path, reference: str) -> Bundle:
    """Fetch, verify and return the bundle of ``NAME@ALIAS``.

    Raises:
        RegistryError: there is no such version, or its stored bundle is not the registered one.
    """
    name, _, alias = reference.partition("@")
    with connection(workspace) as client:
        version = find_version(client, name, alias or CHAMPION)
        from mlflow.artifacts import download_artifacts

        local = download_artifacts(run_id=version.run_id, artifact_path=BUNDLE_FOLDER)
    bundle = load(Path(local))
    if (expected := version.tags.get(BUNDLE_TAG)) != bundle.digest:
        raise RegistryError(
            f"the stored bundle of {name} version {version.version} has the digest "
            f"{bundle.digest[:16]}...; the registry says {str(expected)[:16]}.... "
            f"It was swapped or damaged; nothing was loaded."
        )
    return bundle


def _create(database: Path) -> None:
    """Make MLflow's tables under a temporary name: a kill between two of them would be for good."""
    import mlflow

    with files.replacing(database) as temporary:
        temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)
        mlflow.MlflowClient(f"sqlite:///{temporary.resolve()}").search_experiments()


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _local_address(workspace: Path) -> str:
    return f"sqlite:///{workspace.resolve() / DATABASE}"
