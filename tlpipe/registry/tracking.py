"""Talk to MLflow: where it is, which experiment is ours, which version serves.

``MLFLOW_TRACKING_URI`` names the server; without it the store lies in the project's folder.
"""

import atexit
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from tlpipe import code_digest, files
from tlpipe.bundle import LABELS, Bundle, digest, load
from tlpipe.errors import ArtifactError, Interrupted, RegistryError, UnreachableError
from tlpipe.registry import SUFFIX, Registered, local, moves
from tlpipe.registry.moves import BUNDLE_TAG, CHAMPION
from tlpipe.versioning import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.entities.model_registry import ModelVersion

    from tlpipe.training.model import Step

_log = logging.getLogger(__name__)
CHALLENGER = "challenger"
_DIGEST = re.compile("[0-9a-f]{64}")
_ADDRESS = "MLFLOW_TRACKING_URI"
_REGISTRY = "MLFLOW_REGISTRY_URI"
# What shows a server who asks, and whether that may be shown to anybody in between.
_ACCOUNT = tuple(
    f"MLFLOW_TRACKING_{part}"
    for part in (
        *("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH"),
        "INSECURE_TLS",
    )
)
_TRAINING = {"tlpipe.kind": "training"}
BUNDLE_FOLDER, MODEL_FOLDER, SPLIT = "bundle", "trained", "data/split.csv"
ENSEMBLE = "ensemble.json"  # in the second one, where members answer instead of one network
_BATCH = 1000  # metrics that MLflow takes at once
_PATIENCE = 10  # times as long as a server took to fail, it is not asked again


@contextmanager
def connection(
    workspace: Path, *, create: bool = False, address: str | None = None
) -> Iterator["MlflowClient"]:
    """Yield a client of the registry; bounded retries, and one line where it cannot be used.

    ``create``: make the workspace's own store where there is none yet. ``address``: of another
    server than the workspace's, which sees the account in the variables ``TO_MLFLOW_TRACKING_...``,
    never that of the workspace's server, nor that in ``~/.mlflow/credentials``.

    Raises:
        RegistryError: there is no store, or it cannot be used from here.
        UnreachableError: MLflow rejects a request or cannot be reached.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for chatty in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    given = os.environ.get(_ADDRESS)
    with ExitStack() as stack:
        stack.enter_context(_restored(_ADDRESS, _REGISTRY, *_ACCOUNT))
        _set({_REGISTRY: None})  # MLflow would prefer it, also to the address of another server
        if address is not None and urlsplit(address).netloc != urlsplit(given or "").netloc:
            _set({name: os.environ.get(f"TO_{name}") for name in _ACCOUNT})
            stack.enter_context(_without_credentials_file())
        address = address or given or local.address(workspace)
        if not local.is_own(workspace, address):
            _check_address(address, create=create)
        else:
            if create and not local.database(workspace).exists():
                local.create(workspace)
            address = stack.enter_context(local.opened(workspace, to_write=create))
        mlflow.set_tracking_uri(address)  # also sets the variable
        try:
            yield mlflow.MlflowClient()
        except _errors() as error:
            said = without_credentials(" ".join(str(error).split()))
            shown = without_credentials(address)
            if refused := re.search(r"error code (401|403)\b", said):
                raise UnreachableError(
                    f"MLflow at {shown} refuses whoever asks (HTTP {refused[1]}). Give an account "
                    f"that may do this: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                    f"MLFLOW_TRACKING_TOKEN; with TO_ before them for the server of --to."
                ) from error
            # Behind addresses and numbers of attempts, the libraries say last what happened.
            if cause := re.search(r"\(Caused by (.+)\)", said):
                said = cause[1]
            kept = "what was built is kept, and the same command goes on from here"
            then = kept if create else "then give the same command again"
            raise UnreachableError(
                f"MLflow at {shown} does not answer as expected: {_shortened(said)} Check that "
                f"MLflow runs there; {then}."
            ) from error


def _check_address(address: str, *, create: bool) -> None:
    """Check that an address may be one of a registry; ``create``: it may be made there.

    Raises:
        RegistryError: it is none, or there is no such database.
    """
    parts, shown = urlsplit(address), without_credentials(address)
    expected = (
        "Expected http://HOST:PORT, https://, or a database, such as sqlite:////folder/mlflow.db."
    )
    if not _has_store(address):
        raise RegistryError(
            f"{shown} is no address of a registry: MLflow knows no {parts.scheme}:. {expected}"
        )
    is_web = parts.scheme in ("http", "https")
    is_whole = "://" in address or address == "databricks"
    if parts.scheme in ("", "file") or not is_whole or (is_web and not parts.netloc):
        raise RegistryError(f"{shown} is no address of a registry. {expected}")
    database = Path(address.partition(":///")[2].partition("?")[0])
    if parts.scheme == "sqlite" and not create and not database.is_file():
        raise RegistryError(
            f"there is no database {database.absolute()}; an absolute path has four slashes before "
            f"it: sqlite:////folder/mlflow.db. {local.MAKE}"
        )


def _shortened(text: str, most: int = 300) -> str:
    """Return a sentence of at most so many characters, cut between words where it is longer."""
    if len(text) > most:
        text = f"{text[:most].rpartition(' ')[0]} ..."
    return text if text.endswith(".") else f"{text}."


def _has_store(address: str) -> bool:
    """Return whether MLflow has a store for addresses of this scheme."""
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    scheme = urlsplit(address).scheme.partition("+")[0]
    return scheme == "databricks" or scheme in _tracking_store_registry._registry


@contextmanager
def _without_credentials_file() -> Iterator[None]:
    """Let MLflow not read ``~/.mlflow/credentials``, which it would show to any server."""
    from mlflow.utils import credentials

    reads = credentials._read_mlflow_creds_from_file
    credentials._read_mlflow_creds_from_file = lambda: (None, None)
    try:
        yield
    finally:
        credentials._read_mlflow_creds_from_file = reads


@contextmanager
def _restored(*names: str) -> Iterator[None]:
    """Give variables of the environment the values back that they have now."""
    kept = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        _set(kept)


def _set(values: Mapping[str, str | None]) -> None:
    """Set variables of the environment; take those of None away."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _errors() -> tuple[type[Exception], ...]:
    """Return what MLflow raises, and what passes through it from databases and stores."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    known = [MlflowException, SQLAlchemyError, ConnectionError, RequestException]
    with suppress(ImportError):  # only where artifacts go to S3 directly
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        known += [Boto3Error, BotoCoreError, ClientError]
    return tuple(known)


def is_there(workspace: Path) -> bool:
    """Return whether there may be a registry: one that is named, or the project's own."""
    return bool(os.environ.get(_ADDRESS)) or local.database(workspace).exists()


def own_state(workspace: Path) -> str | None:
    """Return what any write to the registry changes; None for other ones than the workspace's."""
    given = os.environ.get(_ADDRESS)
    return local.state(workspace) if not given or local.is_own(workspace, given) else None


def remembered(workspace: Path, question: str, ask: "Callable[[MlflowClient], Any]") -> Any:
    """Return a registry's answer; what the workspace's own one has answered is not asked again.

    Importing MLflow takes longer than all else that a run with nothing to do does. An answer holds
    for the code that asked and the database as it was: whatever is written there ends it.
    ``ask`` gives what JSON can keep; what it raises is not kept.
    """
    if (state := own_state(workspace)) is None:
        with connection(workspace) as client:
            return ask(client)
    code = (code_digest.of_closure("tlpipe.registry.register"), code_digest.versions("mlflow"))
    place = hashlib.sha256(bytes(local.database(workspace))).hexdigest()[:16]
    place, key = f"registry/{place}.json", f"{state} {code}"
    answers = files.kept(place, key)
    if question not in answers:
        with connection(workspace) as client:
            answers[question] = ask(client)
        files.keep(place, key, answers)
    return answers[question]


def check_own(workspace: Path) -> None:
    """Check that the registry in use is the workspace's own.

    Raises:
        RegistryError: MLFLOW_TRACKING_URI names another one.
    """
    given = os.environ.get(_ADDRESS)
    if given and not local.is_own(workspace, given):
        raise RegistryError(
            f"{_ADDRESS} names {without_credentials(given)}, not this folder's registry. Open that "
            f"address in the browser, or unset {_ADDRESS} to see what is registered here."
        )


def experiment(client: "MlflowClient", name: str, workspace: Path) -> str:
    """Return the id of the experiment, created where it does not exist.

    Raises:
        RegistryError: it is deleted.
    """
    from mlflow.exceptions import MlflowException

    if (found := find_experiment(client, name)) is not None:
        return str(found.experiment_id)
    is_local = client.tracking_uri == local.address(workspace)
    root = local.artifacts(workspace) if is_local else None
    # Or MLflow's page opens with the views of language models.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return str(client.create_experiment(name, artifact_location=root, tags=kind))
    except MlflowException as error:
        found = client.get_experiment_by_name(name)  # somebody was faster
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return str(found.experiment_id)


def find_experiment(client: "MlflowClient", name: str) -> "Experiment | None":
    """Return the experiment of a name, or None.

    Raises:
        RegistryError: it is deleted. Its name is taken as long as MLflow keeps it.
    """
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        restore = ("mlflow", "experiments", "restore", "-x", str(found.experiment_id))
        raise RegistryError(
            f"the experiment {name} was deleted in MLflow, and nothing can be registered in it. "
            f"Restore it: '{local.command(client, *restore)}'."
        )
    return found


def find_version(client: "MlflowClient", name: str, which: str) -> "ModelVersion":
    """Return the model version of a number, behind an alias, or of a bundle's digest.

    Raises:
        RegistryError: the model, the version or the alias does not exist.
    """
    from mlflow.exceptions import MlflowException

    if _DIGEST.fullmatch(which):
        wanted = f"name = '{name}' and tags.`{BUNDLE_TAG}` = '{which}'"
        if found := client.search_model_versions(wanted):
            return max(found, key=lambda version: int(version.version))
        raise RegistryError(
            f"the registry has no version of {name} with the bundle {which[:16]}. {local.REGISTER}"
        )
    try:
        if which.isdecimal():
            return client.get_model_version(name, which)
        return client.get_model_version_by_alias(name, which)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        if which == CHAMPION and (there := numbers(client, name)):
            known = client.get_registered_model(name).aliases
            example = CHALLENGER if CHALLENGER in known else there[-1]
            raise RegistryError(
                f"nothing of {name} is in production. Put a version there: 'tlpipe promote', or "
                f"name one: --model {name}@{example}."
            ) from None
        wanted = f"version {which} of {name}" if which.isdecimal() else f"model {name}@{which}"
        raise RegistryError(
            f"the registry has no {wanted}. {_what_there_is(client, name)}"
        ) from None


def model_names(client: "MlflowClient") -> list[str]:
    """Return the names of all registered models, sorted; logs of moves are none."""
    names, token = list[str](), None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [model.name for model in page if not model.name.endswith(SUFFIX)]
        if not (token := page.token):
            return sorted(names)


def challenge(client: "MlflowClient", name: str, version: str) -> None:
    """Let the alias ``challenger`` name a version, unless it names a later one."""
    current = client.get_registered_model(name).aliases.get(CHALLENGER)
    if current is None or int(current) < int(version):
        client.set_registered_model_alias(name, CHALLENGER, version)


def check_known(client: "MlflowClient", name: str) -> None:
    """Check that a model is registered.

    Raises:
        RegistryError: it is not, or by another name.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        moves.check_name(client, name)
        raise RegistryError(f"the registry has no model {name}. {local.MAKE}")


def numbers(client: "MlflowClient", name: str) -> list[int]:
    """Return the numbers of a model's versions, sorted."""
    return sorted(int(v.version) for v in client.search_model_versions(f"name = '{name}'"))


def of_deleted_run(client: "MlflowClient", name: str, number: str) -> str:
    """Say that the run of a version was deleted, with what the version is made of; else nothing."""
    run_id = client.get_model_version(name, number).run_id
    if not run_id or client.get_run(run_id).info.lifecycle_stage != "deleted":
        return ""
    restore = local.command(client, "mlflow", "runs", "restore", "--run-id", run_id)
    return (
        f"the run of {name} version {number} was deleted in MLflow, and 'mlflow gc' would remove "
        f"the model with it. Restore it: '{restore}'."
    )


def _what_there_is(client: "MlflowClient", name: str) -> str:
    found = numbers(client, name)
    if not found:
        # Of a model without versions, all were deleted.
        return local.REGISTER if client.search_registered_models(f"name = '{name}'") else local.MAKE
    known = [*map(str, found[-5:]), *sorted(client.get_registered_model(name).aliases)]
    return f"Expected one that is there, such as {', '.join(known)}."


@dataclass(frozen=True)
class Fetched:
    """A bundle of the registry. ``degraded``: why it is not the one asked for, or empty."""

    bundle: Bundle
    version: str
    degraded: str = ""


def fetch(client: "MlflowClient", name: str, which: str) -> Fetched:
    """Fetch and verify a bundle; for the champion, where it is gone or damaged, the last good one.

    Where somebody took the alias away, nothing is in production, whatever was there before.

    Raises:
        ArtifactError: its files are damaged.
        RegistryError: there is no such version, or its stored bundle is not the registered one.
    """
    version = None
    try:
        version = find_version(client, name, which)
        if which == CHAMPION:
            check_promoted(client, version)
        return Fetched(bundle_of(client, version), str(version.version))
    except (ArtifactError, RegistryError) as error:
        if which != CHAMPION:
            raise
        wrong = error
    log, there = moves.history(client, name), numbers(client, name)
    if version is None and not moves.was_deleted(log, there):
        raise wrong
    bad = str(version.version) if version else moves.standing(log)[-1]
    for number in moves.stand_ins(log, there):
        if number == bad:
            continue
        with suppress(ArtifactError, RegistryError):
            older = find_version(client, name, number)
            check_promoted(client, older)
            found = bundle_of(client, older)
            degraded = f"{name} version {bad} cannot serve, version {number} does: {wrong}"
            _log.warning("degraded: %s", degraded)
            return Fetched(found, number, degraded)
    raise wrong


def check_promoted(client: "MlflowClient", version: "ModelVersion") -> None:
    """Check that a version is still what was put in production, by the digest in its last move.

    Raises:
        RegistryError: somebody has changed the version's tags since, and maybe its files.
    """
    last = moves.last_to(client, version.name, str(version.version))
    found = version.tags.get(BUNDLE_TAG, "")
    if last is not None and last.bundle != found:
        raise RegistryError(
            f"{version.name} version {version.version} is not what was put in production: its tag "
            f"{BUNDLE_TAG} is {found[:16] or 'missing'}, expected {last.bundle[:16]}. Nothing was "
            f"loaded. Promote the version again, if it was changed on purpose."
        )


def bundle_of(client: "MlflowClient", version: "ModelVersion") -> Bundle:
    """Fetch and verify the bundle of a version.

    Raises:
        ArtifactError: its files are damaged.
        RegistryError: its stored bundle is not the registered one.
    """
    folder = artifact(client, version.run_id, BUNDLE_FOLDER)
    if folder is None:
        raise RegistryError(
            f"{version.name} version {version.version} has no bundle{_missing(client, version)}: "
            f"it was not registered by tlpipe, or its artifacts are gone."
        )
    return verified(version, folder)


def _missing(client: "MlflowClient", version: "ModelVersion") -> str:
    """Say where the bundle of a version would lie, if its run is there."""
    from mlflow.exceptions import MlflowException

    if version.run_id is None:
        return ""
    with suppress(MlflowException):
        root = client.get_run(version.run_id).info.artifact_uri
        return f" at {without_credentials(f'{root}/{BUNDLE_FOLDER}')}"
    return ""


def only_here(client: "MlflowClient", artifacts: str, workspace: Path) -> str:
    """Return where artifacts lie, if in this project and the registry elsewhere.

    ``artifacts``: the address of a run's, or of an experiment's.
    """
    if local.is_own(workspace, client.tracking_uri):
        return ""
    parts = urlsplit(artifacts)
    folder = Path(unquote(parts.path))
    is_within = folder.is_absolute() and folder.is_relative_to(local.project(workspace))
    return str(folder) if parts.scheme in ("", "file") and is_within else ""


def verified(version: "ModelVersion", folder: Path) -> Bundle:
    """Return what was fetched as the bundle of a version, if it is that.

    Raises:
        ArtifactError: its files are damaged.
        RegistryError: it is not the registered one.
    """
    # Before anything of it is read: whoever swapped it may have brought a seal along.
    if (expected := version.tags.get(BUNDLE_TAG)) != (found := digest(folder)):
        raise RegistryError(
            f"the stored bundle of {version.name} version {version.version} has the digest "
            f"{found[:16]}...; the registry says {str(expected)[:16]}.... "
            f"It was swapped or damaged; nothing was loaded."
        )
    return load(folder)


def artifact(client: "MlflowClient", run_id: str | None, place: str) -> Path | None:
    """Fetch a file or folder of a run's artifacts, None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        if run_id is None:
            return None
        beside = client.list_artifacts(run_id, place.rpartition("/")[0] or None)
        if place not in {found.path for found in beside}:
            return None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return Path(client.download_artifacts(run_id, place, mkdtemp(dir=_downloads())))


def champion_labels(workspace: Path, name: str) -> frozenset[str] | None:
    """Return the labels of the model in production; None if there is none, or nobody answers.

    That a registry knows no such model, or has none in production, is nothing to be said.
    """
    if not is_there(workspace):
        return None
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        found = remembered(workspace, f"labels of {name}", partial(_champion_labels, name))
    except RegistryError as error:
        _log.info("what is in production is not known: %s", error)
        return None
    return None if found is None else frozenset(found)


def _champion_labels(name: str, client: "MlflowClient") -> list[str] | None:
    found = client.search_registered_models(f"name = '{name}'")
    if not found or CHAMPION not in found[0].aliases:
        return None
    version = find_version(client, name, CHAMPION)
    from mlflow.artifacts import load_dict

    return list(load_dict(f"runs:/{version.run_id}/{BUNDLE_FOLDER}/{LABELS}"))


@cache
def _downloads() -> Path:
    """Return a folder for what is fetched, which goes when the process ends."""
    folder = TemporaryDirectory(prefix="tlpipe-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)


def fetch_bundle(workspace: Path, model: Registered) -> Fetched:
    """Fetch the bundle of a registered version, as ``fetch`` does.

    Raises:
        ArtifactError: its files are damaged.
        RegistryError: there is no such version, or its stored bundle is not the registered one.
    """
    with connection(workspace) as client:
        return fetch(client, model.name, model.which)


def fetch_model(workspace: Path, model: Registered) -> tuple[Path, Path | None, str]:
    """Fetch what ``train`` wrote of a registered version; return it, and the version's number.

    Between them its split table, which says what it was trained on; None where the run has none.

    Raises:
        RegistryError: there is no such version, or it was registered without.
    """
    with connection(workspace) as client:
        version = find_version(client, model.name, model.which)
        folder = artifact(client, version.run_id, MODEL_FOLDER)
        split = artifact(client, version.run_id, SPLIT)
    if folder is not None and (folder / ENSEMBLE).exists():
        raise RegistryError(
            f"{model} is an ensemble, and embed.weights takes one network; expected a version that "
            f"was trained. Name one of its members: 'tlpipe show {model}'."
        )
    if folder is None:
        raise RegistryError(
            f"{model} has no {MODEL_FOLDER} folder among the artifacts of its run: it was not "
            f"registered by tlpipe. Name another version in embed.weights."
        )
    return folder, split, str(version.version)


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
    waits_until, waiting = 0.0, cast("Sequence[Step]", ())

    def log(steps: "Sequence[Step]", *, is_last: bool = False) -> None:
        nonlocal logged, waits_until, waiting
        waiting = steps
        began = time.monotonic()
        if began < waits_until and not is_last:
            return
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, number)
            for number, step in enumerate(steps[logged:], start=logged)
            for key, value in step.columns().items()
            if value is not None
        ]
        try:
            with connection(workspace) as client:
                for start in range(0, len(metrics), _BATCH):
                    client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
            logged = len(steps)
        except RegistryError as error:
            # A server that says nothing may cost a tenth of the time, not a minute an epoch.
            waits_until = began + _PATIENCE * (time.monotonic() - began)
            _log.warning("the live curves wait: %s", error)

    try:
        yield log
        status = "FINISHED"
        if len(waiting) > logged:
            log(waiting, is_last=True)
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        with suppress(RegistryError), connection(workspace) as client:
            client.set_terminated(run_id, status)
