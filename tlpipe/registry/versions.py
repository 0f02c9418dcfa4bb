"""Versions of a model: listed, shown, loaded, signed, verified, downloaded, copied elsewhere.

What ``table``, ``describe`` and ``describe_folder`` return, JSON can hold; ``cli`` prints it.
``load_bundle`` is for Python.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tlpipe import bundle as bundles
from tlpipe import files
from tlpipe.bundle import Bundle
from tlpipe.errors import ArtifactError, ParamsError, RegistryError
from tlpipe.project import Project
from tlpipe.registry import FORMS, SUFFIX, Registered, moves, parse, publishing, tracking
from tlpipe.registry.moves import Move
from tlpipe.registry.publishing import Content
from tlpipe.versioning import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion


_PAGE = 100
# Tags that go along when a version is copied to another server.
_KEPT = ("tlpipe.git_", "tlpipe.dvc_", "tlpipe.purpose", "mlflow.source.git.")


def load_bundle(model: str | Path, project: Project | Path | str | None = None) -> Bundle:
    """Return the verified bundle of a model, from the registry or a folder.

    Args:
        model: ``NAME@ALIAS``, ``NAME@VERSION`` or a bundle's folder.
        project: whose registry is asked where ``MLFLOW_TRACKING_URI`` names none, or its folder; by
            default that of the current folder's project.

    Raises:
        ArtifactError: a folder's files are damaged. In place of a champion whose are, the last good
            version in production is returned, and a warning logged: ``version`` says which, in
            ``registry.tracking.fetch_bundle``.
        ParamsError: that names no model, or no project.
        RegistryError: there is no such version, or its stored bundle is not the registered one.

    Example:
        >>> load_bundle("digits@champion").labels
        ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    if not isinstance(model, (str, Path)):
        raise ParamsError(f"expected {FORMS}; got {type(model).__name__}.")
    named = parse(model) if isinstance(model, str) else model
    if isinstance(named, Path):
        return bundles.load(named)
    if project is None:
        project = Project.near()
    elif not isinstance(project, Project):
        project = Project(project)
    return tracking.fetch_bundle(project.folder, named).bundle


def table(client: "MlflowClient", name: str, *, newest: int | None = None) -> list[dict[str, Any]]:
    """Return one entry for each version of a model, the oldest first.

    ``newest``: only so many of the newest, and those that have an alias.

    Raises:
        RegistryError: there is no such model.
    """
    _check_is_model(name)
    tracking.check_known(client, name)
    aliases = _aliases(client, name)
    found = sorted(_all(client, name), key=lambda version: int(version.version))
    if newest is not None:
        old = len(found) - newest
        found = [v for i, v in enumerate(found) if i >= old or str(v.version) in aliases]
    return [_entry(version, _run(client, version), aliases) for version in found]


def _check_is_model(name: str) -> None:
    """Check that a name is none of a log of moves.

    Raises:
        RegistryError: it is one.
    """
    if name.endswith(SUFFIX):
        model = name.removesuffix(SUFFIX)
        raise RegistryError(
            f"{name} keeps what was in production of {model}, and no versions. See it with "
            f"'tlpipe history' in the project of {model}."
        )


def _all(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    token, found = None, list["ModelVersion"]()
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=_PAGE, page_token=token)
        found += page
        if not (token := page.token):
            return found


def _aliases(client: "MlflowClient", name: str) -> dict[str, list[str]]:
    """Return the aliases of each version that has some."""
    found: dict[str, list[str]] = {}
    for alias, number in sorted(client.get_registered_model(name).aliases.items()):
        found.setdefault(str(number), []).append(alias)
    return found


def _run(client: "MlflowClient", version: "ModelVersion") -> "Run | None":
    """Return the run of a version; None where somebody deleted it for good."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(version.run_id) if version.run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _entry(
    version: "ModelVersion", run: "Run | None", aliases: Mapping[str, list[str]]
) -> dict[str, Any]:
    metrics = run.data.metrics if run else {}
    accuracy = None
    if "test_accuracy" in metrics:
        accuracy = {"value": metrics["test_accuracy"]} | {
            end: metrics[f"test_accuracy_{end}"]
            for end in ("low", "high")
            if f"test_accuracy_{end}" in metrics
        }
    tags = {**(run.data.tags if run else {}), **version.tags}
    return {
        "name": version.name,
        "version": str(version.version),
        "accuracy": accuracy,
        "aliases": aliases.get(str(version.version), []),
        "registered_by": tags.get("mlflow.user", ""),
        "registered_at": _moment(version.creation_timestamp),
        "bundle": tags.get(moves.BUNDLE_TAG, ""),
        "backbone": tags.get("tlpipe.backbone", ""),
        "made_of": tags.get(publishing.MEMBERS_TAG, ""),
        "git_commit": tags.get("tlpipe.git_commit", ""),
        "git_changed": tags.get("tlpipe.git_changed") == "true",
        "git_remote": tags.get("tlpipe.git_remote", ""),
        "git_folder": tags.get("tlpipe.git_folder", ""),
        "copied_from": tags.get("tlpipe.copied_from", ""),
    }


def _moment(milliseconds: int) -> str:
    """Return a time of MLflow's in ISO 8601, UTC, in seconds."""
    return datetime.fromtimestamp(milliseconds // 1000, UTC).isoformat()


def describe(client: "MlflowClient", model: Registered) -> dict[str, Any]:
    """Return all that is known of a registered version; its bundle is verified.

    Raises:
        ArtifactError: the bundle is damaged.
        RegistryError: there is no such version, or its stored bundle is not the registered one.
    """
    version = tracking.find_version(client, model.name, model.which)
    number = str(version.version)
    found = _entry(version, _run(client, version), _aliases(client, model.name))
    report, speed, copies = (
        tracking.artifact(client, version.run_id, place)
        for place in (publishing.REPORT, publishing.SPEED, publishing.LEAKS)
    )
    signature = tracking.artifact(client, version.run_id, bundles.SIGNATURE)
    log = moves.history(client, model.name)
    return {
        **found,
        "is_signed": signature is not None,
        "gate": version.tags.get("tlpipe.gate", ""),
        "moves": [_moved(move) for move in log if number in (move.champion, move.previous)],
        "precisions": _precisions(report, speed),
        "limits": _limits(report, copies),
        **_content(tracking.bundle_of(client, version)),
    }


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return what a bundle's folder says itself, verified; whether a signature lies beside it.

    Raises:
        ArtifactError: it is damaged.
    """
    bundle = bundles.load(folder)
    is_signed = bundles.signature_beside(folder).is_file()
    return {"folder": str(folder), "is_signed": is_signed, **_content(bundle)}


def _moved(move: Move) -> dict[str, Any]:
    return {
        "at": move.at.replace(microsecond=0).isoformat(),
        "version": move.champion,
        "previous": move.previous,
        "kind": move.kind,
        "by": move.by,
        "reason": move.why,
    }


def _precisions(report: Path | None, speed: Path | None) -> dict[str, Any]:
    """Return for each precision what was measured: values with intervals, size, time."""
    if report is None or speed is None:
        return {}
    times = files.read_json(speed)
    return {
        precision: {**measured, "milliseconds": times[precision]["milliseconds"]["1"]}
        for precision, measured in files.read_json(report)["precisions"].items()
    }


def _limits(report: Path | None, copies: Path | None) -> dict[str, Any]:
    """Return how far the numbers hold: gap to validation, copies, abstention, unknown images."""
    if report is None or copies is None:
        return {}
    found = files.read_json(report)
    kept = {name: found[name] for name in ("generalisation", "abstention", "ood")}
    return {**kept, "copies": files.read_json(copies)}


def _content(bundle: Bundle) -> dict[str, Any]:
    """Return what a verified bundle holds."""
    return {
        "bundle": bundle.digest,
        "classes": list(bundle.labels),
        "graphs": {
            name: {"file": path.name, "bytes": path.stat().st_size}
            for name, path in bundle.graphs.items()
        },
        "preprocessing": bundle.preprocessing.model_dump(),
        "provenance": bundle.provenance,
    }


def sign(workspace: Path, model: Registered, key: Path) -> Bundle:
    """Sign the bundle of a registered version with a private key; return it.

    Raises:
        ParamsError: the key cannot be used.
        RegistryError: there is no such version.
    """
    with tracking.connection(workspace) as client, TemporaryDirectory() as folder:
        version = tracking.find_version(client, model.name, model.which)
        bundle = tracking.bundle_of(client, version)
        target = Path(folder, bundles.SIGNATURE)
        bundles.sign(bundle.folder, key, target)
        client.log_artifact(version.run_id, str(target))
    return bundle


def verify(workspace: Path, model: Registered, key: Path | None) -> Bundle:
    """Check and return the bundle of a version; with a public key, also who signed it.

    Raises:
        ArtifactError: it is damaged, not signed, or by somebody else.
        RegistryError: there is no such version.
    """
    with tracking.connection(workspace) as client:
        version = tracking.find_version(client, model.name, model.which)
        bundle = tracking.bundle_of(client, version)
        if key is not None:
            signature = tracking.artifact(client, version.run_id, bundles.SIGNATURE)
            if signature is None:
                raise ArtifactError(f"{model} is not signed. Sign it: 'tlpipe sign {model}'.")
            bundles.check_signature(bundle.folder, key, signature)
    return bundle


def copy(workspace: Path, name: str, which: str, to: str) -> str:
    """Copy the version of a number or alias to the server at ``to``; return its number there.

    Run, metrics, curves, artifacts, card, signature and what explains it go along. Copied again, or
    after a kill, it is the same run and version. What arrived is fetched back, and its digest
    compared.

    Raises:
        ArtifactError: the bundle, here or there, is damaged.
        RegistryError: there is no such version here, what arrived is something else, or the
            registry there keeps artifacts in this project's folder.
    """
    with TemporaryDirectory() as folder:
        with tracking.connection(workspace) as client:
            version = tracking.find_version(client, name, which)
            content, shipped, tags = fetch(client, version, Path(folder))
            expected = shipped.digest
            address, _, _ = without_credentials(client.tracking_uri).partition("?")
            origin = f"{address} version {version.version}"
        lineage = {key: value for key, value in tags.items() if key.startswith(_KEPT)}
        with tracking.connection(workspace, address=to) as client:
            experiment = tracking.experiment(client, name, workspace)
            place = str(client.get_experiment(experiment).artifact_location)
            if elsewhere := tracking.only_here(client, place, workspace):
                raise RegistryError(
                    f"the registry at {without_credentials(to)} has no place for artifacts of its "
                    f"own: they would lie in {elsewhere} only, where nobody else can load them. "
                    f"Nothing was copied. Expected a server that keeps artifacts: 'mlflow server "
                    f"--artifacts-destination ...'."
                )
            published = publishing.publish(
                client,
                experiment,
                name,
                content,
                lineage=lineage | {"tlpipe.copied_from": origin},
            )
            if (signature := Path(folder, bundles.SIGNATURE)).is_file():
                client.log_artifact(published.run_id, str(signature))
            if (explained := Path(folder, publishing.EXPLAINED)).is_dir():
                publishing.add(client, name, expected, explained, publishing.EXPLAINED)
            arrived = tracking.bundle_of(client, client.get_model_version(name, published.version))
            if arrived.digest != expected:
                raise RegistryError(
                    f"{name} version {version.version} has the digest {expected[:16]}..., what "
                    f"arrived at {without_credentials(to)} {arrived.digest[:16]}...; do not use it."
                )
            tracking.challenge(client, name, published.version)
    return published.version


def fetch(
    client: "MlflowClient", version: "ModelVersion", folder: Path
) -> tuple[Content, Bundle, dict[str, str]]:
    """Fetch a version's artifacts into a folder; return them, its verified bundle, the run's tags.

    Raises:
        ArtifactError: the bundle is damaged.
        RegistryError: it has no run, its stored bundle is not the registered one, or artifacts are
            missing.
    """
    if version.run_id is None:
        raise RegistryError(
            f"{version.name} version {version.version} has no run, so nothing of it can be fetched."
        )
    tags = client.get_run(version.run_id).data.tags
    client.download_artifacts(version.run_id, "", str(folder))
    shipped = tracking.verified(version, folder / tracking.BUNDLE_FOLDER)
    return Content.stored(folder), shipped, tags


def download(workspace: Path, model: Registered, folder: Path) -> Bundle:
    """Write the verified bundle of a registered version into a new folder; return it.

    Its signature, where it has one, goes beside the folder, where ``verify`` looks for it. The
    folder appears once all of it is there and on disk; nothing is ever overwritten.

    Raises:
        ArtifactError: the bundle is damaged, or something else is at the folder's place.
        RegistryError: there is no such version, or its stored bundle is not the registered one.
    """
    check_is_free(folder)
    with tracking.connection(workspace) as client:
        version = tracking.find_version(client, model.name, model.which)
        if model.which == moves.CHAMPION:
            tracking.check_promoted(client, version)
        bundle = tracking.bundle_of(client, version)
        signature = tracking.artifact(client, version.run_id, bundles.SIGNATURE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = bundles.signature_beside(folder)
    if signature is not None:
        if beside.exists() and beside.read_bytes() != signature.read_bytes():
            raise ArtifactError(
                f"{beside} is there and is not the signature of {model}; nothing was written. Name "
                f"a new folder, or move it away."
            )
        files.write_bytes(beside, signature.read_bytes())
    with new_folder(folder) as new:
        files.copy_folder(bundle.folder, new)
        if (written := bundles.load(new).digest) != bundle.digest:
            raise ArtifactError(
                f"what was written has the digest {written[:16]}..., expected "
                f"{bundle.digest[:16]}...: the disk of {folder.parent} fails. Nothing was kept."
            )
    return bundles.load(folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; it appears at its place once all of it is there and on disk.

    Raises:
        ArtifactError: something else is at its place; nothing is overwritten.
    """
    check_is_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"
    ) as scratch:
        new = Path(scratch, folder.name)
        new.mkdir()
        yield new
        files.flush_folder(new)
        try:
            new.rename(folder)
        except OSError:  # somebody was faster
            check_is_free(folder)
            raise


def check_is_free(folder: Path) -> None:
    """Check that there is nothing at a place.

    Raises:
        ArtifactError: there is.
    """
    if folder.is_symlink() or folder.exists():
        raise ArtifactError(
            f"{folder} is there already; nothing was written, since nothing is overwritten. Name a "
            f"new folder, or move it away."
        )
