"""Which version is in production: a log of moves, to which several may try to add at once.

MLflow's aliases are last-write-wins: two who promote at the same time would both succeed, and the
second would not know. What MLflow does do atomically is to give every new model version the next
number. So the log is a registered model of its own, ``NAME-history``: each of its versions is a
move, and says which move it ``follows``. Of all moves that follow the same one, the first counts;
whoever wrote another is told who won. The aliases ``champion`` and ``previous`` are what the log
says, for those who look with MLflow alone; whoever finds them otherwise, after a kill between two
writes, sets them right.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import TYPE_CHECKING
from uuid import uuid4

from tlpipe.errors import RegistryError
from tlpipe.lineage import user

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
PROMOTION, ROLLBACK, ADOPTION = "promotion", "rollback", "adoption"
SUFFIX = "-history"
LONGEST = 5000  # characters of a version's description that MLflow keeps
_TAG = "tlpipe.move."
_PAGE = 16
_TRIES = 20


@dataclass(frozen=True)
class Move:
    """``champion`` was put in production and ``previous`` (empty: none) before it was.

    ``number`` counts the log's entries, ``follows`` is the move before it that counts, 0 for none.
    ``token`` tells who wrote it: a request whose answer is lost may have been repeated.
    """

    number: int
    follows: int
    champion: str
    previous: str
    kind: str
    why: str
    by: str
    at: datetime
    token: str


def tail(client: "MlflowClient", name: str) -> Move | None:
    """Return the last move that counts, or None before the first."""
    last, newest = None, -1
    for move in _newest_first(client, name):
        if move.number <= newest:  # only later ones can follow it
            break
        if move.follows >= newest:
            last, newest = move, move.follows
    return last


def history(client: "MlflowClient", name: str) -> list[Move]:
    """Return every move that counts, the oldest first."""
    found: dict[int, Move] = {}
    for move in _newest_first(client, name):
        found[move.follows] = move
    return sorted(found.values(), key=lambda move: move.number)


def during(moves: list[Move], begin: datetime, end: datetime) -> list[Move]:
    """Return the moves whose champion was in production at some time from begin to end."""
    earlier = [move for move in moves if move.at <= begin]
    return earlier[-1:] + [move for move in moves if begin < move.at <= end]


def standing(moves: list[Move]) -> list[str]:
    """Return the versions that one rollback after the other passes, the champion last.

    A rollback takes back the moves since its version was promoted, as one undoes steps.
    """
    steps: list[str] = []
    for move in moves:
        if move.champion in steps and move.kind == ROLLBACK:
            while steps[-1] != move.champion:
                steps.pop()
        else:
            steps.append(move.champion)
    return steps


def move(
    client: "MlflowClient", name: str, champion: str, *, after: Move | None, kind: str, why: str
) -> Move:
    """Put a version in production, if ``after`` is still the last move; set the aliases.

    Raises:
        RegistryError: somebody else has moved since.
    """
    token = _append(client, name, champion, after=after, kind=kind, why=why)
    follows = after.number if after else 0
    later = takewhile(lambda move: move.number > follows, _newest_first(client, name))
    *_, winner = (move for move in later if move.follows == follows)
    if winner.token != token:
        raise RegistryError(
            f"{winner.by} has put {name} version {winner.champion} in production "
            f"({winner.kind}, {winner.at:%Y-%m-%d %H:%M:%S} UTC) since version "
            f"{after.champion if after else 'none'} was looked at; version {champion} was not. "
            f"Compare it with the new one: run the same command again."
        )
    settle(client, name)
    return winner


def settle(client: "MlflowClient", name: str) -> Move | None:
    """Make the aliases what the log says; return its last move."""
    last = tail(client, name)
    while last is not None:
        aliases = client.get_registered_model(name).aliases
        wanted = {CHAMPION: last.champion, PREVIOUS: last.previous}
        for alias, version in wanted.items():
            if version and str(aliases.get(alias)) != version:
                _set_alias(client, name, alias, version)
        # Somebody may have moved on, and have set them before we did.
        newer = tail(client, name)
        if newer == last:
            break
        last = newer
    return last


def _set_alias(client: "MlflowClient", name: str, alias: str, version: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        # Whoever deleted the version took it out of production, whatever the log says.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _append(
    client: "MlflowClient", name: str, champion: str, *, after: Move | None, kind: str, why: str
) -> str:
    """Write an entry, whole or not at all; return its token."""
    from mlflow.exceptions import MlflowException

    previous = after.champion if after else ""
    parts = {
        "follows": str(after.number if after else 0),
        "champion": champion,
        "previous": previous,
        "kind": kind,
        "why": why,
        "by": user(),
        "token": uuid4().hex,
    }
    for attempt in range(_TRIES):
        try:
            client.create_model_version(
                name + SUFFIX,
                source=f"models:/{name}/{champion}",
                tags={_TAG + key: value for key, value in parts.items()},
                description=f"{kind}: version {previous or 'none'} -> {champion}. {why}"[:LONGEST],
                await_creation_for=0,
            )
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                _create_log(client, name)
            # Others took the number meanwhile.
            elif attempt + 1 == _TRIES or "Giving up after" not in str(error):
                raise
            else:
                time.sleep(0.05 * (attempt + 1))
            continue
        return parts["token"]
    raise RegistryError(f"others write to {name + SUFFIX} all the time; try again.")


def _create_log(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    client.get_registered_model(name)  # there is no log of a model that does not exist
    try:
        client.create_registered_model(
            name + SUFFIX, description=f"What was in production of {name}, and when."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # somebody else was faster
            raise


def _newest_first(client: "MlflowClient", name: str) -> Iterator[Move]:
    """Yield the entries; one may come twice where others are written meanwhile."""
    token = None
    while True:
        page = client.search_model_versions(
            f"name = '{name}{SUFFIX}'",
            max_results=_PAGE,
            order_by=["version_number DESC"],
            page_token=token,
        )
        yield from (move for version in page if (move := _move(client, version)))
        if not (token := page.token):
            return


def _move(client: "MlflowClient", version: "ModelVersion") -> Move | None:
    """Return the move that an entry is; None for what somebody else has put there."""
    if not version.tags:
        # MLflow asks for tags after versions: what others pushed off the page meanwhile has none.
        version = client.get_model_version(version.name, version.version)
    tags = {key.removeprefix(_TAG): value for key, value in version.tags.items()}
    if not tags.keys() >= {"follows", "champion", "previous", "kind", "why", "by", "token"}:
        return None
    return Move(
        number=int(version.version),
        follows=int(tags["follows"]),
        champion=tags["champion"],
        previous=tags["previous"],
        kind=tags["kind"],
        why=tags["why"],
        by=tags["by"],
        at=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        token=tags["token"],
    )
