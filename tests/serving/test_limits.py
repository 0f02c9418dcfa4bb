"""What many, slow and large requests take, and whether the server can still be stopped."""

import http.client
import io
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.conftest import PATIENCE_S, Workspace, free_port, server
from tests.serving.test_serve import ask, peak
from tests.serving.test_serve import served as served
from tlpipe import bundle as bundles

pytestmark = pytest.mark.slow
SIDE, MANY, CROWD = 5000, 12, 300
# Longer than any deadline that issue 18 sets for a request that is not sent to its end.
DEADLINE_S = 15


def white(side: int) -> bytes:
    """Return a PNG, small for what it takes when it is decoded: 75 MB from 5,000 pixels a side."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "white").save(file, "PNG")
    assert file.tell() < 300_000
    return file.getvalue()


def unfinished(port: int) -> socket.socket:
    """Send half of a request."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
    return connection


def forget_peak(pid: int) -> None:
    """Let the most memory so far be what the process has now (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.mark.xfail(strict=True, reason="issue 18: as many images are decoded at once as are sent")
def test_large_images_at_once_take_no_more_than_a_few_do(served: tuple[int, int]) -> None:
    port, pid = served
    image, taken = white(SIDE), []
    assert ask(port, "POST", "/predict", image)[0] == 200
    for count in (1, MANY):
        forget_peak(pid)
        before = peak(pid)
        barrier = threading.Barrier(count)

        def send(_: int, barrier: threading.Barrier = barrier) -> int:
            with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
                connection.connect()
                barrier.wait(PATIENCE_S)
                connection.request("POST", "/predict", body=image)
                return connection.getresponse().status

        with ThreadPoolExecutor(count) as pool:
            statuses = set(pool.map(send, range(count)))
        assert statuses <= {200, 503}
        taken.append(peak(pid) - before)
    one, many = taken
    assert one > 3 * SIDE**2
    assert many < MANY / 2 * one, taken


@pytest.mark.fault("S03")
@pytest.mark.xfail(strict=True, reason="issue 18: nobody is turned away, however many wait")
def test_who_cannot_be_answered_soon_is_turned_away(served: tuple[int, int]) -> None:
    port, _ = served
    image, barrier = white(1000), threading.Barrier(CROWD)

    def send(_: int) -> tuple[int, str | None]:
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.connect()
            barrier.wait(PATIENCE_S)
            connection.request("POST", "/predict", body=image)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Retry-After")

    with ThreadPoolExecutor(CROWD) as pool:
        answers = list(pool.map(send, range(CROWD)))
    assert {status for status, _ in answers} == {200, 503}
    assert all(after for status, after in answers if status == 503)


@pytest.mark.fault("S02")
@pytest.mark.xfail(strict=True, reason="issue 18: who sends half a request may keep it for ever")
def test_a_request_that_is_not_sent_to_its_end_is_closed(served: tuple[int, int]) -> None:
    port, _ = served
    with unfinished(port) as slow:
        assert ask(port, "GET", "/v2/health/live")[0] == 200  # others are answered meanwhile
        answer = slow.recv(1000)  # runs out of time where the server waits on
    assert answer == b"" or b" 408 " in answer


@pytest.mark.fault("S05")
@pytest.mark.xfail(strict=True, reason="issue 18: SIGTERM waits for requests without an end")
def test_sigterm_ends_it_although_a_connection_is_open(artifacts: Path) -> None:
    port = free_port()
    bundle = str(artifacts / "export/bundle")
    command = ("tlpipe", "serve", "--model", bundle, "--port", str(port))
    ready = f"http://127.0.0.1:{port}/v2/health/live"
    with (
        server(Workspace(artifacts.parent), *command, ready=ready) as pid,
        closing(unfinished(port)),
    ):
        time.sleep(1)  # for the half to arrive; where it does not, the server ends sooner
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(2 * DEADLINE_S)
        except psutil.TimeoutExpired:
            process.kill()
            pytest.fail("SIGTERM does not end it")


@pytest.mark.xfail(strict=True, reason="issue 18: who answers cannot ask for a signature")
@pytest.mark.parametrize("command", ["predict", "serve"])
def test_a_bundle_that_somebody_else_sealed_is_not_loaded(
    artifacts: Path, tmp_path: Path, command: str
) -> None:
    """Its hashes are right, since they were made anew; its signature is of other bytes."""
    workspace = Workspace(tmp_path)
    shutil.copytree(artifacts / "export/bundle", tmp_path / "bundle")
    workspace.make_keys("key")
    workspace.run("tlpipe", "sign", "bundle", "--key", "key.pem")
    image = str(artifacts / "evaluate/examples/4.png")
    checked = ("--model", "bundle", "--key", "key.pub")
    workspace.run("tlpipe", "predict", *checked, image)
    old = bundles.load(tmp_path / "bundle")
    bundles.save(
        tmp_path / "bundle",
        graphs={name: path.read_bytes() for name, path in old.graphs.items()},
        labels=old.labels[::-1],
        preprocessing=old.preprocessing,
        provenance=old.provenance,
    )
    arguments = (image,) if command == "predict" else ("--port", str(free_port()))
    error = workspace.run("tlpipe", command, *checked, *arguments, code=6).stderr
    assert "signature" in error
