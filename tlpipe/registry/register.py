"""Stage ``register``: make one MLflow run and one model version of a bundle; maybe promote it."""

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from tlpipe import files, lineage
from tlpipe.data import ingest, leaks
from tlpipe.errors import GateError, RegistryError
from tlpipe.export.bundle import digest
from tlpipe.params import Section
from tlpipe.registry import card, local, moves, promotion, publishing, tracking
from tlpipe.registry.gate import Bounds, Measured
from tlpipe.registry.publishing import Content

_log = logging.getLogger(__name__)


class Params(Section):
    """Under which name, and what it takes to go into production."""

    name: str = Field(
        default="tlpipe",
        pattern=r"^[^\s/:.%\"'@?#\\\x00-\x1f][^/:.%\"'@?#\\\x00-\x1f]*$",
        max_length=200,
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

    @field_validator("name")
    @classmethod
    def _is_no_log(cls, name: str) -> str:
        if name.endswith(moves.SUFFIX):
            raise ValueError(f"{moves.SUFFIX} ends the name of what keeps the moves of a model")
        return name


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
        RegistryError: MLflow cannot be reached or refuses.
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
            lineage=lineage.describe(workspace) | purpose,
        )
        version = published.version
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
    copies = files.read_json(content.leaks)
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
            "test_images": result["images"],
            "generalisation": result["generalisation"],
            "copies": {
                "found": leaks.describe(copies),
                "is_above_clean": copies["is_above_clean"],
            },
            "images": data["images"],
            "classes": len(data["classes"]),
            "rejected": sum(data["rejected"].values()),
            "backbone": shipped.provenance["origin"]["backbone"],
            "freeze": shipped.provenance["origin"]["freeze"],
        },
    )
    _log.info("%s version %s", params.name, version)


def registered(receipt: Path, bundle: Path, name: str) -> str:
    """Return the digest of the bundle that was registered from this workspace, by its receipt.

    Raises:
        RegistryError: there is no receipt, or it is of another model or bundle than is here.
    """
    advice = "Run 'dvc repro', or name a version: 'tlpipe promote 3'."
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
