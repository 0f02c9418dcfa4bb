"""Talk to MLflow: where it is, which experiment is ours, which version serves.

``MLFLOW_TRACKING_URI`` names the server; without it the store is an SQLite file and a folder in
the workspace.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe import files
from tlpipe.errors import Interrupted, RegistryError
from tlpipe.onnx_export.bundle import LABELS, Bundle, load

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from tlpipe.learning.head import Step

_log = logging.getLogger(__name__)
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
CHAMPION, CHALLENGER = "champion", "challenger"
# DVC alone would say that nothing has changed: it does not see the registry.
_REGISTER = "Register what was built: 'dvc repro --force --single-item register'."
_TRAINING = {"tlpipe.kind": "training"}
BUNDLE_TAG, BUNDLE_FOLDER, MODEL_FOLDER = "tlpipe.bundle", "bundle", "trained"


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


def fetch_model(workspace: Path, reference: str) -> Path:
    """Fetch what ``train`` wrote of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises:
        RegistryError: there is no such version, or it was registered without.
    """
    found = re.fullmatch(r"models:/([^@/]+)(?:@([^@/]+)|/(\d+))", reference)
    if found is None:
        raise RegistryError(
            f"embed.weights is {reference}; expected models:/NAME@ALIAS or models:/NAME/VERSION. "
            f"Change it in params.yaml."
        )
    name, alias, number = found.groups()
    with connection(workspace) as client:
        version = client.get_model_version(name, number) if number else None
        version = version or find_version(client, name, alias)
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(run_id=version.run_id, artifact_path=MODEL_FOLDER))


@contextmanager
def live_run(workspace: Path, name: str) -> Iterator[Callable[[Sequence["Step"]], None]]:
    """Yield what logs the curves of a training while it goes on, into a run of its own.

    Training needs nothing of the server: where it fails, that is said, and training goes on.
    """
    try:
        with connection(workspace) as client:
            from mlflow.entities import Metric

            experiment_id = experiment(client, name, workspace)
            run = client.create_run(experiment_id, run_name="training", tags=_TRAINING)
    except RegistryError as error:
        _log.warning("no live curves: %s", error)
        yield lambda _: None
        return
    run_id, logged, status = run.info.run_id, 0, "FAILED"

    def log(steps: "Sequence[Step]") -> None:
        nonlocal logged
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, number)
            for number, step in enumerate(steps[logged:], start=logged)
            for key, value in asdict(step).items()
            if value is not None
        ]
        try:
            with connection(workspace) as client:
                client.log_batch(run_id, metrics=metrics)
            logged = len(steps)
        except RegistryError as error:
            _log.warning("the live curves wait: %s", error)

    try:
        yield log
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        with suppress(RegistryError), connection(workspace) as client:
            client.set_terminated(run_id, status)


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
