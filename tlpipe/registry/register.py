"""Stage ``register``: make one MLflow run and one model version of a bundle; maybe promote it.

``changed_by_others`` is asked before hours of training; ``summary`` says what the last run of the
pipeline made, by the receipt of this stage, and what to do with it.
"""

import logging
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from tlpipe import files, graph, versioning
from tlpipe.bundle import digest, members
from tlpipe.data import ingest, leaks, shortcuts
from tlpipe.errors import ArtifactError, GateError, RegistryError, UnreachableError
from tlpipe.evaluation import metrics
from tlpipe.params import Section
from tlpipe.registry import (
    LONGEST_NAME,
    NAME,
    card,
    check_name,
    local,
    moves,
    promotion,
    publishing,
    tracking,
)
from tlpipe.registry.gate import Bounds, Measured
from tlpipe.registry.publishing import Content

if TYPE_CHECKING:
    from mlflow import MlflowClient


_log = logging.getLogger(__name__)


class Params(Section):
    """Under which name, and what it takes to go into production."""

    name: str = Field(
        default="tlpipe",
        json_schema_extra={"pattern": f"^{NAME}$", "maxLength": LONGEST_NAME},
        description="Name of the registered model and of the experiment.",
    )

    purpose: str = Field(
        default="", max_length=1000, description="What it is for and what not: for the model card."
    )
    promote: Literal["by-hand", "auto"] = Field(
        default="by-hand",
        description="Whether a version that passes the gate goes into production at once. The "
        "first one does.",
    )
    gate: Bounds = Field(
        default=Bounds(), description="What a version must reach to go into production."
    )

    _name_may_be = field_validator("name")(check_name)


def run(
    *,
    content: Content,
    measured: Measured,
    receipt: Path,
    workspace: Path,
    source: ingest.Params,
    params: Params,
) -> None:
    """Register the bundle, promote it where that is asked for, and write the receipt.

    ``source``: from where the champion's images are read, should it see them differently.

    Raises:
        ArtifactError: the report is of another bundle.
        RegistryError: MLflow cannot be reached, or rejects a request.
    """
    purpose = {card.PURPOSE: params.purpose} if params.purpose else {}
    if (home := local.project(workspace)) != workspace.resolve():
        _log.info("this folder of an experiment is temporary: the registry is that of %s", home)
    with tracking.connection(workspace, create=True) as client:
        moves.check_name(client, params.name)
        experiment_id = tracking.experiment(client, params.name, workspace)
        published = publishing.publish(
            client,
            experiment_id,
            params.name,
            content,
            lineage=versioning.describe(workspace) | purpose,
        )
        version = published.version
        made_at = published.bundle.provenance.get("git_commit", "")
        can_rebuild = not made_at or versioning.is_commit(made_at)
        if not can_rebuild and not members(published.bundle.provenance):
            _log.warning(
                "%s version %s was made with uncommitted changes, so 'tlpipe rebuild' cannot make "
                "it again; commit before the run",
                params.name,
                version,
            )
        artifacts = client.get_run(published.run_id).info.artifact_uri
        if folder := tracking.only_here(client, artifacts, workspace):
            _log.warning(
                "the registry is a shared one, and what was registered lies in %s only: others "
                "cannot load it, nor anybody once this project is moved; name a server that keeps "
                "artifacts in MLFLOW_TRACKING_URI",
                folder,
            )
        tracking.challenge(client, params.name, version)
        promotion.settle(client, params.name)
        log = moves.history(client, params.name)
        # What once was in production and is no more was taken out by somebody: also a bundle whose
        # version or run was deleted since, and which has another number now.
        known = [*log, *moves.taken_back(client, params.name)]
        is_new = version not in {entry.champion for entry in known}
        is_new &= published.bundle.digest not in {entry.bundle for entry in known}
        if is_new and (not log or params.promote == "auto"):
            try:
                promotion.promote(
                    client,
                    params.name,
                    version,
                    measured=measured,
                    source=source,
                    bounds=params.gate,
                )
            except GateError as error:
                _log.warning("%s", error)
    result, data = files.read_json(content.report), files.read_json(content.data_report)
    copies = files.read_json(content.leaks_report)
    told = files.read_json(content.shortcuts)["told"]
    shipped = published.bundle
    files.write_json(
        receipt,
        {
            "bundle": shipped.digest,
            "name": params.name,
            "version": version,
            "run_id": published.run_id,
            "onnx": str(shipped.model),
            "onnx_bytes": shipped.model.stat().st_size,
            "accuracy": result["precisions"]["fp32"]["accuracy"],
            "lowest_recall": _lowest_recall(result["precisions"]["fp32"]["per_class"]),
            "test_images": result["images"],
            "generalisation": result["generalisation"],
            "copies": {
                "found": leaks.describe(copies),
                "is_above_clean": copies["is_above_clean"],
                "pretrained": leaks.held_out_pretrained(copies),
            },
            "shortcuts": shortcuts.describe(told),
            "label_issues": files.count_rows(content.label_issues),
            "images": data["images"],
            "classes": len(data["classes"]),
            "rejected": sum(data["rejected"].values()),
            "backbone": shipped.provenance["origin"]["backbone"],
            "freeze": shipped.provenance["origin"]["freeze"],
        },
    )
    _log.info("%s version %s", params.name, version)
    _ask_for_the_next_run(workspace, params.name, version)


def _lowest_recall(per_class: dict[str, dict[str, Any]]) -> str:
    worst, *_ = metrics.by_recall(per_class)
    found = per_class[worst]
    return f"{found['recall']:.3f}, of {worst} ({found['images']} test images)"


def _ask_for_the_next_run(workspace: Path, name: str, version: str) -> None:
    """Ask what the next run will: it finds the answers kept, and need not import MLflow."""
    if tracking.own_state(workspace) is not None:
        with suppress(RegistryError):  # registered is registered
            changed_by_others(workspace=workspace, name=name)
            tracking.champion_labels(workspace, name)
            _aliases({"name": name, "version": version}, workspace)


def registered(receipt: Path, bundle: Path, name: str) -> str:
    """Return the digest of the bundle that was registered from this workspace, by its receipt.

    Raises:
        RegistryError: there is no receipt, or it is of another model or bundle than is here.
    """
    advice = "Run 'tlpipe run', or name a version: 'tlpipe promote 3'."
    if not receipt.exists():
        raise RegistryError(f"nothing was registered from here: {receipt} is missing. {advice}")
    content = files.read_json(receipt)
    if content["name"] != name:
        raise RegistryError(
            f"{receipt} is of the model {content['name']}, params.yaml names {name}. {advice}"
        )
    # The receipt is in no cache: one of DVC's experiments brings its bundle, and leaves it.
    if bundle.exists() and (here := digest(bundle)) != content["bundle"]:
        raise RegistryError(
            f"{bundle} has the digest {here[:16]}, and what was registered from here "
            f"{content['bundle'][:16]}. {advice}"
        )
    return str(content["bundle"])


def changed_by_others(*, workspace: Path, name: str) -> list[str]:
    """Return a line for what others deleted or renamed in MLflow, with what helps.

    Raises:
        RegistryError: a change at which ``run`` would stop.
    """
    if not tracking.is_there(workspace):
        return []
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

    def ask(client: "MlflowClient") -> list[str]:
        said = (moves.check_name(client, name), _experiment(client, name))
        return [line for line in said if line]

    try:
        found: list[str] = tracking.remembered(workspace, f"changes of {name}", ask)
    except UnreachableError as error:
        return [f"what others changed in the registry is not known: {error}"]
    return found


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


def summary(*, receipt: Path, workspace: Path) -> tuple[list[tuple[str, str]], str]:
    """Return the rows of the table, what it is called and what it is; and what comes next.

    Raises:
        ArtifactError: nothing was registered from this workspace yet, or by another version.
        RegistryError: the registry does not know the version of the receipt.
    """
    content = files.read_json(receipt)
    if "lowest_recall" not in content:
        raise ArtifactError(
            f"{receipt} was written by another version of tlpipe. Write it anew: 'dvc repro "
            f"--force --single-item register'."
        )
    mine, in_production = _aliases(content, workspace)
    aliases = f"alias {', '.join(mine)}" if mine else "no alias"
    accuracy = content["accuracy"]
    interval = (
        f"{accuracy['value']:.3f} ({accuracy['confidence']:.0%} interval {accuracy['low']:.3f} to "
        f"{accuracy['high']:.3f}, {content['test_images']} images)"
    )
    rows = [
        (
            "data",
            f"{content['images']:,} images, {content['classes']} classes, "
            f"{content['rejected']} rejected",
        ),
        ("backbone", f"{content['backbone']}, frozen: {content['freeze']}"),
        ("test accuracy", interval),
        ("lowest recall", content["lowest_recall"]),
        ("validation accuracy", _validation(content["generalisation"])),
        ("copies in train", _copies(content["copies"])),
        ("shortcuts", content["shortcuts"]),
        (
            "label issues",
            f"{content['label_issues']:,} of {content['images']:,} labels: "
            f"{graph.PATHS['label_issues']}",
        ),
        ("ONNX", f"{content['onnx']}, {content['onnx_bytes'] / 1e6:.1f} MB"),
        ("model", f"{content['name']} version {content['version']}, {aliases}"),
    ]
    if in_production:
        return rows, "tlpipe ui | tlpipe predict IMAGE | tlpipe serve"
    bundle = Path(content["onnx"]).parent
    answering = f"tlpipe predict IMAGE --model {shlex.quote(str(bundle))}"
    return rows, f"tlpipe ui | tlpipe promote: nothing is in production yet | {answering}"


def _validation(found: dict[str, Any]) -> str:
    validation, change = found["validation"], found["difference"]
    verdict = "below it beyond chance" if found["is_below"] else "not below it beyond chance"
    if change["low"] > 0:
        verdict = "above it beyond chance, as where the test images are easier"
    return (
        f"{validation['value']:.3f} ({validation['images']} images held out); test accuracy is "
        f"{verdict}: {change['value']:+.3f} ({change['confidence']:.0%} interval "
        f"{change['low']:+.3f} to {change['high']:+.3f})"
    )


def _copies(found: dict[str, Any]) -> str:
    if found["found"].startswith(leaks.NOTHING_SEEN):
        return str(found["found"])
    verdict = "more than clean sets show" if found["is_above_clean"] else "as in clean sets"
    if found.get("pretrained"):
        verdict += ", but pretrained on"
    return f"{verdict}: {found['found']}"


def _aliases(content: dict[str, Any], workspace: Path) -> tuple[list[str], bool]:
    """Return the version's aliases, and whether any version is in production."""
    name, version = content["name"], str(content["version"])

    def ask(client: "MlflowClient") -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        try:
            client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise RegistryError(
                f"the registry has no {name} version {version}, which was registered from here. "
                f"Register it again: 'dvc repro --force --single-item register'."
            ) from None
        aliases = client.get_registered_model(name).aliases
        return {alias: str(number) for alias, number in aliases.items()}

    found = tracking.remembered(workspace, f"aliases of {name} version {version}", ask)
    mine = sorted(alias for alias, number in found.items() if number == version)
    return mine, moves.CHAMPION in found
