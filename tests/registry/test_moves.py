"""Promotions that race, and the history they leave: a real MLflow server, real clients."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import PATIENCE_S
from tests.registry.conftest import mlflow_server, postgres
from tlpipe.errors import RegistryError
from tlpipe.registry import gate, moves, promotion, tracking

NAME = "raced"
RACERS, ROUNDS = 8, 12


@pytest.fixture(params=["sqlite", "postgresql"])
def address(tmp_path: Path, fresh_database: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A server whose registry has a model with a version for each racer."""
    import mlflow

    with ExitStack() as stack:
        copied = shutil.copy(fresh_database, tmp_path)
        database, workers = f"sqlite:///{copied}?timeout={PATIENCE_S}", 1
        if request.param == "postgresql":
            database, workers = stack.enter_context(postgres(tmp_path / "postgres")), 4
        found = stack.enter_context(mlflow_server(tmp_path, database, workers=workers))
        with_versions(mlflow.MlflowClient(found), RACERS)
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
                moved = promote(client, version, after)
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
def local(tmp_path: Path, fresh_database: Path) -> Any:
    """A client of an SQLite registry with three versions."""
    import mlflow

    copied = shutil.copy(fresh_database, tmp_path)
    return with_versions(mlflow.MlflowClient(f"sqlite:///{copied}"))


def with_versions(client: Any, count: int = 3) -> Any:
    client.create_registered_model(NAME)
    for number in range(count):
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

    local.create_registered_model(f"{NAME}-history")
    first = promote(Repeating(), "1", None)
    second = promote(Repeating(), "2", first)
    assert moves.history(local, NAME) == [first, second]
    assert moves.tail(local, NAME) == second
    with pytest.raises(RegistryError, match="has put raced version 2 in production"):
        promote(local, "1", first)


def test_an_entry_that_search_gives_twice_is_one_move(local: Any) -> None:
    """Pages shift where others write meanwhile, and the last of one comes first in the next."""

    class Shifting:
        def __getattr__(self, name: str) -> Any:
            return getattr(local, name)

        def search_model_versions(self, *given: Any, **named: Any) -> Any:
            page = local.search_model_versions(*given, **named)
            return PagedList([*page, *page[-1:]], page.token)

    from mlflow.store.entities.paged_list import PagedList

    second = promote(local, "2", promote(local, "1", None))
    client: Any = Shifting()
    assert moves.history(client, NAME) == moves.history(local, NAME)
    assert moves.tail(client, NAME) == second


class Failing:
    """A client whose requests for a new version fail so many times, in MLflow's words."""

    def __init__(self, client: Any, times: int, words: str) -> None:
        self._client, self._times, self._words = client, times, words

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def create_model_version(self, *given: Any, **named: Any) -> Any:
        from mlflow.exceptions import MlflowException

        self._times -= 1
        if self._times >= 0:
            raise MlflowException(self._words)
        return self._client.create_model_version(*given, **named)


def test_a_number_that_others_took_is_asked_for_again_and_no_other_error_is(local: Any) -> None:
    local.create_registered_model(f"{NAME}-history")
    words = "Model Version creation error (name=raced-history). Giving up after 3 attempts."
    first = promote(Failing(local, 3, words), "1", None)
    with pytest.raises(Exception, match="disk is full"):
        promote(Failing(local, 1, "the disk is full"), "2", first)
    assert moves.tail(local, NAME) == first


def test_what_others_put_into_the_log_counts_for_nothing(local: Any) -> None:
    first = promote(local, "1", None, why="a" * 9000)
    local.create_model_version(f"{NAME}-history", source="s3://bucket/other", tags={"mine": "1"})
    second = promote(local, "2", first)
    assert moves.history(local, NAME) == [first, second]
    assert moves.history(local, NAME)[0].why == "a" * 9000


def seen(client: Any, version: str) -> moves.Seen:
    return moves.seen(client, NAME, client.get_model_version(NAME, version))


def promote(
    client: Any, version: str, after: moves.Move | None, kind: str = moves.PROMOTION, why: str = ""
) -> moves.Move:
    return moves.move(client, NAME, seen(client, version), after=after, kind=kind, why=why)


def aliases(client: Any) -> dict[str, str]:
    return {alias: str(v) for alias, v in client.get_registered_model(NAME).aliases.items()}


def kinds(client: Any) -> list[tuple[str, str]]:
    return [(move.kind, move.champion) for move in moves.history(client, NAME)]


@pytest.mark.fault("R12")
def test_a_model_that_is_made_again_gets_no_champion_by_its_number(local: Any) -> None:
    promote(local, "2", promote(local, "1", None))
    local.delete_registered_model(NAME)
    assert moves.tail(local, NAME) is None
    local.create_registered_model(NAME)
    for number in range(3):
        local.create_model_version(NAME, source=f"s3://bucket/other-{number}")
    assert moves.settle(local, NAME) is None
    assert aliases(local) == {} and moves.history(local, NAME) == []
    first = promote(local, "3", None)
    assert moves.tail(local, NAME) == first
    assert aliases(local) == {"champion": "3"}
    with pytest.raises(RegistryError, match="has put raced version 3 in production"):
        promote(local, "1", None)


@pytest.mark.fault("R14")
def test_a_champion_that_was_set_by_hand_stays_and_is_written_down(local: Any) -> None:
    promote(local, "2", promote(local, "1", None))
    local.set_registered_model_alias(NAME, "champion", "1")
    adopted = moves.settle(local, NAME)
    assert adopted is not None and (adopted.kind, adopted.previous) == (moves.BY_HAND, "2")
    assert adopted.why == "the alias champion was set in MLflow"
    assert aliases(local) == {"champion": "1", "previous": "2"}
    assert moves.settle(local, NAME) == adopted == moves.tail(local, NAME)
    assert kinds(local) == [("promotion", "1"), ("promotion", "2"), ("by-hand", "1")]
    assert moves.standing(moves.history(local, NAME)) == ["1"]


@pytest.mark.fault("R14")
@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_champion_that_was_taken_away_by_hand_stays_away(local: Any, is_deleted: bool) -> None:
    first = promote(local, "1", None)
    second = promote(local, "2", first)
    if is_deleted:
        local.delete_model_version(NAME, "2")
    else:
        local.delete_registered_model_alias(NAME, "champion")
    adopted = moves.settle(local, NAME)
    assert adopted is not None and (adopted.champion, adopted.follows) == ("", second.number)
    assert "champion" not in aliases(local)
    assert moves.standing(moves.history(local, NAME)) == ["1", "2"]
    promote(local, "3", adopted)
    assert aliases(local)["champion"] == "3"


@pytest.mark.fault("R15")
@pytest.mark.parametrize("is_marked", [True, False])
def test_who_lost_a_race_never_becomes_champion(local: Any, is_marked: bool) -> None:
    """Also where the winner's entry is deleted, and where the loser was killed before its mark."""
    first = promote(local, "1", None)
    promote(local, "2", first)
    with pytest.raises(RegistryError, match="has put raced version 2 in production"):
        promote(local, "3", first)
    if not is_marked:
        local.delete_model_version_tag(f"{NAME}-history", "3", "tlpipe.move.lost")
    local.delete_model_version(f"{NAME}-history", "2")
    assert kinds(local) == [("promotion", "1")]
    moves.settle(local, NAME)
    assert aliases(local)["champion"] == "2"
    assert kinds(local) == [("promotion", "1"), ("by-hand", "2")]


@pytest.mark.fault("R15")
def test_an_entry_that_is_deleted_as_soon_as_it_is_written_is_an_error(local: Any) -> None:
    first = promote(local, "1", None)
    client = Pausing(local, 1, lambda: local.delete_model_version(f"{NAME}-history", "2"))
    with pytest.raises(RegistryError, match="entry 2 of raced-history, just written, is gone"):
        promote(client, "2", first)
    assert moves.settle(local, NAME) == first
    assert aliases(local) == {"champion": "1"}


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_A_STEP_S", 0.2)


class Killed(BaseException):
    """Nobody catches it."""


class Dying:
    """A client whose process ends behind its n-th request that writes."""

    def __init__(self, client: Any, writes: int) -> None:
        self._client, self._left = client, writes

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if not name.startswith(("create_", "set_", "delete_")):
            return call

        def dying(*given: Any, **named: Any) -> Any:
            result = call(*given, **named)
            self._left -= 1
            if not self._left:
                self._at_the_step()
            return result

        return dying

    def _at_the_step(self) -> None:
        raise Killed


# The entry, its first mark, the alias champion, the alias previous, the version's tag, its mark.
STEPS = range(1, 7)
BEGUN, LAST = 2, 6


@pytest.mark.fault("R04")
@pytest.mark.parametrize("step", STEPS)
def test_a_move_that_is_killed_behind_any_step_is_finished_by_the_next(
    local: Any, step: int
) -> None:
    """But for the step between whose mark and the alias nobody can tell it from a hand's."""
    first = promote(local, "1", None)
    with pytest.raises(Killed):
        promote(Dying(local, step), "2", first)
    before = aliases(local)["champion"]
    assert before == ("1" if step <= BEGUN else "2")
    assert moves.history(local, NAME)[-1].champion == ("2" if step == LAST else "1")
    last = moves.settle(local, NAME)
    if step == BEGUN:
        assert last == first and aliases(local) == {"champion": "1"}
        assert kinds(local) == [("promotion", "1")]
        return
    assert last is not None and (last.champion, last.took_effect) == ("2", True)
    assert aliases(local) == {"champion": "2", "previous": "1"}
    assert kinds(local) == [("promotion", "1"), ("promotion", "2")]
    assert moves.settle(local, NAME) == last
    tag = local.get_model_version(NAME, "2").tags["tlpipe.move.2"]
    assert tag.startswith("promotion, ")


@pytest.mark.fault("R04", "R14")
@pytest.mark.parametrize("step", STEPS)
def test_a_hand_behind_a_killed_move_is_not_undone(local: Any, step: int) -> None:
    first = promote(local, "1", None)
    with pytest.raises(Killed):
        promote(Dying(local, step), "2", first)
    local.set_registered_model_alias(NAME, "champion", "3")
    last = moves.settle(local, NAME)
    assert last is not None and (last.champion, last.kind) == ("3", moves.BY_HAND)
    assert aliases(local)["champion"] == "3"


@pytest.mark.fault("R32")
@pytest.mark.parametrize("step", STEPS[BEGUN:])
def test_a_hand_that_takes_a_killed_move_back_is_not_undone(local: Any, step: int) -> None:
    first = promote(local, "1", None)
    with pytest.raises(Killed):
        promote(Dying(local, step), "2", first)
    local.set_registered_model_alias(NAME, "champion", "1")
    for _ in range(2):
        last = moves.settle(local, NAME)
        assert last is not None and last.champion == "1"
        assert aliases(local)["champion"] == "1"
    third = promote(local, "3", last)
    assert moves.settle(local, NAME) == third


@pytest.mark.fault("R04")
@pytest.mark.parametrize("step", STEPS)
def test_somebody_who_finishes_late_does_not_undo_what_came_after(local: Any, step: int) -> None:
    """One has seen a killed move; another finishes it and moves on; then the first goes on."""
    first = promote(local, "1", None)
    with pytest.raises(Killed):
        promote(Dying(local, step), "2", first)
    killed = moves.tail(local, NAME)
    assert killed is not None
    third = promote(local, "3", moves.settle(local, NAME))
    moves._finish(local, NAME, killed)
    assert aliases(local) == {"champion": "3", "previous": "1" if step == BEGUN else "2"}
    assert moves.settle(local, NAME) == third


class Pausing(Dying):
    """A client behind whose n-th request that writes somebody else does something."""

    def __init__(self, client: Any, writes: int, between: Callable[[], object]) -> None:
        super().__init__(client, writes)
        self._between = between

    def _at_the_step(self) -> None:
        self._between()


def roll_back(client: Any) -> None:
    last = moves.settle(client, NAME)
    promote(client, "1", last, moves.ROLLBACK)


# What somebody else does meanwhile, which version is in production at the end, and behind which
# steps of a promotion the promoter is told that nothing came of it.
OTHERS: dict[str, tuple[Callable[[Any], object], str, set[int]]] = {
    "promotes": (lambda client: promote(client, "3", moves.settle(client, NAME)), "3", {0, BEGUN}),
    "rolls back": (roll_back, "1", {0, BEGUN}),
    # Whoever settles takes a promotion that stands still between mark and alias for killed.
    "settles": (lambda client: moves.settle(client, NAME), "2", {BEGUN}),
    "moves by hand": (
        lambda client: client.set_registered_model_alias(NAME, "champion", "3"),
        "3",
        {0, 1, BEGUN},
    ),
    "moves by hand, and another settles": (
        lambda client: (
            client.set_registered_model_alias(NAME, "champion", "3"),
            moves.settle(client, NAME),
        ),
        "3",
        {0, 1, BEGUN},
    ),
    "takes it out by hand": (
        lambda client: client.delete_registered_model_alias(NAME, "champion"),
        "",
        {0, 1, BEGUN},
    ),
}


@pytest.mark.fault("R03", "R14")
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("step", [0, *STEPS])
def test_where_the_steps_of_two_mix_the_later_one_stands_and_all_is_written_down(
    local: Any, step: int, other: str
) -> None:
    first = promote(local, "1", None)
    act, expected, told = OTHERS[other]
    client = Pausing(local, step, partial(act, local))
    if step == 0:  # between the look at the last move and the first write
        act(local)
    with pytest.raises(RegistryError, match="since") if step in told else nullcontext():
        promote(client, "2", first)
    last = moves.settle(local, NAME)
    assert last is not None and last.took_effect
    if other == "settles" and step == BEGUN:
        expected = "1"
    assert (aliases(local).get("champion", ""), last.champion) == (expected, expected)
    log = moves.history(local, NAME)
    if "settles" not in other or step not in (1, BEGUN):  # else that before was never in it
        assert [move.previous for move in log[1:]] == [move.champion for move in log[:-1]]
    assert log[-1] == last == moves.tail(local, NAME)


@pytest.mark.fault("R17")
def test_a_version_whose_digest_was_changed_does_not_go_into_production(local: Any) -> None:
    for version in ("1", "2"):
        local.set_model_version_tag(NAME, version, "tlpipe.bundle", version * 64)
    first = promote(local, "1", None)
    with pytest.raises(Killed):
        promote(Dying(local, 1), "2", first)
    local.set_model_version_tag(NAME, "2", "tlpipe.bundle", "f" * 64)
    with pytest.raises(RegistryError, match=r"version 2 has the bundle f{16}; .* has 2{16}\."):
        moves.settle(local, NAME)
    assert aliases(local) == {"champion": "1"}
    assert moves.settle(local, NAME) == first


class Slow:
    """A client that stands still before it sets an alias, while somebody else does something."""

    def __init__(self, client: Any, meanwhile: Callable[[], object]) -> None:
        self._client, self._meanwhile, self._stood_still = client, meanwhile, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        if alias == "champion" and not self._stood_still:
            self._stood_still = True
            self._meanwhile()
        self._client.set_registered_model_alias(name, alias, version)


@pytest.mark.fault("R34")
@pytest.mark.parametrize(
    ("other", "is_first"),
    [
        ("settles", False),
        ("promotes", False),
        ("rolls back", False),
        ("settles", True),
        ("promotes", True),
    ],
)
def test_who_stood_still_before_the_alias_gives_it_back(
    local: Any, other: str, is_first: bool
) -> None:
    """Whoever came meanwhile took the promotion for killed, and may have moved on."""
    first = None if is_first else promote(local, "1", None)
    seen_by_others: list[moves.Move | None] = []

    def meanwhile() -> None:
        last = moves.settle(local, NAME)
        if other == "promotes":
            last = promote(local, "3", last)
        elif other == "rolls back":
            third = promote(local, "3", last)
            last = promote(local, "1", third, moves.ROLLBACK)
        seen_by_others.append(last)

    with pytest.raises(RegistryError, match="took this command for killed"):
        promote(Slow(local, meanwhile), "2", first)
    (last,) = seen_by_others
    assert aliases(local).get("champion") == (last.champion if last else None)
    assert moves.settle(local, NAME) == last
    assert "2" not in {champion for _, champion in kinds(local)}


def test_a_version_that_is_deleted_before_its_alias_is_not_said_to_be_in_production(
    local: Any,
) -> None:
    first = promote(local, "1", None)
    client = Pausing(local, 1, lambda: local.delete_model_version(NAME, "2"))
    with pytest.raises(RegistryError, match="version 2 was not put in production"):
        promote(client, "2", first)
    assert moves.settle(local, NAME) == first


@pytest.mark.fault("R34")
def test_who_is_between_two_steps_is_waited_for(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = promote(local, "1", None)
    with pytest.raises(Killed):
        promote(Dying(local, BEGUN), "2", first)
    begun = moves.tail(local, NAME)
    assert begun is not None
    # It was not killed, it is slow: it goes on while the other one waits.
    monkeypatch.setattr(
        "tlpipe.registry.moves.time.sleep", lambda _: moves._finish(local, NAME, begun)
    )
    last = moves.settle(local, NAME)
    assert last is not None and (last.champion, last.took_effect) == ("2", True)
    assert aliases(local) == {"champion": "2", "previous": "1"}


def test_entries_that_search_gives_without_their_tags_count(local: Any) -> None:
    """MLflow asks for tags after versions; what was pushed off the page meanwhile has none."""

    class Untagged:
        def __getattr__(self, name: str) -> Any:
            return getattr(local, name)

        def search_model_versions(self, *given: Any, **named: Any) -> Any:
            page = local.search_model_versions(*given, **named)
            for version in page:
                version._tags = {}
            return page

    promote(local, "2", promote(local, "1", None))
    client: Any = Untagged()
    assert moves.history(client, NAME) == moves.history(local, NAME) != []


@pytest.mark.fault("R16")
def test_a_history_that_is_deleted_before_a_move_is_written_is_told(local: Any) -> None:
    first = promote(local, "1", None)
    local.delete_registered_model(f"{NAME}-history")
    with pytest.raises(RegistryError, match="run the same command again"):
        promote(local, "2", first)
    assert aliases(local)["champion"] == "1"
    promote(local, "2", moves.settle(local, NAME))
    assert aliases(local) == {"champion": "2", "previous": "1"}


@pytest.mark.fault("R34")
def test_what_a_hand_may_have_taken_back_is_remembered(local: Any) -> None:
    for version in ("1", "2"):
        local.set_model_version_tag(NAME, version, "tlpipe.bundle", version * 64)
    first = promote(local, "1", None)
    with pytest.raises(RegistryError, match="has put raced version 1 in production"):
        promote(local, "3", None)  # who lost a race has lost nothing but that
    with pytest.raises(Killed):
        promote(Dying(local, 3), "2", first)
    local.set_registered_model_alias(NAME, "champion", "1")
    moves.settle(local, NAME)
    assert [(m.champion, m.bundle) for m in moves.taken_back(local, NAME)] == [("2", "2" * 64)]
    assert kinds(local) == [("promotion", "1")]


@pytest.mark.fault("R17")
def test_a_version_that_is_no_longer_what_was_in_production_neither_serves_nor_comes_back(
    local: Any,
) -> None:
    for version in ("1", "2"):
        local.set_model_version_tag(NAME, version, "tlpipe.bundle", version * 64)
    promote(local, "2", promote(local, "1", None))
    for version in ("1", "2"):
        local.set_model_version_tag(NAME, version, "tlpipe.bundle", "f" * 64)
        expected = rf"version {version} is not what was put in production: .* expected {version}"
        with pytest.raises(RegistryError, match=expected):
            tracking.check_promoted(local, local.get_model_version(NAME, version))
    with pytest.raises(RegistryError, match="version 1 is not what was put in production"):
        promotion.rollback(local, NAME, None, "worse")
    with pytest.raises(RegistryError, match="version 2 is not what was put in production"):
        tracking.fetch(local, NAME, "champion")
    assert aliases(local)["champion"] == "2"


def test_a_challenger_never_moves_back(local: Any) -> None:
    for version, expected in (("2", "2"), ("1", "2"), ("3", "3")):
        tracking.challenge(local, NAME, version)
        assert aliases(local) == {"challenger": expected}


@pytest.mark.fault("R31")
def test_promote_moves_what_the_gate_decided_about(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate takes minutes; the version's tag changes meanwhile."""
    local.set_model_version_tag(NAME, "2", "tlpipe.bundle", "2" * 64)
    decision = gate.Decision("2", None, (), {})

    def decide(*_: object, **__: object) -> gate.Decision:
        local.set_model_version_tag(NAME, "2", "tlpipe.bundle", "f" * 64)
        return decision

    monkeypatch.setattr(gate, "decide", decide)
    monkeypatch.setattr(promotion, "of_version", lambda *_: None)
    monkeypatch.setattr(promotion, "_record", lambda *_: None)
    monkeypatch.setattr(tracking, "bundle_of", lambda *_: None)
    given: dict[str, Any] = {"source": None, "bounds": None}
    measured: Any = SimpleNamespace(check=lambda _: None)
    with pytest.raises(RegistryError, match=r"has the bundle f{16}; .* has 2{16}"):
        promotion.promote(local, NAME, "2", measured=measured, **given)
    assert aliases(local) == {}


@pytest.mark.fault("R31")
@pytest.mark.parametrize("is_version", [True, False])
def test_what_the_gate_has_seen_is_what_is_moved(local: Any, is_version: bool) -> None:
    """A version gets another bundle, or its model is made again, while the gate decides."""
    for version in ("1", "2", "3"):
        local.set_model_version_tag(NAME, version, "tlpipe.bundle", version * 64)
    first = promote(local, "1", None)
    decided = seen(local, "3")
    if is_version:
        expected = "version 3 has the bundle ffffffffffffffff; .* has 3{16}"
    else:
        local.delete_registered_model(NAME)
        with_versions(local)
        expected = "raced was deleted in MLflow and made again since version 3 was looked at"
    local.set_model_version_tag(NAME, "3", "tlpipe.bundle", "f" * 64)
    with pytest.raises(RegistryError, match=expected):
        moves.move(local, NAME, decided, after=first, kind=moves.PROMOTION, why="")
    assert aliases(local) == ({"champion": "1"} if is_version else {})
    last = moves.settle(local, NAME)
    assert last == (first if is_version else None)


@pytest.mark.fault("R16")
def test_a_model_that_was_renamed_says_where_its_history_is(local: Any) -> None:
    first = promote(local, "1", None)
    local.rename_registered_model(NAME, "other")
    with pytest.raises(RegistryError, match=r"other was called raced before: .* in raced-history"):
        moves.settle(local, "other")
    local.rename_registered_model(f"{NAME}-history", "other-history")
    assert moves.settle(local, "other") == first


@pytest.mark.fault("R16")
def test_a_deleted_history_leaves_the_champion_where_it_is(local: Any) -> None:
    promote(local, "2", promote(local, "1", None))
    local.delete_registered_model(f"{NAME}-history")
    moves.settle(local, NAME)
    assert aliases(local)["champion"] == "2"
    assert kinds(local) == [("adoption", "2")]
    kept = {tag for tag in local.get_model_version(NAME, "2").tags if "move" in tag}
    assert kept == {"tlpipe.move.1", "tlpipe.move.2"}


@pytest.mark.parametrize(
    ("log", "steps"),
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
def test_rollbacks_go_back_step_by_step(log: str, steps: str) -> None:
    found = []
    for number, word in enumerate(log.split(), start=1):
        back, _, version = word.rpartition(":")
        kind = moves.ROLLBACK if back else moves.PROMOTION
        now = datetime.now(UTC)
        found.append(moves.Move(number, number - 1, version, "", kind, "", "", now, str(number)))
    assert moves.standing(found) == steps.split()


STEPWISE: list[tuple[Callable[..., None], Iterable[int], tuple[str, ...]]] = [
    (test_a_move_that_is_killed_behind_any_step_is_finished_by_the_next, STEPS, ()),
    (test_a_hand_behind_a_killed_move_is_not_undone, STEPS, ()),
    (test_a_hand_that_takes_a_killed_move_back_is_not_undone, STEPS[BEGUN:], ()),
    (test_somebody_who_finishes_late_does_not_undo_what_came_after, STEPS, ()),
    *(
        (
            test_where_the_steps_of_two_mix_the_later_one_stands_and_all_is_written_down,
            [0, *STEPS],
            (other,),
        )
        for other in OTHERS
    ),
]


@pytest.mark.slow
@pytest.mark.fault("R03", "R04", "R14")
def test_step_by_step_it_is_the_same_on_postgresql_behind_four_workers(tmp_path: Path) -> None:
    import mlflow

    with (
        postgres(tmp_path / "postgres") as database,
        mlflow_server(tmp_path, database, workers=4) as found,
    ):
        client = mlflow.MlflowClient(found)
        for check, steps, more in STEPWISE:
            for step in steps:
                check(with_versions(client), step, *more)
                for model in client.search_registered_models():
                    client.delete_registered_model(model.name)
