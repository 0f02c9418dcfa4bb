"""Make one MLflow run and one model version of a bundle, with all that is known of it.

Every step finds its own work by content and leaves out what is done, so that running it again, or
after being killed anywhere, completes the same run and the same version.
"""

import csv
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tlpipe import bundle as bundles
from tlpipe import files
from tlpipe.bundle import Bundle
from tlpipe.data.images import crop_middle
from tlpipe.errors import ArtifactError, RegistryError
from tlpipe.registry import card, moves, tracking
from tlpipe.versioning import user

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import ModelSignature

_DESCRIPTION = "mlflow.note.content"  # what MLflow shows on top of a run
_MADE_BY = {"mlflow.source.name": "tlpipe register", "mlflow.source.type": "LOCAL"}
_DIGESTS = "sha256.json"  # of every artifact, by its path
SPLIT_REPORT = "data/split.json"
LEAKS = "data/leaks.json"
REPORT, SPEED = "report.json", "speed.json"
EXPLAINED = "explain"  # where 'tlpipe explain' puts what it writes
MEMBERS_TAG = "tlpipe.ensemble"  # which versions an ensemble was made of
_AT_ONCE = 1000  # the most metrics that MLflow takes in one request


@dataclass(frozen=True)
class Content:
    """Files and folders that a run keeps, each at its own place among the run's artifacts."""

    model: Path
    bundle: Path
    parity: Path
    report: Path
    speed: Path
    predictions: Path
    plots: Path
    examples: Path
    history: Path
    data_report: Path
    split_report: Path
    rejects: Path
    label_issues: Path
    leaks_report: Path
    shortcuts: Path
    data_plots: Path
    manifest: Path
    split: Path

    @classmethod
    def stored(cls, folder: Path) -> "Content":
        """Return them where all artifacts of a run were fetched into a folder.

        Raises:
            RegistryError: the run has not all of them.
        """
        for place in _PLACES.values():
            if not (folder / place).exists():
                raise RegistryError(
                    f"the run has no {place} among its artifacts: it was registered by an older "
                    f"tlpipe, or somebody took it away. Register the version anew, then copy it."
                )
        return cls(**{name: folder / place for name, place in _PLACES.items()})

    def known(self) -> dict[str, dict[str, Any]]:
        """Read what the stages report: what the card is written from."""
        about_data = ("data_report", "split_report", "leaks_report", "shortcuts")
        reports = ("report", "speed", "parity", *about_data)
        found = {name: dict(files.read_json(getattr(self, name))) for name in reports}
        return {**found, "label_issues": {"found": files.count_rows(self.label_issues)}}

    def known_of(self, shipped: Bundle) -> dict[str, dict[str, Any]]:
        """Read the same, if it is of this bundle.

        Raises:
            ArtifactError: the report is of another one.
        """
        found = self.known()
        if found["report"]["bundle"] != shipped.digest:
            raise ArtifactError(
                f"{self.report} measures another bundle than {self.bundle}. Run 'tlpipe run'."
            )
        return found


_PLACES = {
    "model": tracking.MODEL_FOLDER,
    "bundle": tracking.BUNDLE_FOLDER,
    "parity": "parity.json",
    "report": REPORT,
    "speed": SPEED,
    "predictions": "predictions.csv",
    "plots": "plots",
    "examples": "examples",
    "history": "history.csv",
    "data_report": "data/ingest.json",
    "split_report": SPLIT_REPORT,
    "rejects": "data/rejects.csv",
    "label_issues": "data/label_issues.csv",
    "leaks_report": LEAKS,
    "shortcuts": "data/shortcuts.json",
    "data_plots": "data/plots",
    "manifest": "data/manifest.csv",
    "split": tracking.SPLIT,
}


@dataclass(frozen=True)
class Published:
    """Where a bundle is in MLflow."""

    bundle: Bundle
    run_id: str
    version: str


def publish(
    client: "MlflowClient",
    experiment_id: str,
    name: str,
    content: Content,
    *,
    lineage: Mapping[str, str],
) -> Published:
    """Return the run and the version of the bundle, made as far as they are not there yet.

    ``lineage``: tags that say where it comes from, and with ``card.PURPOSE`` what it is for.

    Raises:
        ArtifactError: the report is of another bundle.
    """
    shipped = bundles.load(content.bundle)
    known = content.known_of(shipped)
    text = card.shortened(card.write(name, shipped, known, lineage))
    found = _find_run(client, experiment_id, shipped.digest)
    if found is None:
        created = client.create_run(
            experiment_id,
            run_name=f"{shipped.provenance['origin']['backbone']}-{shipped.digest[:8]}",
            tags=_tags(shipped) | dict(lineage) | _MADE_BY | {"mlflow.user": user()},
        )
        # A request whose answer was lost is repeated: the oldest run counts, now and in a replay.
        found = _find_run(client, experiment_id, shipped.digest) or created
    run_id = found.info.run_id
    client.set_tag(run_id, _DESCRIPTION, text)
    _log_numbers(client, found, shipped, known, content.history)
    _log_data(client, found, shipped, known["data_report"])
    _log_artifacts(client, run_id, content)
    model_uri = _log_model(client, found, shipped, content.examples)
    version = _version(client, name, run_id, model_uri, shipped, lineage)
    client.update_model_version(name, version, text)
    client.set_terminated(run_id, "FINISHED")
    return Published(shipped, run_id, version)


def _tags(shipped: Bundle) -> dict[str, str]:
    origin, made_of = shipped.provenance["origin"], bundles.members(shipped.provenance)
    return {
        **({MEMBERS_TAG: bundles.describe(shipped.provenance)} if made_of else {}),
        moves.BUNDLE_TAG: shipped.digest,
        "tlpipe.onnx_sha256": shipped.model_sha256,
        "tlpipe.data_sha256": origin["data_sha256"],
        "tlpipe.data_version": origin["data_version"],
        "tlpipe.backbone": origin["backbone"],
        "tlpipe.weights_sha256": origin["weights_sha256"],
        "tlpipe.freeze": origin["freeze"],
    }


def _find_run(client: "MlflowClient", experiment_id: str, digest: str) -> "Run | None":
    """Return the oldest run of this very bundle."""
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{moves.BUNDLE_TAG}` = '{digest}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return found[0] if found else None


def _log_numbers(
    client: "MlflowClient",
    found: "Run",
    shipped: Bundle,
    known: Mapping[str, Mapping[str, Any]],
    history: Path,
) -> None:
    """Log params, metrics and curves, stamped with the start of the run: equal when replayed."""
    from mlflow.entities import Metric, Param

    at = found.info.start_time or int(time.time() * 1000)
    numbers = {"parity_max_difference": known["parity"]["max_difference"]}
    for precision, measured in known["report"]["precisions"].items():
        end = "" if precision == "fp32" else f"_{precision}"
        numbers |= {
            f"test_{name}{end}": value["value"]
            for name, value in measured.items()
            if isinstance(value, dict) and "value" in value
        }
        numbers[f"test_accuracy_low{end}"] = measured["accuracy"]["low"]
        numbers[f"test_accuracy_high{end}"] = measured["accuracy"]["high"]
        numbers[f"onnx_megabytes{end}"] = measured["megabytes"]
        numbers[f"answer_milliseconds{end}"] = known["speed"][precision]["milliseconds"]["1"]
    del numbers["test_accuracy_change"]  # of the exact graph against itself
    metrics = [Metric(name, value, at, 0) for name, value in numbers.items()]
    with history.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            metrics += [
                Metric(name, float(value), at, step) for name, value in row.items() if value
            ]
    params = [Param(name, str(value)) for name, value in sorted(_settings(shipped).items())]
    client.log_batch(found.info.run_id, params=params)
    for start in range(0, len(metrics), _AT_ONCE):
        client.log_batch(found.info.run_id, metrics=metrics[start : start + _AT_ONCE])


def _settings(shipped: Bundle) -> dict[str, object]:
    """Return what was set or chosen for this model, by the names of ``provenance.json``."""
    trained, origin = shipped.provenance, shipped.provenance["origin"]
    settings = {**trained, **origin, **origin["preprocessing"], "classes": len(shipped.labels)}
    return {
        name: value
        for name, value in settings.items()
        if name not in ("origin", "packages", "preprocessing", "ensemble")
    }


def _log_data(
    client: "MlflowClient", found: "Run", shipped: Bundle, data: Mapping[str, Any]
) -> None:
    """Log the data set as the run's input, once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if found.inputs and found.inputs.dataset_inputs:
        return
    digest = shipped.provenance["origin"]["data_sha256"]
    dataset = Dataset(
        name=data["source"],
        digest=digest[:36],  # MLflow's limit
        source_type="tlpipe",
        source=files.json_bytes(
            {
                "manifest_sha256": digest,
                "data_version": shipped.provenance["origin"]["data_version"],
            }
        ).decode(),
        profile=files.json_bytes(data).decode(),
    )
    context = InputTag("mlflow.data.context", "training")
    client.log_inputs(found.info.run_id, [DatasetInput(dataset, [context])])


def _log_artifacts(client: "MlflowClient", run_id: str, content: Content) -> None:
    """Log what is not there yet, laid out as it is kept: two reports have one name here.

    What is there with these bytes is left alone, since somebody may be reading it.
    """
    with TemporaryDirectory() as name:
        for field in fields(content):
            source, target = getattr(content, field.name), Path(name, _PLACES[field.name])
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                files.copy_folder(source, target, files.link_or_copy)
            else:
                files.link_or_copy(source, target)
        paths = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        wanted = {path.relative_to(name).as_posix(): files.sha256(path) for path in paths}
        logged = _logged(client, run_id)
        for place, digest in wanted.items():
            if logged.get(place) == digest:
                Path(name, place).unlink()
        if wanted.items() - logged.items():
            client.log_artifacts(run_id, name)
            client.log_dict(run_id, wanted, _DIGESTS)


def add(
    client: "MlflowClient", name: str, digest: str, folder: Path, place: str
) -> "tuple[str, bool] | None":
    """Log a folder's files to the run of a bundle, below ``place``, as far as it has others there.

    Returns: the run's id and whether something was logged; None where no run has the bundle.

    Raises:
        RegistryError: somebody else has logged others meanwhile.
    """
    experiment = tracking.find_experiment(client, name)
    found = None if experiment is None else _find_run(client, experiment.experiment_id, digest)
    if found is None:
        return None
    run_id = str(found.info.run_id)
    wanted = _digests(folder, place)
    logged = _logged(client, run_id)
    if wanted.items() <= logged.items():
        return run_id, False
    others = {path: value for path, value in logged.items() if not path.startswith(f"{place}/")}
    # While files are replaced no digest stands for them: a killed command is given again.
    client.log_dict(run_id, others, _DIGESTS)
    client.log_artifacts(run_id, str(folder), place)
    client.log_dict(run_id, others | wanted, _DIGESTS)
    with TemporaryDirectory() as there:
        arrived = _digests(Path(client.download_artifacts(run_id, place, there)), place)
    if not wanted.items() <= arrived.items():
        client.log_dict(run_id, others, _DIGESTS)
        raise RegistryError(
            f"{place}/ of the MLflow run {run_id} holds other files than were logged: somebody "
            f"else logs there now. Give the same command again."
        )
    return run_id, True


def _digests(folder: Path, place: str) -> dict[str, str]:
    """Return the digests of a folder's files, by their paths below ``place``."""
    return {
        f"{place}/{path.relative_to(folder).as_posix()}": files.sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _logged(client: "MlflowClient", run_id: str) -> dict[str, str]:
    """Return the digests by path of the artifacts that a run has."""
    there, folders = set(), [""]
    while folders:
        for found in client.list_artifacts(run_id, folders.pop() or None):
            if found.is_dir:
                folders.append(found.path)
            else:
                there.add(found.path)
    if _DIGESTS not in there:
        return {}
    with TemporaryDirectory() as name:
        digests = files.read_json(Path(client.download_artifacts(run_id, _DIGESTS, name)))
    return {place: digest for place, digest in digests.items() if place in there}


def _log_model(client: "MlflowClient", found: "Run", shipped: Bundle, examples: Path) -> str:
    """Log the graph in MLflow's own flavour and return its address."""
    import mlflow.onnx
    import onnx
    from mlflow.entities import LoggedModelStatus

    logged = client.search_logged_models(
        [found.info.experiment_id], filter_string=f"source_run_id = '{found.info.run_id}'"
    )
    for model in logged:
        if model.status == LoggedModelStatus.READY:
            return str(model.model_uri)
        client.delete_logged_model(model.model_id)  # left half-written by a run that was killed
    example = np.asarray(Image.open(sorted(examples.iterdir())[0]))
    with mlflow.start_run(run_id=found.info.run_id):
        info = mlflow.onnx.log_model(
            onnx.load(shipped.model),
            name="model",
            signature=_signature(shipped),
            input_example=crop_middle(example[np.newaxis], shipped.preprocessing.crop_px),
            onnx_execution_providers=["CPUExecutionProvider"],
            pip_requirements=["mlflow", "numpy", "onnx", "onnxruntime"],
            save_as_external_data=False,
        )
    return str(info.model_uri)


def _signature(shipped: Bundle) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    side, classes = shipped.preprocessing.crop_px, len(shipped.labels)
    images = TensorSpec(np.dtype(np.uint8), (-1, side, side, 3), bundles.IMAGES)
    outputs: list[ColSpec | TensorSpec] = [
        TensorSpec(np.dtype(np.float32), (-1, classes), name)
        for name in (bundles.LOGITS, bundles.PROBABILITIES)
    ]
    return ModelSignature(Schema([images]), Schema(outputs))


def _version(
    client: "MlflowClient",
    name: str,
    run_id: str,
    model_uri: str,
    shipped: Bundle,
    lineage: Mapping[str, str],
) -> str:
    """Return the number of this bundle's version, created where it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=card.of_model(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        return str(version.version)
    created = client.create_model_version(
        name,
        source=model_uri,
        run_id=run_id,
        model_id=model_uri.rpartition("/")[2],
        tags=_tags(shipped) | {k: v for k, v in lineage.items() if k.startswith("tlpipe.")},
    )
    return str(created.version)
