"""Files that are added to a run later: what is said to be there is there, killed or raced."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tlpipe.errors import RegistryError
from tlpipe.registry import moves, publishing, tracking

pytestmark = pytest.mark.slow
DIGEST = "a" * 64


@pytest.fixture
def client(tmp_path: Path) -> Iterator[MlflowClient]:
    """A registry with a run of one bundle, which has an artifact."""
    with tracking.connection(tmp_path, create=True) as client:
        experiment = tracking.experiment(client, "digits", tmp_path)
        run = client.create_run(experiment, tags={moves.BUNDLE_TAG: DIGEST})
        client.log_text(run.info.run_id, "a", "bundle/labels.json")
        yield client


class Interrupted(Exception):  # noqa: N818
    pass


class Intercepted:
    """A client that does something else after one of its writes."""

    def __init__(self, client: MlflowClient, number: int, after: Callable[[], None]) -> None:
        self._client, self._left, self._after = client, number, after

    def __getattr__(self, name: str) -> Any:
        called = getattr(self._client, name)
        if not name.startswith("log_"):
            return called

        def log(*given: Any, **named: Any) -> None:
            called(*given, **named)
            self._left -= 1
            if self._left == 0:
                self._after()

        return log


def page(folder: Path, text: str) -> Path:
    (folder / text / "plots").mkdir(parents=True)
    (folder / text / "index.html").write_text(text)
    (folder / text / "plots" / "map.png").write_text(text * 2)
    return folder / text


def add(client: Any, folder: Path) -> bool:
    found = publishing.add(client, "digits", DIGEST, folder, "explain")
    assert found is not None
    return found[1]


def stored(client: MlflowClient, folder: Path) -> str:
    (run,) = client.search_runs([tracking.experiment(client, "digits", folder)])
    return Path(client.download_artifacts(run.info.run_id, "explain/index.html")).read_text()


@pytest.mark.fault("M61")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_after_any_write_nothing_is_said_to_be_there_that_is_not(
    client: MlflowClient, tmp_path: Path, number: int
) -> None:
    first, second = page(tmp_path, "first"), page(tmp_path, "second")

    def die() -> None:
        raise Interrupted

    assert add(client, first)
    assert not add(client, first)
    with pytest.raises(Interrupted):
        add(Intercepted(client, number, die), second)
    is_done = number == 3  # the digests of what is there were the last
    assert add(client, second if is_done else first) != is_done
    assert stored(client, tmp_path) == ("second" if is_done else "first")


@pytest.mark.fault("M61")
def test_of_two_at_once_one_is_told_to_do_it_again(client: MlflowClient, tmp_path: Path) -> None:
    first, second = page(tmp_path, "first"), page(tmp_path, "second")

    def other() -> None:
        assert add(client, second)

    said = "explain/ of the MLflow run .* holds other files than were logged: somebody else"
    with pytest.raises(RegistryError, match=said):
        add(Intercepted(client, 2, other), first)
    assert stored(client, tmp_path) == "second"
    assert add(client, first)
    assert stored(client, tmp_path) == "first"
