"""Stage ``register``: make one MLflow run and one model version of a bundle.

Every step finds its own work by content and leaves out what is done, so that running it again, or
after being killed anywhere, completes the same run and the same version.
"""

import csv
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import Field

from tlpipe import files, lineage
from tlpipe.data.images import crop_middle
from tlpipe.errors import ArtifactError
from tlpipe.onnx_export import bundle as bundles
from tlpipe.onnx_export.bundle import Bundle
from tlpipe.params import Section
from tlpipe.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import ModelSignature

_log = logging.getLogger(__name__)


class Params(Section):
    """Under which name."""

    name: str = Field(
        default="tlpipe",
        pattern=r"^[^\s/:.%\"'@][^/:.%\"'@]*$",
        max_length=200,
        description="Name of the registered model and of the experiment.",
    )


def run(
    *,
    model: Path,
    bundle: Path,
    parity: Path,
    report: Path,
    predictions: Path,
    plots: Path,
    examples: Path,
    history: Path,
    data_report: Path,
    split_report: Path,
    rejects: Path,
    suspects: Path,
    data_plots: Path,
    receipt: Path,
    workspace: Path,
    params: Params,
) -> None:
    """Register the bundle and write the receipt.

    Raises:
        ArtifactError: the report is of another bundle.
        RegistryError: MLflow cannot be reached or refuses.
    """
    shipped = bundles.load(bundle)
    result, data = files.read_json(report), files.read_json(data_report)
    if result["bundle"] != shipped.digest:
        raise ArtifactError(f"{report} measures another bundle than {bundle}. Run 'dvc repro'.")
    with tracking.connection(workspace, create=True) as client:
        experiment_id = tracking.experiment(client, params.name, workspace)
        found = _find_run(client, experiment_id, shipped) or client.create_run(
            experiment_id,
            run_name=f"{shipped.provenance['origin']['backbone']}-{shipped.digest[:8]}",
            tags=_tags(shipped) | lineage.describe(workspace),
        )
        run_id = found.info.run_id
        _log_numbers(client, found, shipped, result, files.read_json(parity), history)
        _log_data(client, found, shipped, data)
        for artifact in (report, parity, predictions, history):
            client.log_artifact(run_id, str(artifact))
        client.log_artifacts(run_id, str(plots), "plots")
        for artifact in (rejects, suspects):
            client.log_artifact(run_id, str(artifact), "data")
        # Both are called report.json in the workspace, each in its stage's folder.
        client.log_dict(run_id, data, "data/ingest.json")
        client.log_dict(run_id, files.read_json(split_report), "data/split.json")
        client.log_artifacts(run_id, str(data_plots), "data/plots")
        client.log_artifacts(run_id, str(bundle), tracking.BUNDLE_FOLDER)
        client.log_artifacts(run_id, str(model), tracking.MODEL_FOLDER)
        model_uri = _log_model(client, found, shipped, examples)
        version = _version(client, params.name, run_id, model_uri, shipped)
        client.set_registered_model_alias(params.name, tracking.CHALLENGER, version)
        if tracking.CHAMPION not in client.get_registered_model(params.name).aliases:
            client.set_registered_model_alias(params.name, tracking.CHAMPION, version)
        client.set_terminated(run_id, "FINISHED")
    content = {
        "bundle": shipped.digest,
        "name": params.name,
        "version": version,
        "run_id": run_id,
        "onnx": str(shipped.model),
        "onnx_bytes": shipped.model.stat().st_size,
        "accuracy": result["precisions"]["fp32"]["accuracy"],
        "test_images": result["images"],
        "images": data["images"],
        "classes": len(data["classes"]),
        "rejected": sum(data["rejected"].values()),
        "backbone": shipped.provenance["origin"]["backbone"],
        "freeze": shipped.provenance["origin"]["freeze"],
    }
    files.write_json(receipt, content)
    _log.info("%s version %s", params.name, version)


def _tags(shipped: Bundle) -> dict[str, str]:
    origin = shipped.provenance["origin"]
    return {
        tracking.BUNDLE_TAG: shipped.digest,
        "tlpipe.onnx_sha256": shipped.model_sha256,
        "tlpipe.data_sha256": origin["data_sha256"],
        "tlpipe.data_version": origin["data_version"],
        "tlpipe.backbone": origin["backbone"],
        "tlpipe.weights_sha256": origin["weights_sha256"],
        "tlpipe.freeze": origin["freeze"],
    }


def _find_run(client: "MlflowClient", experiment_id: str, shipped: Bundle) -> "Run | None":
    """Return the oldest run of this very bundle."""
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{tracking.BUNDLE_TAG}` = '{shipped.digest}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return found[0] if found else None


def _log_numbers(
    client: "MlflowClient",
    found: "Run",
    shipped: Bundle,
    result: Mapping[str, Any],
    parity: Mapping[str, Any],
    history: Path,
) -> None:
    """Log params, metrics and curves, stamped with the start of the run: equal when replayed."""
    from mlflow.entities import Metric, Param

    at = found.info.start_time or int(time.time() * 1000)
    measured = result["precisions"]["fp32"]
    numbers = {
        "test_accuracy_low": measured["accuracy"]["low"],
        "test_accuracy_high": measured["accuracy"]["high"],
        **{
            f"test_{name}": found["value"]
            for name, found in measured.items()
            if isinstance(found, dict) and "value" in found and name != "accuracy_change"
        },
        "parity_max_difference": parity["max_difference"],
        "onnx_megabytes": shipped.model.stat().st_size / 1e6,
    }
    metrics = [Metric(name, value, at, 0) for name, value in numbers.items()]
    with history.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            metrics += [
                Metric(name, float(value), at, step) for name, value in row.items() if value
            ]
    params = [Param(name, str(value)) for name, value in sorted(_settings(shipped).items())]
    client.log_batch(found.info.run_id, params=params)
    for start in range(0, len(metrics), 1000):  # the most that MLflow takes at once
        client.log_batch(found.info.run_id, metrics=metrics[start : start + 1000])


def _settings(shipped: Bundle) -> dict[str, object]:
    """Return what was set or chosen for this model, by the names of ``provenance.json``."""
    trained, origin = shipped.provenance, shipped.provenance["origin"]
    settings = {**trained, **origin, **origin["preprocessing"], "classes": len(shipped.labels)}
    return {
        name: value
        for name, value in settings.items()
        if name not in ("origin", "packages", "preprocessing")
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
    client: "MlflowClient", name: str, run_id: str, model_uri: str, shipped: Bundle
) -> str:
    """Return the number of this bundle's version, created where it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
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
        tags=_tags(shipped),
    )
    return str(created.version)
