"""Which version is in production: a log of moves, to which several may try to add at once.

MLflow's aliases are last-write-wins: two who promote at the same time would both succeed, and the
second would not know. What MLflow does do atomically is to give every new model version the next
number. So the log is a registered model of its own, ``NAME-history``: each of its versions is a
move, and says which move it ``follows``. Of all moves that follow the same one, the first counts;
whoever wrote another is told who won.

A move is written in steps: its entry, a mark that it began, the aliases ``champion`` and
``previous``, and a mark that it took effect. A move without the last mark was killed on the way. It
is finished by whoever finds the alias where the move puts it, or not begun. Begun and with the
alias as before, it was killed just there or taken back by hand: it is written off, since a hand
must not be undone. Any other alias that differs from the log was set by hand, and is written down
as a move of that kind: nobody sets it back.

Entries carry the digest of the bundle and when the registered model was created, both as whoever
chose the version has seen them. Those of a model that was deleted and made again under its name
count for nothing.
"""

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile
from typing import TYPE_CHECKING
from uuid import uuid4

from tlpipe.errors import RegistryError
from tlpipe.registry import SUFFIX, local
from tlpipe.versioning import user

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_log = logging.getLogger(__name__)
CHAMPION, PREVIOUS = "champion", "previous"
PROMOTION, ROLLBACK, ADOPTION = "promotion", "rollback", "adoption"
BY_HAND, DELETION = "by-hand", "deletion"
BUNDLE_TAG = "tlpipe.bundle"  # of a version: the digest of its bundle
LONGEST = 5000  # characters of a version's description that MLflow keeps
_TAG = "tlpipe.move."
_BEGAN, _TOOK_EFFECT, _LOST = (_TAG + mark for mark in ("began", "took_effect", "lost"))
_BORN = "tlpipe.born"  # of a log: when the model it is of was created
_PAGE = 16
_TRIES = 20
_A_STEP_S = 10.0  # so long somebody may take from one step of a move to the next


class Overtaken(RegistryError):  # noqa: N818  as it reads
    """Somebody else has moved meanwhile."""


@dataclass(frozen=True)
class Seen:
    """A version as somebody has looked at it.

    Attributes:
        version: its number; empty for none.
        bundle: digest of its bundle; empty where tlpipe has not registered it.
        born: when its model was created, which another one of the name was not.
    """

    version: str
    bundle: str
    born: str


@dataclass(frozen=True)
class Move:
    """``champion`` was put in production and ``previous`` (empty: none) before it was.

    Attributes:
        number: counts the log's entries.
        follows: the number of the move before it that counts, 0 for none.
        champion: number of a version; empty where somebody took it out by hand or deleted it.
        previous: that of the version before it, or empty.
        kind: ``PROMOTION``, ``ROLLBACK``, ``ADOPTION``, ``BY_HAND`` or ``DELETION``.
        why: for those who read the history.
        by: who moved, or found what was moved by hand.
        at: when, by the server's clock, UTC.
        token: tells who wrote it: a request whose answer is lost may have been repeated.
        bundle: digest of the champion's bundle; empty where tlpipe has not registered it.
        took_effect: whether the aliases were set.
        began: whether somebody was about to set them.
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
    bundle: str = ""
    took_effect: bool = True
    began: bool = field(default=True, compare=False)


def tail(client: "MlflowClient", name: str) -> Move | None:
    """Return the last move that counts, or None before the first; it may not have taken effect."""
    waiting: list[Move] = []
    for move in _newest_first(client, name):
        if move.took_effect:
            return _end_of_chain(move, waiting)
        waiting.append(move)
    return _end_of_chain(None, waiting)


def _end_of_chain(last: Move | None, waiting: Sequence[Move]) -> Move | None:
    """Return the last of the moves that follow one another; of several the first counts."""
    for move in reversed(waiting):
        if move.follows == (last.number if last else 0):
            last = move
    return last


def history(client: "MlflowClient", name: str) -> list[Move]:
    """Return every move that took effect, the oldest first; write nothing."""
    found = {move.number: move for move in _newest_first(client, name) if move.took_effect}
    return [found[number] for number in sorted(found)]


def of_deleted(client: "MlflowClient", name: str) -> int:
    """Return how many moves are kept of models that had this name before, and were deleted."""
    born, count, token = _born(client, name), 0, None
    while True:
        page = client.search_model_versions(
            f"name = '{name}{SUFFIX}'", max_results=_PAGE, page_token=token
        )
        count += sum(v.tags.get(f"{_TAG}born", born) != born for v in page if v.tags)
        if not (token := page.token):
            return count


def last_to(client: "MlflowClient", name: str, version: str) -> Move | None:
    """Return the last move that put a version in production; no more is read than it takes."""
    last = tail(client, name)
    if last is not None and last.champion == version:
        return last
    moves = _newest_first(client, name)
    return next((move for move in moves if move.took_effect and move.champion == version), None)


def taken_back(client: "MlflowClient", name: str) -> list[Move]:
    """Return the moves that began and count for nothing: a hand has undone them, or may have."""
    return [move for move in _newest_first(client, name, lost=True) if move.began]


def during(moves: list[Move], begin: datetime, end: datetime) -> list[Move]:
    """Return the moves whose champion was in production at some time from begin to end."""
    earlier = [move for move in moves if move.at <= begin]
    return earlier[-1:] + [move for move in moves if begin < move.at <= end]


def standing(moves: list[Move]) -> list[str]:
    """Return the versions that one rollback after the other passes, the champion last.

    A rollback, also one by hand, takes back the moves since its version was promoted, as one undoes
    steps.
    """
    steps: list[str] = []
    for move in moves:
        if move.champion in steps and move.kind in (ROLLBACK, BY_HAND):
            while steps[-1] != move.champion:
                steps.pop()
        elif move.champion:
            steps.append(move.champion)
    return steps


def was_deleted(moves: list[Move], there: Collection[int]) -> bool:
    """Return whether no alias names a champion because its version was deleted.

    Where it is there still, somebody took the alias away: then nothing is in production.

    ``there``: the numbers of the versions that there are.
    """
    steps = standing(moves)
    was_taken_away = bool(moves) and moves[-1].kind == BY_HAND and not moves[-1].champion
    return bool(steps) and int(steps[-1]) not in there and not was_taken_away


def stand_ins(moves: list[Move], there: Collection[int]) -> list[str]:
    """Return which versions may answer where the champion cannot, the best one first.

    First those that nobody has rolled back.
    """
    known = (*reversed(standing(moves)), *(move.champion for move in reversed(moves)))
    return list(dict.fromkeys(number for number in known if number and int(number) in there))


def seen(client: "MlflowClient", name: str, version: "ModelVersion | None") -> Seen:
    """Return what a move to a version, or to none, is to be held to."""
    born = _born(client, name)
    if version is None:
        return Seen("", "", born)
    return Seen(str(version.version), version.tags.get(BUNDLE_TAG, ""), born)


def move(
    client: "MlflowClient", name: str, to: Seen, *, after: Move | None, kind: str, why: str
) -> Move:
    """Put a version in production, if ``after`` is still the last move; set the aliases.

    Raises:
        Overtaken: somebody else has moved since.
        RegistryError: the version is no longer what was looked at.
    """
    token, number = _append(client, name, to, after=after, kind=kind, why=why)
    follows = after.number if after else 0
    later = takewhile(lambda move: move.number > follows, _newest_first(client, name))
    raced = [move for move in later if move.follows == follows]
    if not raced:
        raise Overtaken(
            f"entry {number} of {name + SUFFIX}, just written, is gone: somebody deletes from it "
            f"in MLflow. Version {to.version} was not put in production; run the same command "
            f"again."
        )
    winner = min(raced, key=lambda move: move.number)
    if winner.token != token:
        _write_off(client, name, number, str(winner.number))
        raise Overtaken(
            f"{winner.by} has put {name} version {winner.champion} in production "
            f"({winner.kind}, {winner.at:%Y-%m-%d %H:%M:%S} UTC) since version "
            f"{after.champion if after else 'none'} was looked at; version {to.version} was not. "
            f"Compare it with the new one: run the same command again."
        )
    if not _finish(client, name, winner):
        raise Overtaken(
            f"somebody has set or taken away the alias {CHAMPION} of {name} in MLflow since "
            f"version {after.champion if after else 'none'} was looked at, or took this command "
            f"for killed; version {to.version} was not put in production. Compare it with what is: "
            f"run the same command again."
        )
    return replace(winner, took_effect=True)


def settle(client: "MlflowClient", name: str) -> Move | None:
    """Finish a move that was killed, write down what was moved by hand; return the last move.

    Raises:
        RegistryError: the model was renamed without its history, or what was promoted is not what
            the registry holds.
    """
    doubted = None
    for _ in range(_TRIES):
        last = tail(client, name)
        # Read after the log: an alias that somebody has moved since has an entry that comes first.
        champion = champion_alias(client, name)
        if last is None:
            if not champion:
                return None
            check_name(client, name)
            kind, why = ADOPTION, "it was in production before there was a history"
        elif last.took_effect and champion == last.champion:
            return last
        elif not last.took_effect and champion in (last.champion, last.previous):
            if champion == last.champion or not last.began:
                _finish(client, name, last)
            elif doubted != last:  # somebody may be between the two steps just now
                doubted = last
                time.sleep(_A_STEP_S)
            else:
                why = f"stopped, or version {champion or 'none'} was put back by hand"
                _log.warning("the %s of %s version %s: %s", last.kind, name, last.champion, why)
                _write_off(client, name, str(last.number), why)
            continue
        else:
            kind = BY_HAND
            why = f"the alias {CHAMPION} was {'set' if champion else 'taken away'} in MLflow"
            if not champion and last.champion and _version(client, name, last.champion) is None:
                kind, why = DELETION, f"version {last.champion} was deleted in MLflow"
        to = seen(client, name, _version(client, name, champion) if champion else None)
        with suppress(Overtaken):  # others have written it down first
            return move(client, name, to, after=last, kind=kind, why=why)
    raise RegistryError(f"others move {name} all the time; try again.")


def champion_alias(client: "MlflowClient", name: str) -> str:
    """Return the version that the alias names now, or an empty string."""
    return str(client.get_registered_model(name).aliases.get(CHAMPION, ""))


def check_name(client: "MlflowClient", name: str) -> str:
    """Return what is to be said of a model or a log that somebody deleted, or nothing.

    Raises:
        RegistryError: one of both was renamed, and the other was not.
    """
    model, log = _registered(client, name), _registered(client, name + SUFFIX)
    if log is None:
        if model is None:
            return ""
        for other in client.search_registered_models(f"tags.`{_BORN}` = '{_born(client, name)}'"):
            raise RegistryError(
                f"{name} was called {other.name.removesuffix(SUFFIX)} before: what was in "
                f"production stands in {other.name}. "
                f"{_rename(client, other.name, name + SUFFIX)}"
            )
        champion = model.aliases.get(CHAMPION)
        version = _version(client, name, champion) if champion else None
        if version is None or not any(tag.startswith(_TAG) for tag in version.tags):
            return ""
        return (
            f"{name + SUFFIX} was deleted in MLflow: version {champion} of {name} stays in "
            f"production; what was before it stands in tags of the versions."
        )
    born = log.tags.get(_BORN)
    if born is None or (model is not None and str(model.creation_timestamp) == born):
        return ""
    for other in _all_registered(client):
        if str(other.creation_timestamp) == born:
            back = "" if model else f"Set register.name: {other.name} in params.yaml. "
            raise RegistryError(
                f"the model of {log.name} is called {other.name} in MLflow now. {back}"
                f"{_rename(client, log.name, other.name + SUFFIX)}"
            )
    again = f", and made again {_at(model.creation_timestamp)}" if model else ""
    return (
        f"the model {name} was deleted in MLflow{again}: what {log.name} keeps of before counts "
        f"for nothing, and the next version is compared with none of it. {local.REGISTER}"
    )


def _registered(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    found = client.search_registered_models(f"name = '{name}'")
    return found[0] if found else None


def _all_registered(client: "MlflowClient") -> Iterator["RegisteredModel"]:
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        if not (token := page.token):
            return


def _rename(client: "MlflowClient", old: str, new: str) -> str:
    """Say how to rename a registered model."""
    call = f"import mlflow; mlflow.MlflowClient().rename_registered_model({old!r}, {new!r})"
    return f"Rename that to {new}: '{local.command(client, 'python', '-c', call)}'."


def _at(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _finish(client: "MlflowClient", name: str, last: Move) -> bool:
    """Set the aliases as a move says, and mark that it took effect.

    False where somebody has moved the alias by hand since, or has written the move off, which
    counts for nothing then.

    Raises:
        RegistryError: the version holds another bundle than the one that was to be moved; the move
            counts for nothing then.
    """
    client.set_model_version_tag(name + SUFFIX, str(last.number), _BEGAN, "yes")
    if tail(client, name) != last:
        # Somebody has finished it meanwhile and may have moved on, or has written it off.
        entry = _version(client, name + SUFFIX, str(last.number))
        return entry is not None and _TOOK_EFFECT in entry.tags
    version = _version(client, name, last.champion) if last.champion else None
    if version is None and last.champion:
        _write_off(client, name, str(last.number), "the version was deleted")
        return False
    if version is not None and (found := version.tags.get(BUNDLE_TAG, "")) != last.bundle:
        _write_off(client, name, str(last.number), "another bundle")
        raise RegistryError(
            f"{name} version {last.champion} has the bundle {found[:16] or 'none'}; what was to go "
            f"into production has {last.bundle[:16] or 'none'}. Somebody changed the version's "
            f"tags; nothing was moved. Register what was built, and promote that."
        )
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get(CHAMPION, "")) not in (last.champion, last.previous):
        _write_off(client, name, str(last.number), "moved by hand")
        return False
    previous = _version(client, name, last.previous) if last.previous else None
    for alias, there in ((CHAMPION, version), (PREVIOUS, previous)):
        # Whoever deletes a version takes it out of production, whatever the log says.
        if there and str(aliases.get(alias)) != str(there.version):
            client.set_registered_model_alias(name, alias, str(there.version))
    entry = _version(client, name + SUFFIX, str(last.number))
    if entry is None or _LOST in entry.tags:
        _give_back(client, name, last, tail(client, name))
        return False
    if version is not None:  # also where the log will be deleted
        text = f"{last.kind}, {last.at:%Y-%m-%d %H:%M:%S} UTC, by {last.by}: {last.why}"
        key = f"{_TAG}{last.number}"
        client.set_model_version_tag(name, last.champion, key, text[:LONGEST])
    client.set_model_version_tag(name + SUFFIX, str(last.number), _TOOK_EFFECT, "yes")
    return True


def _give_back(client: "MlflowClient", name: str, late: Move, now: Move | None) -> None:
    """Set the aliases as the last move says: another was written off while it set them."""
    if champion_alias(client, name) != late.champion:
        return
    given = ((CHAMPION, now.champion), (PREVIOUS, now.previous)) if now else ((CHAMPION, ""),)
    for alias, number in given:
        if number:
            client.set_registered_model_alias(name, alias, number)
        else:
            client.delete_registered_model_alias(name, alias)


def _write_off(client: "MlflowClient", name: str, number: str, why: str) -> None:
    """Let an entry count for nothing."""
    client.set_model_version_tag(name + SUFFIX, number, _LOST, why)


def _version(client: "MlflowClient", name: str, number: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _born(client: "MlflowClient", name: str) -> str:
    """Return when the registered model was created, which another one of its name was not."""
    return str(client.get_registered_model(name).creation_timestamp)


def _append(
    client: "MlflowClient", name: str, to: Seen, *, after: Move | None, kind: str, why: str
) -> tuple[str, str]:
    """Write an entry atomically; return its token and number.

    Raises:
        RegistryError: the model was made again since the version was looked at.
    """
    from mlflow.exceptions import MlflowException

    if _born(client, name) != to.born:
        raise RegistryError(
            f"the model {name} was deleted in MLflow and made again since version "
            f"{to.version or 'none'} was looked at; nothing was moved. {local.REGISTER}"
        )
    champion, previous = to.version, after.champion if after else ""
    parts = {
        "follows": str(after.number if after else 0),
        "champion": champion,
        "previous": previous,
        "kind": kind,
        "why": why,
        "by": user(),
        "token": uuid4().hex,
        "bundle": to.bundle,
        "born": to.born,
    }
    if after is None:
        _create_log(client, name, to.born)
    for attempt in range(_TRIES):
        try:
            entry = client.create_model_version(
                name + SUFFIX,
                # MLflow looks up what it names, and a version that was deleted is not there.
                source=f"models:/{name}/{champion}" if champion else "tlpipe:/none",
                tags={_TAG + key: value for key, value in parts.items()},
                description=f"{kind}: version {previous or 'none'} -> {champion or 'none'}. {why}"[
                    :LONGEST
                ],
                await_creation_for=0,
            )
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                _create_log(client, name, to.born)
            # Others took the number meanwhile.
            elif attempt + 1 == _TRIES or "Giving up after" not in str(error):
                raise
            else:
                time.sleep(0.05 * (attempt + 1))
            continue
        return parts["token"], str(entry.version)
    raise RegistryError(f"others write to {name + SUFFIX} all the time; try again.")


def _create_log(client: "MlflowClient", name: str, born: str) -> None:
    """Make the log of a model, or let one that is there be of this model, too."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name + SUFFIX,
            tags={_BORN: born},
            description=f"What was in production of {name}, and when.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.set_registered_model_tag(name + SUFFIX, _BORN, born)


def _newest_first(client: "MlflowClient", name: str, *, lost: bool = False) -> Iterator[Move]:
    """Yield the entries of this model; one may come twice where others are written meanwhile.

    Those that count for nothing are left out, or are what is yielded (``lost``); those of another
    model that had the name before are left out.
    """
    from mlflow.exceptions import MlflowException

    try:
        born = _born(client, name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return
    token = None
    while True:
        page = client.search_model_versions(
            f"name = '{name}{SUFFIX}'",
            max_results=_PAGE,
            order_by=["version_number DESC"],
            page_token=token,
        )
        yield from (move for version in page if (move := _move(client, version, born, lost)))
        if not (token := page.token):
            return


def _move(client: "MlflowClient", version: "ModelVersion", born: str, lost: bool) -> Move | None:
    """Return the move that an entry is; None for one that is not asked for."""
    if not version.tags:
        # MLflow asks for tags after versions: what others pushed off the page meanwhile has none.
        version = client.get_model_version(version.name, version.version)
    tags = {key.removeprefix(_TAG): value for key, value in version.tags.items()}
    if tags.get("born") != born or (_LOST in version.tags) != lost:
        return None
    return Move(
        number=int(version.version),
        follows=int(tags["follows"]),
        champion=tags["champion"],
        previous=tags["previous"],
        kind=tags["kind"],
        why=tags["why"],
        by=tags["by"],
        at=_at(version.creation_timestamp),
        token=tags["token"],
        bundle=tags["bundle"],
        took_effect=_TOOK_EFFECT in version.tags,
        began=_BEGAN in version.tags,
    )
