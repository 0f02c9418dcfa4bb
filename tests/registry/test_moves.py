"""Promotions that race, and the history they leave: a real MLflow server, real clients."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from tests.conftest import PATIENCE_S, Workspace, free_port, server
from tests.registry.conftest import postgres
from tlpipe.errors import RegistryError
from tlpipe.registry import moves

NAME = "raced"
RACERS, ROUNDS = 8, 12


@pytest.fixture(params=["sqlite", "postgresql"])
def address(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A server whose registry has a model with a version for each racer."""
    if request.param == "sqlite":
        patience = f"timeout={PATIENCE_S}"
        yield from _serve(tmp_path, f"sqlite:///{tmp_path}/mlflow.db?{patience}", workers=1)
        return
    with postgres(tmp_path / "postgres") as database:
        yield from _serve(tmp_path, database, workers=4)


def _serve(folder: Path, database: str, *, workers: int) -> Iterator[str]:
    import mlflow

    port = free_port()
    found = f"http://127.0.0.1:{port}"
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = ("mlflow", "server", "--backend-store-uri", database)
    where = ("--host", "127.0.0.1", "--port", str(port), "--workers", str(workers))
    with server(Workspace(folder, env), *command, *where, ready=f"{found}/health"):
        client = mlflow.MlflowClient(found)
        client.create_registered_model(NAME)
        for number in range(RACERS):
            client.create_model_version(NAME, source=f"s3://bucket/{number}")
        yield found


def race(address: str, version: str, barrier: Barrier) -> list[tuple[str, str]]:
    """Promote one version in each round; return who then was champion, or what was said.

    Everybody has looked at the same last move before anybody moves: each round is a race.
    """
    import mlflow

    client, found = mlflow.MlflowClient(address), []
    try:
        for _ in range(ROUNDS):
            after = moves.tail(client, NAME)
            barrier.wait(PATIENCE_S)
            try:
                moved = moves.move(client, NAME, version, after=after, kind="promotion", why="race")
                found.append((moved.champion, ""))
            except RegistryError as error:
                found.append(("", str(error)))
            barrier.wait(PATIENCE_S)
    except BaseException:
        barrier.abort()  # nobody need wait for this one
        raise
    return found


@pytest.mark.slow
@pytest.mark.fault("R03")
def test_of_those_who_promote_at_once_one_wins_and_the_others_are_told_who(address: str) -> None:
    import mlflow

    barrier = Barrier(RACERS)
    versions = [str(number + 1) for number in range(RACERS)]
    with ThreadPoolExecutor(RACERS) as pool:
        raced = list(pool.map(race, [address] * RACERS, versions, [barrier] * RACERS))
    client = mlflow.MlflowClient(address)
    log = moves.history(client, NAME)
    assert len(log) == ROUNDS
    for number in range(ROUNDS):
        of_round = [found[number] for found in raced]
        (winner,) = (champion for champion, _ in of_round if champion)
        assert log[number].champion == winner
        errors = [error for champion, error in of_round if not champion]
        assert len(errors) == RACERS - 1
        for error in errors:
            assert f"has put {NAME} version {winner} in production" in error
    assert [move.previous for move in log[1:]] == [move.champion for move in log[:-1]]
    aliases = client.get_registered_model(NAME).aliases
    assert str(aliases["champion"]) == log[-1].champion
    assert str(aliases["previous"]) == log[-1].previous
    middle = log[ROUNDS // 2]
    assert moves.during(log, middle.at, middle.at)[0].at == middle.at
    assert moves.during(log, log[0].at, log[-1].at) == log
    begin = datetime(2020, 1, 1, tzinfo=UTC)
    assert moves.during(log, begin, begin) == []


@pytest.fixture
def local(tmp_path: Path) -> Any:
    """A client of an SQLite registry with two versions."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_registered_model(NAME)
    for number in range(2):
        client.create_model_version(NAME, source=f"s3://bucket/{number}")
    return client


def test_a_request_that_is_repeated_since_its_answer_was_lost_still_wins(local: Any) -> None:
    class Repeating:
        """MLflow's own client sends a request again after a time-out; both arrive."""

        def __getattr__(self, name: str) -> Any:
            return getattr(local, name)

        def create_model_version(self, *given: Any, **named: Any) -> Any:
            local.create_model_version(*given, **named)
            return local.create_model_version(*given, **named)

    move = partial(moves.move, kind="promotion", why="")
    local.create_registered_model(f"{NAME}-history")
    first = move(Repeating(), NAME, "1", after=None)  # type: ignore[arg-type]
    second = move(Repeating(), NAME, "2", after=first)  # type: ignore[arg-type]
    assert moves.history(local, NAME) == [first, second]
    assert moves.tail(local, NAME) == second
    with pytest.raises(RegistryError, match="has put raced version 2 in production"):
        move(local, NAME, "1", after=first)


def test_what_others_put_into_the_log_counts_for_nothing(local: Any) -> None:
    first = moves.move(local, NAME, "1", after=None, kind="promotion", why="a" * 9000)
    local.create_model_version(f"{NAME}-history", source="s3://bucket/other", tags={"mine": "1"})
    second = moves.move(local, NAME, "2", after=first, kind="promotion", why="")
    assert moves.history(local, NAME) == [first, second]
    assert moves.history(local, NAME)[0].why == "a" * 9000


@pytest.mark.xfail(strict=True, reason="issue 15: a move names a version by its number alone")
def test_a_model_that_is_made_again_gets_no_champion_by_its_number(local: Any) -> None:
    first = moves.move(local, NAME, "1", after=None, kind="promotion", why="")
    moves.move(local, NAME, "2", after=first, kind="promotion", why="")
    local.delete_registered_model(NAME)
    local.create_registered_model(NAME)
    for number in range(2):
        local.create_model_version(NAME, source=f"s3://bucket/other-{number}")
    with suppress(RegistryError):
        moves.settle(local, NAME)
    assert "champion" not in local.get_registered_model(NAME).aliases


@pytest.mark.xfail(strict=True, reason="issue 15: an alias that was set by hand is set back")
def test_a_champion_that_was_set_by_hand_stays(local: Any) -> None:
    first = moves.move(local, NAME, "1", after=None, kind="promotion", why="")
    moves.move(local, NAME, "2", after=first, kind="promotion", why="")
    local.set_registered_model_alias(NAME, "champion", "1")
    with suppress(RegistryError):
        moves.settle(local, NAME)
    assert str(local.get_registered_model(NAME).aliases["champion"]) == "1"


@pytest.mark.xfail(strict=True, reason="issue 15: who lost a race wins when the winner is deleted")
def test_who_lost_a_race_never_becomes_champion(local: Any) -> None:
    first = moves.move(local, NAME, "1", after=None, kind="promotion", why="")
    moves.move(local, NAME, "2", after=first, kind="promotion", why="")
    with pytest.raises(RegistryError, match="has put raced version 2 in production"):
        moves.move(local, NAME, "1", after=first, kind="promotion", why="lost")
    local.delete_model_version(f"{NAME}-history", "2")
    assert [move.why for move in moves.history(local, NAME)] != ["", "lost"]


@pytest.mark.parametrize(
    ("kinds", "steps"),
    [
        ("", ""),
        ("1", "1"),
        ("1 2 3", "1 2 3"),
        ("1 2 3 back:2", "1 2"),
        ("1 2 3 back:2 back:1", "1"),
        ("1 2 3 back:1 4", "1 4"),
        ("1 2 1 3 back:1", "1 2 1"),
        ("1 2 3 back:2 back:3", "1 2 3"),
    ],
)
def test_rollbacks_go_back_step_by_step(kinds: str, steps: str) -> None:
    log = []
    for number, word in enumerate(kinds.split(), start=1):
        back, _, version = word.rpartition(":")
        kind = moves.ROLLBACK if back else moves.PROMOTION
        now = datetime.now(UTC)
        log.append(moves.Move(number, number - 1, version, "", kind, "", "", now, str(number)))
    assert moves.standing(log) == steps.split()
