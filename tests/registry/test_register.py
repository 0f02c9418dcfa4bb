import json
import shutil
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import PATIENCE_S, Workspace, free_port, server
from tests.registry.conftest import (
    COMMAND,
    REGISTER,
    change_bundle,
    killed_after_each_write,
    mlflow_server,
    postgres,
)

# Asked in a process of its own, as somebody else would: with MLflow alone.
STATE = """
import json, os, mlflow
client = mlflow.MlflowClient()
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
versions = client.search_model_versions("name = 'digits'")
models = client.search_logged_models([e.experiment_id for e in client.search_experiments()])
print(json.dumps({
    "experiment": client.get_experiment_by_name("digits").tags,
    "runs": [[run.info.status, run.data.tags, run.data.metrics, run.data.params] for run in runs],
    "inputs": [len(run.inputs.dataset_inputs) for run in runs],
    "curve": [len(client.get_metric_history(run.info.run_id, "train_loss")) for run in runs],
    "versions": [[v.name, int(v.version), v.tags] for v in versions],
    "models": [str(model.status) for model in models],
    "aliases": {m.name: {a: int(v) for a, v in m.aliases.items()}
                for m in client.search_registered_models("name = 'digits'")},
    "artifacts": [[sorted(a.path for a in client.list_artifacts(run.info.run_id)),
                   sorted(a.path for a in client.list_artifacts(run.info.run_id, "plots")),
                   sorted(a.path for a in client.list_artifacts(run.info.run_id, "data")),
                   sorted(a.path for a in client.list_artifacts(run.info.run_id, "data/plots"))]
                  for run in runs],
}))
"""


def state(workspace: Workspace, uri: str | None = None) -> dict[str, Any]:
    address = uri or f"sqlite:///{workspace.path / 'mlflow.db'}"
    asker = Workspace(workspace.path, {**workspace.env, "MLFLOW_TRACKING_URI": address})
    found: dict[str, Any] = json.loads(asker.run("python", "-c", STATE).stdout.splitlines()[-1])
    return found


def test_one_run_and_one_version_tell_where_the_bundle_comes_from(main_job: Workspace) -> None:
    found = state(main_job)
    ((status, tags, metrics, params),) = found["runs"]
    receipt = json.loads((main_job.path / "artifacts/register/receipt.json").read_text())
    report = json.loads((main_job.path / "artifacts/evaluate/report.json").read_text())
    origin = json.loads((main_job.path / "artifacts/train/model/model.json").read_text())["origin"]
    head = main_job.run("git", "rev-parse", "HEAD").stdout.strip()
    assert status == "FINISHED"
    # MLflow's page opens with runs and curves, not with the views of language models.
    assert found["experiment"]["mlflow.experimentKind"] == "custom_model_development"
    assert tags["tlpipe.bundle"] == receipt["bundle"] == report["bundle"]
    assert tags["tlpipe.git_commit"] == tags["mlflow.source.git.commit"] == head
    assert tags["tlpipe.git_changed"] == "false"
    assert tags["tlpipe.data_sha256"] == origin["data_sha256"]
    assert tags["tlpipe.weights_sha256"] == origin["weights_sha256"]
    assert (tags["tlpipe.backbone"], tags["tlpipe.freeze"]) == ("efficientnet_lite0", "all")
    onnx = main_job.path / "artifacts/export/bundle/model.onnx"
    assert tags["tlpipe.onnx_sha256"] == main_job.run("sha256sum", str(onnx)).stdout[:64]
    assert len(tags["tlpipe.dvc_lock_sha256"]) == 64
    assert metrics["test_accuracy"] == report["precisions"]["fp32"]["accuracy"]["value"]
    assert (params["threads"], params["weights"], params["crop_px"]) == ("2", "imagenet", "224")
    history = (main_job.path / "artifacts/train/history.csv").read_text().splitlines()
    assert found["curve"] == [len(history) - 1]
    assert found["inputs"] == [1]
    ((name, version, version_tags),) = found["versions"]
    assert (name, version) == ("digits", 1)
    assert version_tags["tlpipe.onnx_sha256"] == tags["tlpipe.onnx_sha256"]
    assert found["aliases"] == {"digits": {"challenger": 1, "champion": 1}}
    ((files, plots, data, pictures),) = found["artifacts"]
    expected = {"bundle", "history.csv", "parity.json", "plots", "predictions.csv", "report.json"}
    assert expected <= set(files)
    drawn = {"confusion", "coverage", "reliability", "mistakes", "training"}
    assert {f"plots/{name}.png" for name in drawn} <= set(plots)
    tables = {"data/ingest.json", "data/split.json", "data/rejects.csv", "data/label_issues.csv"}
    tables |= {"data/leaks.json", "data/shortcuts.json"}
    split = {"data/manifest.csv", "data/split.csv"}  # what 'rebuild' starts from
    assert set(data) == tables | split | {"data/plots"}
    assert {"data/plots/classes.png", "data/plots/label_issues.png"} <= set(pictures)
    assert (main_job.path / "mlartifacts").is_dir()
    assert not (main_job.path / "mlruns").exists()


def test_the_lock_s_hash_leaves_out_the_stage_itself(main_job: Workspace, tmp_path: Path) -> None:
    from tlpipe.versioning import lock_sha256

    lock = yaml.safe_load((main_job.path / "dvc.lock").read_text())
    ((_, tags, _, _),) = state(main_job)["runs"]
    assert lock_sha256(main_job.path / "dvc.lock") == tags["tlpipe.dvc_lock_sha256"]
    lock["stages"]["split"]["params"]["params.yaml"]["split"]["seed"] = 7
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert lock_sha256(tmp_path / "dvc.lock") != tags["tlpipe.dvc_lock_sha256"]


@pytest.mark.slow
@pytest.mark.fault("R02", "O05")
@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_killed_anywhere_and_replayed_there_is_one_run_and_one_version(
    built: Workspace, tmp_path: Path, store: str
) -> None:
    """Kill -9 after each thing that is written, on one registry, until the stage gets through."""
    with ExitStack() as stack:
        if store == "postgresql":
            database = stack.enter_context(postgres(tmp_path / "postgres"))
            address = stack.enter_context(mlflow_server(tmp_path, database, workers=4))
            built = Workspace(built.path, {**built.env, "MLFLOW_TRACKING_URI": address})
        check_killed_anywhere(built)


def check_killed_anywhere(built: Workspace) -> None:
    program = f"import sys; sys.argv = {COMMAND}; from tlpipe.cli import main; main()"
    # Every start compares the code with the lock: what was parsed for that is cached.
    before = "from tlpipe import cli, project; project.models(); project.lock()"
    places = list(killed_after_each_write(built, program, before=before))
    assert {place.split()[0] for place in places} >= {
        *("create_experiment", "create_run", "log_batch", "log_inputs", "log_artifacts"),
        *("create_registered_model", "create_model_version", "update_model_version"),
        *("set_tag", "set_terminated", "set_registered_model_alias", "set_model_version_tag"),
        "finalize_logged_model",
    }
    receipt = (built.path / "artifacts/register/receipt.json").read_bytes()
    built.call(*REGISTER)
    assert (built.path / "artifacts/register/receipt.json").read_bytes() == receipt
    found = state(built, built.env.get("MLFLOW_TRACKING_URI"))
    assert [run[0] for run in found["runs"]] == ["FINISHED"]
    assert len(found["versions"]) == 1
    assert found["inputs"] == [1]
    assert found["models"] == ["READY"]
    history = (built.path / "artifacts/train/history.csv").read_text().splitlines()
    assert found["curve"] == [len(history) - 1]
    assert found["aliases"] == {"digits": {"challenger": 1, "champion": 1}}


@pytest.mark.slow
@pytest.mark.fault("R18")
def test_what_is_stored_already_is_not_written_again(released: Workspace) -> None:
    """A version in production is read by servers while somebody registers it once more."""

    def stored() -> dict[Path, tuple[int, int, bytes]]:
        found = (released.path / "mlartifacts").rglob("*")
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
            for path in found
            if path.is_file()
        }

    first = stored()
    (graph,) = (path for path in first if path.match("bundle/model.onnx"))
    (stored_speed,) = (path for path in first if path.name == "speed.json")
    released.call("register")
    assert stored() == first
    speed = released.path / "artifacts/evaluate/speed.json"
    speed.write_bytes(speed.read_bytes() + b"\n")
    graph.unlink()
    released.call("register")
    after = stored()
    changed = {path.name for path in first if after[path] != first[path]}
    assert changed == {"model.onnx", "speed.json", "sha256.json"}
    assert after[graph][2] == first[graph][2]
    assert after[stored_speed][2] == speed.read_bytes()


def test_a_report_of_another_bundle_is_an_error(built: Workspace) -> None:
    report = built.path / "artifacts/evaluate/report.json"
    kept = report.read_bytes()
    change_bundle(built, provenance={"origin": {}})
    report.write_bytes(kept)
    error = built.call(*REGISTER, code=6).stderr
    assert "report.json measures another bundle than artifacts/export/bundle" in error


@pytest.mark.slow
def test_others_use_it_with_mlflow_alone(
    built: Workspace, tmp_path: Path, fresh_database: Path
) -> None:
    """A real tracking server with a database; somebody else's load_model and models serve."""
    serve_port = free_port()
    database = f"sqlite:///{shutil.copy(fresh_database, tmp_path)}"
    with mlflow_server(tmp_path, database, workers=1) as uri:
        remote = Workspace(built.path, {**built.env, "MLFLOW_TRACKING_URI": uri})
        remote.call("register")
        assert not (built.path / "mlflow.db").exists()
        assert state(built, uri)["aliases"] == {"digits": {"challenger": 1, "champion": 1}}
        example = built.path / "artifacts/evaluate/examples/0.png"
        predicted = json.loads(remote.call("predict", "--json", str(example)).stdout)
        program = (
            "import json, mlflow, numpy as np, onnxruntime, PIL.Image as images\n"
            "model = mlflow.onnx.load_model('models:/digits@champion')\n"
            "session = onnxruntime.InferenceSession(model.SerializeToString())\n"
            f"pixels = np.asarray(images.open({str(example)!r}))[None, 4:164, 4:164]\n"
            "_, probabilities = session.run(None, {'images': np.ascontiguousarray(pixels)})\n"
            "print(json.dumps(probabilities[0].tolist()))\n"
            "open('request.json', 'w').write(json.dumps({'inputs': pixels.tolist()}))\n"
        )
        loaded = json.loads(remote.run("python", "-c", program).stdout.splitlines()[-1])
        assert np.argmax(loaded) == int(predicted[0]["label"])
        assert max(loaded) == pytest.approx(predicted[0]["probability"], abs=1e-5)

        serve = ("mlflow", "models", "serve", "-m", "models:/digits@champion")
        options = ("--env-manager", "local", "--host", "127.0.0.1", "--port", str(serve_port))
        ready = f"http://127.0.0.1:{serve_port}/ping"
        elsewhere = Workspace(built.path.parent, remote.env)
        with server(elsewhere, *serve, *options, ready=ready):
            served = _post_json(ready.replace("ping", "invocations"), built.path / "request.json")
        assert served["predictions"]["probabilities"][0] == pytest.approx(loaded, abs=1e-5)


@pytest.mark.fault("R01")
def test_a_server_that_is_down_is_an_error_soon_and_the_bundle_kept(built: Workspace) -> None:
    """Soon: after one request and four tries more, with nothing in between but growing pauses."""
    tries = 0
    with socket.create_server(("127.0.0.1", free_port())) as hanging_up:

        def hang_up() -> None:
            nonlocal tries
            while True:
                caller, _ = hanging_up.accept()
                with caller:
                    if not caller.recv(1):
                        return
                    tries += 1

        counting = threading.Thread(target=hang_up)
        counting.start()
        down = Workspace(
            built.path,
            {
                **built.env,
                "MLFLOW_TRACKING_URI": f"http://user:secret@127.0.0.1:{hanging_up.getsockname()[1]}",
                "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
                "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
            },
        )
        error = down.call(*REGISTER, code=8).stderr
        socket.create_connection(hanging_up.getsockname()).close()
        counting.join(PATIENCE_S)
    assert tries == 5
    (line,) = error.splitlines()
    assert line.startswith("tlpipe: MLflow at http://127.0.0.1:")
    assert "the same command goes on from here" in line
    assert "secret" not in error
    assert (built.path / "artifacts/export/bundle/SHA256SUMS").exists()
    assert not (built.path / "artifacts/register").exists()


@pytest.mark.fault("R05")
def test_a_model_swapped_in_the_store_is_not_loaded(released: Workspace) -> None:
    (stored,) = (released.path / "mlartifacts").rglob("bundle/model.onnx")
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    example = "artifacts/evaluate/examples/0.png"
    error = released.call("predict", example, code=6).stderr
    assert "model.onnx has the sha256" in error
    # Also where the swap brought its own seal along.
    from tlpipe import bundle

    old = bundle.load(released.path / "artifacts/export/bundle")
    bundle.save(
        stored.parent,
        graphs={name: path.read_bytes() for name, path in old.graphs.items()},
        labels=old.labels[::-1],
        preprocessing=old.preprocessing,
        provenance=old.provenance,
    )
    error = released.call("predict", example, code=8).stderr
    assert "It was swapped or damaged; nothing was loaded." in error


def test_the_summary_shows_the_last_run_and_what_comes_next(main_job: Workspace) -> None:
    table = main_job.call("summary").stdout
    for text in (
        "1,000 images, 10 classes, 0 rejected",
        "efficientnet_lite0, frozen: all",
        "95% interval",
        "lowest recall",
        "copies in train",
        "as in clean sets: ",
        "no class is told by the size",
        " of 1,000 labels: artifacts/audit/label_issues.csv",
        "artifacts/export/bundle/model.onnx, 13.5 MB",
        "digits version 1, alias challenger, champion",
        "tlpipe ui | tlpipe predict IMAGE | tlpipe serve",
    ):
        assert text in table


def test_a_receipt_of_another_version_is_one_line(main_job: Workspace, empty: Workspace) -> None:
    content = json.loads((main_job.path / "artifacts/register/receipt.json").read_text())
    del content["lowest_recall"]
    receipt = empty.path / "artifacts/register/receipt.json"
    receipt.parent.mkdir(parents=True)
    receipt.write_text(json.dumps(content))
    error = empty.call("summary", code=6).stderr
    assert (
        "receipt.json was written by another version of tlpipe. Write it anew: 'dvc repro" in error
    )


@pytest.mark.fault("L04")
@pytest.mark.slow
def test_the_summary_offers_no_champion_where_there_is_none(built: Workspace) -> None:
    leaks = built.path / "artifacts/audit/leaks.json"
    leaks.write_text(json.dumps(json.loads(leaks.read_text()) | {"is_above_clean": True}))
    built.configure("register", gate={"min_accuracy": 0.999})
    said = built.call("register").stderr
    assert "is not known" not in said
    table = built.call("summary").stdout
    assert "digits version 1, alias challenger" in table
    assert "more than clean sets show: " in table
    assert (
        "next: tlpipe ui | tlpipe promote: nothing is in production yet | tlpipe predict IMAGE"
        in table
    )
    offered = table.partition("yet | tlpipe predict IMAGE ")[2].split()
    example = next((built.path / "artifacts/evaluate/examples").glob("*.png"))
    built.call("predict", str(example), *offered)


def test_a_lost_registry_is_said(built: Workspace) -> None:
    built.run(*COMMAND)
    for path in built.path.glob("*mlflow.db*"):
        path.unlink()
    error = built.call("summary", code=8).stderr
    assert f"there is no registry yet: {built.path}/mlflow.db is missing" in error
    assert not list(built.path.glob("*mlflow.db*"))
    (built.path / "params.yaml").write_text(
        (built.path / "params.yaml").read_text().replace("name: digits", "name: others")
    )
    kept = (built.path / "artifacts/register/receipt.json").read_bytes()
    built.call(*REGISTER)
    (built.path / "artifacts/register/receipt.json").write_bytes(kept)
    error = built.call("summary", code=8).stderr
    assert "the registry has no digits version 1" in error
    assert "'dvc repro --force --single-item register'" in error


def _post_json(address: str, body: Path) -> dict[str, Any]:
    import urllib.request

    request = urllib.request.Request(
        address, data=body.read_bytes(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        found: dict[str, Any] = json.loads(response.read())
    return found
