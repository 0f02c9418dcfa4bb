"""Stores that fail: a real HTTP and a real S3 server, behind one that starts to refuse."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import INGEST, Workspace
from tests.proxy import Fate, proxy
from tests.sources.test_storage import UPLOAD, contents


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def web(photos: Path) -> Iterator[str]:
    """The photos behind a web server."""
    handler = partial(Quiet, directory=str(photos.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def failing_after(reads: int, status: int) -> Fate:
    """Answer with a status after so many images were fetched."""
    lock, seen = threading.Lock(), set()

    def fate(method: str, path: str) -> int | None:
        if method != "GET" or not path.endswith(".png"):
            return None
        with lock:
            if path in seen or len(seen) < reads:
                seen.add(path)
                return None
        return status

    return fate


def test_a_web_server_is_read_as_the_folder_behind_it(
    empty: Workspace, photos: Path, web: str
) -> None:
    empty.set_source(photos)
    empty.ingest()
    expected = contents(empty)
    empty.replace("params.yaml", f"source: {photos} ", f"source: {web}/photos ")
    (empty.path / "out" / "manifest.csv").unlink()
    empty.ingest()
    assert contents(empty) == expected


@pytest.mark.xfail(strict=True, reason="issue 14: the error of a store ends in a traceback")
@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_web_server_that_fails_meanwhile_is_no_source_of_bad_images(
    empty: Workspace, web: str, status: int
) -> None:
    with proxy(web, failing_after(20, status)) as address:
        empty.set_source(f"{address}/photos")
        error = empty.ingest(code=4)
    assert str(status) in error
    assert not (empty.path / "out" / "manifest.csv").exists()


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="issue 14: what a store refuses counts as rejected images")
@pytest.mark.parametrize("status", [403, 500])
def test_a_bucket_that_fails_meanwhile_is_no_source_of_bad_images(
    empty: Workspace, photos: Path, bucket: dict[str, str], status: int
) -> None:
    """A token that ends, a server that breaks: four of 24 images cannot be fetched."""
    local = Workspace(empty.path, {**empty.env, **bucket})
    local.run("python", "-c", UPLOAD, str(photos), "photos")
    with proxy(bucket["AWS_ENDPOINT_URL"], failing_after(20, status)) as address:
        few = {"AWS_ENDPOINT_URL": address, "AWS_MAX_ATTEMPTS": "1"}  # pauses grow between tries
        behind = Workspace(empty.path, {**local.env, **few})
        behind.set_source("s3://bucket/photos")
        said = behind.run("tlpipe", *INGEST, code=None)
    assert said.returncode == 4, behind.rejects()
    assert not (empty.path / "out" / "manifest.csv").exists()


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="issue 14: no credentials end in a traceback")
def test_a_bucket_without_credentials_is_a_refusal(
    empty: Workspace, bucket: dict[str, str], tmp_path: Path
) -> None:
    nobody = {k: v for k, v in bucket.items() if "KEY" not in k}
    nobody |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    without = Workspace(empty.path, {**empty.env, **nobody})
    without.set_source("s3://bucket/photos")
    error = without.run("tlpipe", *INGEST, code=4).stderr
    assert "s3://bucket/photos cannot be reached" in error
    assert "credentials" in error
