import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient

from tests.conftest import PATIENCE_S, Workspace, free_port, server, wait_until
from tlpipe.bundle import load
from tlpipe.predict import Predictor
from tlpipe.serving import serve


@pytest.fixture(scope="module")
def served(main_job: Workspace) -> Iterator[tuple[int, int]]:
    """A real server that answers from the registry's champion: its port and process."""
    number = free_port()
    ready = f"http://127.0.0.1:{number}/v2/health/ready"
    with server(main_job, "tlpipe", "serve", "--port", str(number), ready=ready) as pid:
        yield number, pid


@pytest.fixture(scope="module")
def port(served: tuple[int, int]) -> int:
    return served[0]


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request(method, path, body=body)
        with connection.getresponse() as response:
            return response.status, json.loads(response.read())


def test_it_answers_as_predict_does(main_job: Workspace, artifacts: Path, port: int) -> None:
    examples = sorted((artifacts / "evaluate/examples").iterdir())
    printed = main_job.call("predict", "--json", *map(str, examples)).stdout
    digest = load(artifacts / "export/bundle").digest
    for path, expected in zip(examples, json.loads(printed), strict=True):
        status, answer = ask(port, "POST", "/predict", path.read_bytes())
        assert status == 200
        assert answer["model"] == digest
        assert answer["label"] == expected["label"]
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-5)
        assert set(answer["probabilities"]) == set("0123456789")


def test_it_lives_and_is_ready(artifacts: Path, port: int) -> None:
    assert ask(port, "GET", "/v2/health/live") == (200, {"live": True})
    digest = load(artifacts / "export/bundle").digest
    assert ask(port, "GET", "/v2/health/ready") == (200, {"ready": True, "model": digest})


@pytest.mark.fault("S39")
def test_a_form_is_told_from_an_image(artifacts: Path) -> None:
    app = serve.create_app(Predictor(artifacts / "export/bundle", threads=1))
    image = (artifacts / "evaluate/examples/0.png").read_bytes()
    answer = TestClient(app).post("/predict", files={"file": ("0.png", image)})
    assert answer.status_code == 400
    assert "a form was sent; expected the bytes of one image file as the body" in answer.text
    assert "curl --data-binary @x.jpg" in answer.text


@pytest.mark.fault("S11")
@pytest.mark.parametrize("body", [b"", b"not an image", b"http://127.0.0.1/a.png", b"/etc/passwd"])
def test_what_is_no_image_is_an_error(port: int, body: bytes) -> None:
    status, answer = ask(port, "POST", "/predict", body)
    assert status == 400
    assert "expected the bytes of one image file as the body" in answer["detail"]


def peak(pid: int) -> int:
    """Return the most memory that a process has had so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


@pytest.mark.fault("S01")
def test_a_body_beyond_the_cap_is_an_error_also_in_chunks(served: tuple[int, int]) -> None:
    port, pid = served
    ask(port, "POST", "/predict", b"x" * 2**24)
    before = peak(pid)
    chunks = (b"x" * 2**20 for _ in range(400))
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        # The server answers and closes before it was sent everything.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", "/predict", body=chunks, encode_chunked=True)
        with connection.getresponse() as response:
            status = response.status
    assert status == 413
    # What 32 MiB take while they grow, and not what was sent.
    assert peak(pid) - before < 150e6
    assert ask(port, "GET", "/v2/health/live")[0] == 200


@pytest.mark.fault("S14")
def test_without_a_model_it_lives_and_is_not_ready(tmp_path: Path) -> None:
    number = free_port()
    program = (
        "import uvicorn\nfrom tlpipe.serving.serve import create_app\n"
        f"uvicorn.run(create_app(None), port={number}, log_level='error')"
    )
    live = f"http://127.0.0.1:{number}/v2/health/live"
    with server(Workspace(tmp_path), sys.executable, "-c", program, ready=live):
        assert ask(number, "GET", "/v2/health/ready")[0] == 503
        assert ask(number, "POST", "/predict", b"x") == (503, {"detail": "no model is loaded"})


def test_a_port_that_is_taken_is_an_error(artifacts: Path, port: int) -> None:
    command = ("tlpipe", "serve", "--model", str(artifacts / "export/bundle"), "--port", str(port))
    error = Workspace(artifacts.parent).run(*command, code=9).stderr
    assert f"tlpipe: cannot listen on 127.0.0.1:{port}: Address already in use" in error
    assert "serving" not in error


def test_sigterm_ends_it(artifacts: Path) -> None:
    number = free_port()
    bundle = str(artifacts / "export/bundle")
    workspace = Workspace(artifacts.parent)
    command = ("tlpipe", "serve", "--model", bundle, "--port", str(number))
    with server(workspace, *command, ready=f"http://127.0.0.1:{number}/v2/health/live") as pid:
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(pid)], check=True)
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
