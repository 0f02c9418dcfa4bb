"""Training with a tracking server, and from a model that is registered there."""

import json
from pathlib import Path

import pytest

from tests.conftest import Workspace, copy_repository, free_port, server
from tlpipe.backbones.backbone import describe, load_network
from tlpipe.backbones.weights import IMAGENET, find


@pytest.mark.slow
def test_curves_are_live_and_the_model_can_be_begun_from(
    photos: Path, tmp_path: Path, cache_env: dict[str, str]
) -> None:
    import mlflow
    import torch
    from safetensors.torch import load_file

    address = f"http://127.0.0.1:{(port := free_port())}"
    env = cache_env | {
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    workspace = copy_repository(tmp_path / "copy", env)
    workspace.set_source(photos)
    workspace.configure("embed", freeze="blocks5")
    workspace.configure("train", epochs=2, batch_size=8, reinitialise=1)
    command = ("mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db")
    where = ("--default-artifact-root", str(tmp_path / "mlartifacts"), "--port", str(port))
    with server(workspace, *command, *where, ready=f"{address}/health"):
        workspace.run("dvc", "repro", "--quiet")
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name("digits")
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        live = runs["training"]
        assert live.info.status == "FINISHED"
        rows = workspace.rows("artifacts/train/history.csv")
        for name in ("validation_loss", "validation_accuracy"):
            curve = client.get_metric_history(live.info.run_id, name)
            found = [(metric.step, metric.value) for metric in curve]
            assert found == [
                (int(r["step"]), pytest.approx(float(r[name]), abs=1e-6)) for r in rows
            ]
        assert [m.step for m in client.get_metric_history(live.info.run_id, "train_loss")] == [1, 2]

        trained = load_file(workspace.path / "artifacts/train/model/model.safetensors")
        workspace.replace("params.yaml", "weights: imagenet", "weights: models:/digits@champion")
        workspace.run("dvc", "repro", "--quiet", "train")
        card = json.loads((workspace.path / "artifacts/train/model/model.json").read_text())
        assert card["origin"]["weights"] == "models:/digits@champion"
        digest = card["origin"]["weights_sha256"]
        kept = Path(cache_env["XDG_CACHE_HOME"]) / "tlpipe" / "registered" / f"{digest}.safetensors"
        weights = load_file(kept)

        folder = workspace.path / "embed"
        given = (
            "--manifest",
            "artifacts/ingest/manifest.csv",
            "--pixels",
            "artifacts/ingest/pixels",
        )
        embed = ("tlpipe", "embed", *given, "--activations", str(folder))
        champion = "weights: models:/digits@champion"
        for setting, code, message in (
            (f"{champion}\n  weights_sha256: {'f' * 64}", 5, "The alias has moved: change one of"),
            ("weights: models:/digits@nobody", 8, "the registry has no model digits@nobody"),
            ("weights: models:/digits", 8, "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ):
            text = (workspace.path / "params.yaml").read_text()
            (workspace.path / "params.yaml").write_text(text.replace(champion, setting))
            assert message in workspace.run(*embed, code=code).stderr
            (workspace.path / "params.yaml").write_text(text)
    lite0 = describe("efficientnet_lite0")
    original = load_network(lite0, find(lite0.name, lite0.pretrained, IMAGENET, None)).state_dict()
    for name, tensor in original.items():
        expected = trained.get(f"stages.{name}", tensor)
        assert torch.equal(weights[name.partition(".")[2]], expected), name
    assert not torch.equal(
        trained["stages.features.conv_head.weight"], original["features.conv_head.weight"]
    )


def test_a_server_that_does_not_answer_stops_no_training(
    main_job: Workspace, empty: Workspace
) -> None:
    artifacts = main_job.path / "artifacts"
    empty.configure("train", hidden=[8], epochs=1)
    dead = Workspace(
        empty.path,
        dict(empty.env)
        | {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        },
    )
    known = ("--activations", str(artifacts / "embed/activations"))
    split = (
        "--pixels",
        str(artifacts / "ingest/pixels"),
        "--split",
        str(artifacts / "split/split.csv"),
    )
    said = dead.run("tlpipe", "train", *known, *split, "--model", "m", "--history", "h.csv").stderr
    assert "no live curves: MLflow at" in said
    assert (empty.path / "m" / "model.json").exists()
