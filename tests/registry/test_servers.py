"""Real servers: PostgreSQL and S3 behind MLflow; a version is copied there and back out."""

import base64
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Workspace, free_port, server
from tests.registry.conftest import REGISTER, Said, change_bundle, postgres
from tlpipe import bundle
from tlpipe.errors import UnreachableError
from tlpipe.registry import tracking

COMPOSED = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["mlflow"]


@pytest.fixture
def production(tmp_path: Path, bucket: dict[str, str]) -> Iterator[str]:
    """MLflow on PostgreSQL with its artifacts in S3, set up as compose.yaml does."""
    with postgres(tmp_path / "postgres") as database:
        yield from _serve(tmp_path, bucket, database)


def _serve(folder: Path, bucket: dict[str, str], database: str) -> Iterator[str]:
    port = free_port()
    here = bucket | {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/",
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": str(port),
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    assert here.keys() == COMPOSED["environment"].keys()
    workspace = Workspace(folder, here | {"MLFLOW_WORKERS": "1"})
    address = f"http://127.0.0.1:{port}"
    with server(workspace, *COMPOSED["command"], ready=f"{address}/health"):
        yield address


@pytest.mark.slow
@pytest.mark.fault("R01")
def test_a_version_goes_from_the_workspace_to_production_and_back_out_of_it(
    released: Workspace,
    tlpipe: Callable[..., Said],
    production: str,
    bucket: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    first = bundle.load(released.path / "artifacts/export/bundle")
    down = f"http://127.0.0.1:{free_port()}"
    released.make_keys("key")
    tlpipe("sign", "digits@1", "--key", "key.pem")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    failed = tlpipe("promote", "champion", "--to", down)
    assert (failed.code, "does not answer as expected" in failed.error) == (8, True)

    # To production, through its own gate.
    copied = tlpipe("promote", "champion", "--to", production)
    assert "digits version 1 is in production, the first one" in copied.printed
    client = mlflow.MlflowClient(production)
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.tags["tlpipe.bundle"] == first.digest
    assert version.tags["tlpipe.copied_from"].endswith("mlflow.db version 1")
    assert version.run_id is not None
    run = client.get_run(version.run_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert run.data.metrics["test_accuracy"] > 0.5
    assert version.description == run.data.tags["mlflow.note.content"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production)
    assert tlpipe("verify", "digits@champion", "--key", "key.pub").code == 0
    again = tlpipe("promote", "champion", "--to", production)
    assert "is in production already" in again.error
    assert len(client.search_model_versions("name = 'digits'")) == 1

    # Register, promote and roll back there: the registering failed first, and is replayed.
    change_bundle(released, provenance={**first.provenance, "l2": 0.5})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", down)
    assert tlpipe(*REGISTER).code == 8
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production)
    assert tlpipe(*REGISTER).code == tlpipe(*REGISTER).code == 0
    assert len(client.search_model_versions("name = 'digits'")) == 2
    assert "digits version 2 is in production" in tlpipe("promote").printed
    assert "digits version 1 is in production again" in tlpipe("rollback").printed
    assert str(client.get_registered_model("digits").aliases["champion"]) == "1"
    program = (
        "import boto3; found = boto3.client('s3').list_objects_v2(Bucket='bucket')['Contents']; "
        "print(sum(o['Key'].endswith('bundle/model.onnx') for o in found))"
    )
    assert Workspace(released.path, bucket).run("python", "-c", program).stdout == "2\n"


@pytest.fixture
def listening() -> Iterator[tuple[str, list[str]]]:
    """A server that refuses everything, and what accounts were shown to it."""
    shown: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            shown.append(self.headers.get("Authorization", ""))
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}", shown
        found.shutdown()


@pytest.mark.fault("R29")
def test_another_server_never_sees_the_account_of_ours(
    tmp_path: Path, listening: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, shown = listening
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "ours")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = ann\nmlflow_tracking_password = secret\n"
    )
    own = f"Basic {base64.b64encode(b'ann:secret').decode()}"

    def ask(ours: str, other: str | None) -> str:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", ours)
        with (
            pytest.raises(UnreachableError),
            tracking.connection(tmp_path, address=other) as client,
        ):
            client.search_experiments()
        assert os.environ["MLFLOW_TRACKING_TOKEN"] == "ours"
        return shown.pop()

    assert ask("http://127.0.0.1:9", address) == ""
    monkeypatch.setenv("TO_MLFLOW_TRACKING_TOKEN", "theirs")
    assert ask("http://127.0.0.1:9", address) == "Bearer theirs"
    # Our own server sees ours, also where --to names it: the file's goes before a token.
    assert ask(address, None) == ask(address, address) == own
    (tmp_path / ".mlflow" / "credentials").unlink()
    assert ask(address, None) == ask(address, address) == "Bearer ours"


@pytest.mark.fault("R70")
def test_what_others_could_not_load_is_not_copied(
    released: Workspace, fresh_database: Path, tmp_path: Path
) -> None:
    """A database alone has no place for artifacts: MLflow takes a folder of who asks."""
    import mlflow

    database = f"sqlite:///{shutil.copy(fresh_database, tmp_path / 'production.db')}"
    said = released.call("promote", "digits@1", "--to", database, code=8).stderr
    assert f"would lie in {released.path}/mlruns" in said
    assert "Nothing was copied. Expected a server that keeps artifacts" in said
    client = mlflow.MlflowClient(database)
    assert client.search_model_versions("name = 'digits'") == []
