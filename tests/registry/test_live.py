"""Training with a tracking server, and from a model that is registered there."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Workspace, copy_repository, free_port
from tests.registry.conftest import mlflow_server
from tlpipe.backbones.backbone import describe, load_network
from tlpipe.backbones.weights import Weights


@pytest.mark.fault("T25")
@pytest.mark.slow
def test_curves_are_live_and_the_model_can_be_begun_from(
    photos: Path, tmp_path: Path, fresh_database: Path, cache_env: dict[str, str]
) -> None:
    import mlflow
    import torch
    from safetensors.torch import load_file

    database = f"sqlite:///{shutil.copy(fresh_database, tmp_path)}"
    with mlflow_server(tmp_path, database, workers=1) as address:
        env = cache_env | {"MLFLOW_TRACKING_URI": address}
        workspace = copy_repository(tmp_path / "copy", env)
        workspace.set_source(photos)
        workspace.use_small_network()
        workspace.configure("embed", freeze="layer2")
        # By another seed than the network itself: the last stage is drawn anew.
        workspace.configure("train", epochs=2, batch_size=8, reinitialise=1, seed=1)
        workspace.reproduce()
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name("digits")
        assert experiment is not None
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        live = runs["training"]
        assert live.info.status == "FINISHED"
        rows = workspace.rows("artifacts/train/history.csv")
        for name in ("validation_loss", "validation_accuracy"):
            curve = client.get_metric_history(live.info.run_id, name)
            assert [metric.step for metric in curve] == [int(row["step"]) for row in rows]
            known = [float(row[name]) for row in rows]
            assert [metric.value for metric in curve] == pytest.approx(known, abs=1e-6)
        assert [m.step for m in client.get_metric_history(live.info.run_id, "train_loss")] == [1, 2]

        trained = load_file(workspace.path / "artifacts/train/model/model.safetensors")
        workspace.replace("params.yaml", "weights: none", "weights: models:/digits@champion")
        said = workspace.reproduce()
        assert "embed.weights is models:/digits@champion, which is version 1 now" in said
        card = json.loads((workspace.path / "artifacts/train/model/model.json").read_text())
        assert card["origin"]["weights"] == "models:/digits@1"
        origin = card["origin"]
        assert origin["pretrained_on"].endswith(f"data {origin['data_version'][:10]}, from none")
        digest = origin["weights_sha256"]
        assert f"set embed.weights_sha256 to {digest}" in said
        shown = workspace.call("show", "digits@2").stdout
        assert "weights models:/digits@1" in shown and "pretrained on" in shown
        assert "| pretrained on" in str(client.get_model_version("digits", "2").description)
        kept = Path(cache_env["XDG_CACHE_HOME"]) / "tlpipe" / "registered" / f"{digest}.safetensors"
        weights = load_file(kept)
        # The same split again: training images were seen, and no other.
        counts = json.loads((workspace.path / "artifacts/audit/leaks.json").read_text())
        train = counts["pretrained"].pop("train")
        assert train["seen"] == train["images"] > 0
        assert all(found["seen"] == 0 for found in counts["pretrained"].values())

        champion = "weights: models:/digits@champion"
        for setting, code, message in (
            (f"{champion}\n  weights_sha256: {'f' * 64}", 5, "The alias has moved: change one of"),
            ("weights: models:/digits@nobody", 8, "the registry has no model digits@nobody"),
            ("weights: models:/digits", 3, "expected models:/NAME@ALIAS or models:/NAME@VERSION"),
        ):
            text = (workspace.path / "params.yaml").read_text()
            (workspace.path / "params.yaml").write_text(text.replace(champion, setting))
            assert message in workspace.call("embed", code=code).stderr
            (workspace.path / "params.yaml").write_text(text)
    original = load_network(describe("timm/test_resnet"), Weights(None, "")).state_dict()
    for name, tensor in original.items():
        expected = trained.get(f"stages.{name}", tensor)
        assert torch.equal(weights[name.partition(".")[2]], expected), name
    name = "layer4.layer4.0.conv1.weight"
    assert not torch.equal(trained[f"stages.{name}"], original[name])


def test_a_server_that_does_not_answer_stops_no_training(
    main_job: Workspace, empty: Workspace
) -> None:
    empty.take(main_job, "activations", "pixels", "split")
    empty.configure("train", hidden=[8], epochs=1)
    dead = Workspace(
        empty.path,
        dict(empty.env)
        | {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        },
    )
    said = dead.run("tlpipe", "train").stderr
    assert "no live curves: MLflow at" in said
    assert (empty.path / "artifacts/train/model/model.json").exists()
