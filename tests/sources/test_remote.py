"""Stores that fail: a real HTTP and a real S3 server, behind one that starts to refuse."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.conftest import INGEST, Workspace, free_port
from tests.proxy import DROP, Fate, proxy
from tests.sources.test_storage import UPLOAD, contents, versioned
from tlpipe import versioning
from tlpipe.errors import DataError, StoreError
from tlpipe.sources import listing, storage

# What s3fs does once more by itself is done once: its pauses grow.
ONCE = {"AWS_MAX_ATTEMPTS": "1"}


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.PAUSES_S == (1.0, 2.0, 4.0)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01, 0.01))


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


def client_of(bucket: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=bucket["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )


def failing_after(reads: int, status: int) -> Fate:
    """Answer with a status after so many images were fetched."""
    lock = threading.Lock()
    seen: set[str] = set()

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
    (empty.path / "artifacts/ingest" / "manifest.csv").unlink()
    empty.ingest()
    assert contents(empty) == expected


@pytest.mark.fault("D35")
@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_web_server_that_fails_meanwhile_is_no_source_of_bad_images(
    empty: Workspace, web: str, status: int, no_pauses: None
) -> None:
    """Nor does it change what an earlier run has left."""
    empty.set_source(f"{web}/photos")
    empty.ingest()
    expected = contents(empty)
    asked: list[str] = []
    fails = failing_after(20, status)

    def fate(method: str, path: str) -> int | None:
        found = fails(method, path)
        if found is not None:
            asked.append(path)
        return found

    with proxy(web, fate) as address:
        empty.replace("params.yaml", f"source: {web}/photos ", f"source: {address}/photos ")
        error = empty.ingest(code=4)
    assert f"{status}, message=" in error
    assert "It was tried 4 times in 0.03 s. Nothing was rejected or changed" in error
    assert max(map(asked.count, asked)) == 4
    assert contents(empty) == expected


@pytest.mark.fault("D35")
def test_a_web_server_that_fails_twice_is_asked_again(
    empty: Workspace, photos: Path, web: str, no_pauses: None
) -> None:
    empty.set_source(photos)
    empty.ingest()
    expected = contents(empty)
    lock, asked = threading.Lock(), dict[str, int]()

    def fate(method: str, path: str) -> int | None:
        with lock:
            asked[path] = asked.get(path, 0) + 1
            return 503 if path.endswith(".png") and asked[path] <= 2 else None

    with proxy(web, fate) as address:
        empty.replace("params.yaml", f"source: {photos} ", f"source: {address}/photos ")
        said = empty.ingest()
    assert {count for path, count in asked.items() if path.endswith(".png")} == {3}
    assert said.count("trying again") == 2 * 24
    assert contents(empty) == expected


@pytest.mark.fault("D68")
@pytest.mark.parametrize("status", [404, 403, 503, DROP])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    web: str, status: int, no_pauses: None
) -> None:
    """The listing names it, so that also 'not found' is a failure."""
    asked: list[str] = []

    def fate(method: str, path: str) -> int | None:
        if path.rstrip("/") != "/photos/dark" or method != "GET":
            return None
        asked.append(path)
        return status

    with (
        proxy(web, fate) as address,
        pytest.raises(StoreError, match=r"/photos/dark.* cannot be reached: .* tried 4 times"),
        listing.opened(f"{address}/photos"),
    ):
        pass
    assert len(asked) >= 4


@pytest.mark.fault("D68")
def test_a_folder_that_cannot_be_listed_twice_is_listed_again(web: str, no_pauses: None) -> None:
    asked: list[str] = []

    def fate(method: str, path: str) -> int | None:
        if path.rstrip("/") != "/photos/dark" or len(asked) == 2:
            return None
        asked.append(path)
        return 503

    with proxy(web, fate) as address, listing.opened(f"{address}/photos") as source:
        assert source.counts == {"dark": 12, "light": 12}
    assert len(asked) == 2


@pytest.mark.fault("D68")
@pytest.mark.parametrize("place", ["photos", "photos.zip"])
@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_where_nothing_listens_the_address_is_not_blamed(
    scheme: str, place: str, no_pauses: None
) -> None:
    address = f"{scheme}://127.0.0.1:{free_port()}/{place}"
    with (
        pytest.raises(StoreError, match=f"{address} cannot be reached: .* tried 4 times"),
        listing.opened(address),
    ):
        pass


@pytest.mark.fault("D68")
@pytest.mark.parametrize("status", [403, 503])
def test_an_archive_that_is_an_error_is_not_missing(web: str, status: int, no_pauses: None) -> None:
    with (
        proxy(web, lambda *_: status) as address,
        pytest.raises(StoreError, match=f"photos.zip cannot be reached: .*{status}, message="),
        listing.opened(f"{address}/photos.zip"),
    ):
        pass


@pytest.mark.fault("D55")
@pytest.mark.parametrize("status", [403, 503])
def test_why_dvc_cannot_look_a_source_up_is_said(
    web: str, tmp_path: Path, status: int, no_pauses: None
) -> None:
    with proxy(web, lambda *_: status) as address:
        root = versioned(tmp_path, f"{address}/photos.zip")
        message = rf"DVC's hash of the source cannot be reached: .*{status}, message="
        with pytest.raises(StoreError, match=message):
            versioning.data_version(root)
    with (
        proxy(web, lambda *_: 404) as address,
        pytest.raises(DataError, match=r"ingest.source is not there, so DVC cannot tell"),
    ):
        versioning.data_version(versioned(tmp_path / "other", f"{address}/photos.zip"))


@pytest.mark.fault("D51")
def test_a_file_that_is_listed_and_not_found_is_said_to_be_gone(empty: Workspace, web: str) -> None:
    with proxy(web, lambda _, path: 404 if path.endswith("light/5.png") else None) as address:
        empty.set_source(f"{address}/photos")
        error = empty.ingest(code=4)
    assert (
        "light/5.png is gone while the source was read: when it was listed it was there." in error
    )


@pytest.mark.parametrize("place", ["none", "none.zip"])
def test_what_a_web_server_does_not_have_is_not_asked_for_again(web: str, place: str) -> None:
    with (
        pytest.raises(DataError, match=f"{place} does not exist, or changes"),
        listing.opened(f"{web}/{place}"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.fault("D35")
@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_bucket_that_fails_meanwhile_is_no_source_of_bad_images(
    empty: Workspace, photos: Path, bucket: dict[str, str], status: int
) -> None:
    """A token that ends, a server that breaks: four of 24 images cannot be fetched."""
    local = Workspace(empty.path, {**empty.env, **bucket})
    local.run("python", "-c", UPLOAD, str(photos), "photos")
    with proxy(bucket["AWS_ENDPOINT_URL"], failing_after(20, status)) as address:
        behind = Workspace(empty.path, {**local.env, **ONCE, "AWS_ENDPOINT_URL": address})
        behind.set_source("s3://bucket/photos")
        said = behind.run("tlpipe", *INGEST, code=None)
    assert said.returncode == 4, behind.rejects()
    assert "cannot be reached: " in said.stderr
    assert "Traceback" not in said.stderr
    assert not (empty.path / "artifacts/ingest" / "manifest.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["", "simplecache::"])
def test_folders_made_in_the_console_of_a_bucket_are_no_images(
    empty: Workspace, photos: Path, bucket: dict[str, str], by: str
) -> None:
    local = Workspace(empty.path, {**empty.env, **bucket})
    local.run("python", "-c", UPLOAD, str(photos), "photos")
    for key in ("photos/", "photos/dark/", "photos/light/"):
        client_of(bucket).put_object(Bucket="bucket", Key=key, Body=b"")
    local.set_source(f"{by}s3://bucket/photos")
    assert "24 images in 2 classes, 0 rejected" in local.run("tlpipe", *INGEST).stderr


@pytest.mark.slow
@pytest.mark.fault("D68")
def test_a_bucket_that_cannot_be_listed_is_not_empty(
    empty: Workspace, photos: Path, bucket: dict[str, str]
) -> None:
    local = Workspace(empty.path, {**empty.env, **bucket})
    local.run("python", "-c", UPLOAD, str(photos), "photos")
    asked: list[str] = []

    def fate(method: str, path: str) -> int | None:
        if method == "GET" and "list-type" in path:
            asked.append(path)
            return 503
        return None

    with proxy(bucket["AWS_ENDPOINT_URL"], fate) as address:
        behind = Workspace(empty.path, {**local.env, **ONCE, "AWS_ENDPOINT_URL": address})
        behind.set_source("s3://bucket/photos")
        said = behind.run("tlpipe", *INGEST, code=None)
    assert said.returncode == 4
    assert "cannot be reached: " in said.stderr
    assert len(asked) >= 4
    assert not (empty.path / "artifacts/ingest" / "manifest.csv").exists()


@pytest.mark.slow
@pytest.mark.fault("D51")
def test_an_object_that_changes_after_the_listing_is_no_part_of_the_data(
    empty: Workspace, photos: Path, bucket: dict[str, str]
) -> None:
    """Another image of the very same number of bytes takes its place."""
    local = Workspace(empty.path, {**empty.env, **bucket})
    for path in photos.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(500, b"\0"))
    local.run("python", "-c", UPLOAD, str(photos), "photos")
    client = client_of(bucket)

    def fate(method: str, path: str) -> int | None:
        if method == "GET" and path.endswith("light/5.png"):
            other = (photos / "dark" / "3.png").read_bytes()
            client.put_object(Bucket="bucket", Key="photos/light/5.png", Body=other)
        return None

    with proxy(bucket["AWS_ENDPOINT_URL"], fate) as address:
        behind = Workspace(empty.path, {**local.env, **ONCE, "AWS_ENDPOINT_URL": address})
        behind.set_source("s3://bucket/photos")
        error = behind.run("tlpipe", *INGEST, code=4).stderr
    assert "s3://bucket/photos/light/5.png changed while the source was read" in error
    assert "it had 500 bytes and the tag" in error


@pytest.mark.slow
@pytest.mark.fault("D36")
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
