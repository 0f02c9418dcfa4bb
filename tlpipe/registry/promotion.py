"""Put versions in production and take them out again: ``promote``, ``rollback``, ``history``."""

import logging
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from typing import TYPE_CHECKING

from tlpipe import files, held_out
from tlpipe.data import ingest
from tlpipe.errors import ArtifactError, GateError, RegistryError
from tlpipe.export import signing
from tlpipe.export.bundle import Bundle
from tlpipe.lineage import user
from tlpipe.registry import gate, moves, publishing, tracking
from tlpipe.registry.gate import Bounds, Decision, Measured, Rival, Rule
from tlpipe.registry.moves import PROMOTION, ROLLBACK, Move

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_log = logging.getLogger(__name__)

_TAG = "tlpipe.gate"


def settle(client: "MlflowClient", name: str) -> Move | None:
    """Return the last move; finish one that was killed, write down what was moved by hand.

    Raises:
        RegistryError: there is no such model, or it was renamed without its history.
    """
    tracking.check_known(client, name)
    return moves.settle(client, name)


def history(client: "MlflowClient", name: str) -> tuple[list[Move], str]:
    """Return every move, the oldest first, and the version that is the champion now, or "".

    It writes nothing: the two differ where the alias was set by hand since the last move.

    Raises:
        RegistryError: there is no such model.
    """
    tracking.check_known(client, name)
    return moves.history(client, name), moves.champion_alias(client, name)


def promote(
    client: "MlflowClient",
    name: str,
    which: str,
    *,
    measured: Measured,
    source: ingest.Params,
    bounds: Bounds,
    force: str = "",
    show: Callable[[Decision], None] = lambda _: None,
) -> Move:
    """Compare a version, by its number or alias, with the champion, and put it in production.

    ``force``: why it is to go there although the gate fails, for the record. ``show`` gets the
    decision once it is made.

    Raises:
        GateError: a rule does not hold, or the two cannot be compared; nothing was moved.
        RegistryError: it is the champion already, somebody else was faster, or there is no such
            version.
    """
    version = tracking.find_version(client, name, which)
    seen = moves.seen(client, name, version)
    last = settle(client, name)
    if last is not None and last.champion == str(version.version):
        raise RegistryError(
            f"{name} version {version.version} is in production already, since "
            f"{last.at:%Y-%m-%d %H:%M:%S} UTC. Promote another one."
        )
    candidate = tracking.bundle_of(client, version)
    try:
        measured.check(candidate)
        decision = _judge(client, name, version, candidate, last, measured, source, bounds)
    except GateError as error:
        if not force:
            raise
        rules = (Rule("comparison", str(error), "both on the same images", "cannot tell"),)
        decision = Decision(str(version.version), last.champion if last else None, rules, {})
    _record(client, version, decision, force)
    show(decision)
    if decision.verdict != "holds" and not force:
        improvement = "Improve the model" if decision.verdict == "fails" else "Test on more images"
        raise GateError(
            f"{name} version {version.version} stays out of production: {decision.reasons}. "
            f"{improvement}, relax register.gate in params.yaml, or override with --force REASON."
        )
    why = force or _summary(decision)
    return moves.move(client, name, seen, after=last, kind=PROMOTION, why=why)


def rollback(client: "MlflowClient", name: str, which: str | None, why: str) -> Move:
    """Put back what was in production before, or a version that once was.

    One after the other, rollbacks go further back. A version that cannot serve is not put back.

    Raises:
        ArtifactError: its bundle is damaged.
        RegistryError: there is nothing to go back to, it is not what was in production, or somebody
            else was faster.
    """
    settle(client, name)
    log = moves.history(client, name)
    if not log:
        raise RegistryError(f"nothing of {name} is in production, so nothing can be rolled back.")
    last = log[-1]
    if which is None:
        steps = moves.standing(log)
        if len(steps) < 2:
            raise RegistryError(
                f"{name} version {last.champion} is the first that is known to have been in "
                f"production; there is none to go back to. Name one, or promote another."
            )
        which = steps[-2]
    version = tracking.find_version(client, name, which)
    target = str(version.version)
    known = sorted({entry.champion for entry in log} - {last.champion, ""}, key=int)
    if target not in known:
        raise RegistryError(
            f"{name} version {target} cannot be gone back to: expected one that was in production "
            f"before ({', '.join(known) or 'none'}). To put in a new one: 'tlpipe promote'."
        )
    tracking.check_promoted(client, version)
    tracking.bundle_of(client, version)
    seen = moves.seen(client, name, version)
    return moves.move(client, name, seen, after=last, kind=ROLLBACK, why=why)


def period(text: str) -> tuple[datetime, datetime]:
    """Return begin and end of a date, or of a moment in ISO 8601; UTC where no zone is said.

    Raises:
        RegistryError: it is neither.
    """
    try:
        if len(text) == len("2026-01-31"):
            day = date.fromisoformat(text)
            return datetime.combine(day, time.min, UTC), datetime.combine(day, time.max, UTC)
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise RegistryError(
            f"{text!r} is no date; expected one such as 2026-01-31 or 2026-01-31T14:00."
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment, moment


def _judge(
    client: "MlflowClient",
    name: str,
    version: "ModelVersion",
    candidate: Bundle,
    last: Move | None,
    measured: Measured,
    source: ingest.Params,
    bounds: Bounds,
) -> Decision:
    """Let the gate judge, beside the last versions in production that can still be loaded.

    Raises:
        GateError: none is left to compare with, or it cannot be measured on these images.
    """
    held = tracking.artifact(client, version.run_id, f"{tracking.MODEL_FOLDER}/{held_out.NAME}")
    signature = None
    if bounds.public_key is not None:
        signature = tracking.artifact(client, version.run_id, signing.ARTIFACT)
    return gate.judge(
        candidate,
        str(version.version),
        _rivals(client, name, str(version.version), bounds.compared_versions)
        if last is not None
        else (),
        measured=measured,
        source=source,
        held_out=held,
        copies=tracking.artifact(client, version.run_id, publishing.LEAKS),
        signature=signature,
        bounds=bounds,
    )


def _rivals(client: "MlflowClient", name: str, candidate: str, most: int) -> list[Rival]:
    """Return the version in production and those before it that nobody has taken out, at ``most``.

    Where the champion itself is gone, the last good one stands for it.

    Raises:
        GateError: none can be loaded.
    """
    try:
        serving = tracking.fetch(client, name, moves.CHAMPION)
    except (ArtifactError, RegistryError) as error:
        raise GateError(
            f"nothing that was in production is left to compare with: {error} Override "
            f"with --force REASON."
        ) from None
    served = tracking.find_version(client, name, serving.version)
    found = {serving.version: _rival(client, served, serving.bundle)}
    for number in reversed(moves.standing(moves.history(client, name))):
        if len(found) == most:
            break
        if number == candidate or number in found:
            continue
        try:
            version = tracking.find_version(client, name, number)
            found[number] = _rival(client, version, tracking.bundle_of(client, version))
        except (ArtifactError, RegistryError) as error:
            _log.warning("nothing is compared with %s version %s: %s", name, number, error)
    return list(found.values())


def _rival(client: "MlflowClient", version: "ModelVersion", bundle: Bundle) -> Rival:
    return Rival(str(version.version), bundle, _trained(client, version, bundle))


def _trained(
    client: "MlflowClient", version: "ModelVersion", bundle: Bundle
) -> frozenset[bytes] | None:
    """Return the keys of the images that trained a version; None where its run does not say."""
    split = tracking.artifact(client, version.run_id, publishing.SPLIT)
    if split is None or files.sha256(split) != bundle.provenance.get("split_sha256"):
        return None
    try:
        return gate.trained(split)
    except ArtifactError:  # written by another version of tlpipe
        return None


def _record(
    client: "MlflowClient", version: "ModelVersion", decision: Decision, force: str
) -> None:
    """Write the decision to the tags of the version and, with every number, to its run."""
    verdict = decision.verdict
    failed = "failed" if verdict == "fails" else verdict
    outcome = "passed" if verdict == "holds" else f"forced: {force}" if force else failed
    now = datetime.now(UTC)
    who = {"at": now.isoformat(), "by": user(), "outcome": outcome}
    assert version.run_id is not None  # its bundle came from there
    client.log_dict(version.run_id, decision.content() | who, f"gate/{now:%Y%m%dT%H%M%S%f}Z.json")
    tags = {_TAG: outcome, f"{_TAG}.against": decision.champion or "none"}
    for rule in decision.rules:
        said = rule.verdict.upper() if rule.verdict == "fails" else rule.verdict
        tags[f"{_TAG}.{rule.name}"] = f"{said}: {rule.found}, expected {rule.expected}"
    for stale in version.tags.keys() - tags.keys():
        if stale.startswith(f"{_TAG}."):
            client.delete_model_version_tag(version.name, version.version, stale)
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def _summary(decision: Decision) -> str:
    against = f"against version {decision.champion}" if decision.champion else "the first one"
    return f"{len(decision.rules)} rules hold, {against}"
