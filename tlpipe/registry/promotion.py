"""Commands ``compare``, ``promote``, ``rollback`` and ``history``: what is in production, and why.

``compare`` shows what the gate finds for a model beside another, and moves nothing; ``promote``
asks the gate by the same functions.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe import bundle as bundles
from tlpipe import files, held_out
from tlpipe.bundle import Bundle
from tlpipe.data import ingest
from tlpipe.errors import ArtifactError, ComparisonError, GateError, RegistryError
from tlpipe.registry import Registered, gate, moves, publishing, tracking
from tlpipe.registry.gate import Bounds, Candidate, Decision, Measured, Rival, Rule
from tlpipe.registry.moves import PROMOTION, ROLLBACK, Move
from tlpipe.versioning import user

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


_TAG = "tlpipe.gate"
_log = logging.getLogger(__name__)


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


def stands_in(client: "MlflowClient", name: str) -> str:
    """Say that what was put in production is gone, and which version answers; nothing if none is.

    Where the champion's version is deleted, MLflow takes its alias along.
    """
    log = moves.history(client, name)
    there = tracking.numbers(client, name)
    if not moves.was_deleted(log, there):
        return ""
    said = f"{name} version {moves.standing(log)[-1]}, which was deleted in MLflow"
    others = moves.stand_ins(log, there)
    answers = f"version {others[0]} answers" if others else "no other can answer"
    return f"{said}; {answers}, until another is promoted"


def promote(
    client: "MlflowClient",
    name: str,
    which: str,
    *,
    measured: Measured,
    source: ingest.Params,
    bounds: Bounds,
    reason: str = "",
    force: bool = False,
    show: Callable[[Decision], None] = lambda _: None,
) -> Move:
    """Compare a version, by its number or alias, with the champion, and put it in production.

    ``reason``: for the history. ``force``: put it there although the gate fails, for that reason.
    ``show`` gets the decision once it is made.

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
        decision = gate.decide(
            of_version(client, version, candidate, bounds),
            rivals(client, name, str(version.version), bounds.compared_versions)
            if last is not None
            else (),
            measured=measured,
            source=source,
            bounds=bounds,
        )
    except GateError as error:
        if not force:
            raise GateError(f"{error} Override with --force --reason TEXT.") from None
        rules = (Rule("comparison", str(error), "both on the same images", "cannot tell"),)
        decision = Decision(str(version.version), last.champion if last else None, rules, {})
    _record(client, version, decision, reason if force else "")
    show(decision)
    if decision.verdict != "holds" and not force:
        improvement = "Improve the model" if decision.verdict == "fails" else "Test on more images"
        raise GateError(
            f"{name} version {version.version} stays out of production: {decision.reasons}. "
            f"{improvement}, relax register.gate in params.yaml, or override with --force --reason "
            f"TEXT."
        )
    why = reason if force else "; ".join(filter(None, (reason, _summary(decision))))
    return moves.move(client, name, seen, after=last, kind=PROMOTION, why=why)


def rollback(client: "MlflowClient", name: str, which: str | None = None, reason: str = "") -> Move:
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
        # Where somebody took the last one out by hand, that is what was in production before.
        there = tracking.numbers(client, name)
        before = [
            step for step in moves.standing(log) if int(step) in there and step != last.champion
        ]
        if not before:
            now = f"version {last.champion}" if last.champion else "nothing"
            raise RegistryError(
                f"{now} of {name} is in production, and no version is left that was there before; "
                f"there is none to go back to. Name one, or promote another."
            )
        which = before[-1]
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
    return moves.move(client, name, seen, after=last, kind=ROLLBACK, why=reason)


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


@dataclass(frozen=True)
class Own:
    """What the stages of this project wrote last; a bundle's folder may be its ``bundle``."""

    measured: Measured
    bundle: Path
    held_out: Path
    leaks_report: Path


def compare(
    *,
    model: Registered | Path,
    other: Registered | Path | None,
    name: str,
    workspace: Path,
    own: Own,
    source: ingest.Params,
    bounds: Bounds,
) -> Decision:
    """Return what the gate finds for a model on its test images, beside another one.

    ``other``: by default what ``promote`` compares with, the last versions in production: of the
    model's own name, or of ``name`` where it is a folder. ``source`` and ``bounds`` as the gate
    takes them.

    Raises:
        ArtifactError: a bundle is damaged.
        ComparisonError: the two cannot be compared here.
        RegistryError: a version does not exist, or a bundle would be compared with itself.
    """
    with ExitStack() as stack:
        client = None
        if not (isinstance(model, Path) and isinstance(other, Path)):
            client = stack.enter_context(tracking.connection(workspace))
        if isinstance(model, Path):
            candidate, number = _of_folder(client, name, model, own, bounds), ""
        else:
            assert client is not None
            version = tracking.find_version(client, model.name, model.which)
            number, name = str(version.version), model.name
            candidate = of_version(client, version, tracking.bundle_of(client, version), bounds)
        own.measured.check(candidate.bundle)
        if isinstance(other, Path):
            rivals = [_rival_of_folder(other, own)]
        else:
            assert client is not None
            rivals = _registered_rivals(client, name, number, other, bounds)
        if same := [one.version for one in rivals if one.bundle.digest == candidate.bundle.digest]:
            is_number = same[0].isdigit() and not isinstance(other, Path)  # of a version
            shown = f"{name}@{same[0]}" if is_number else same[0]
            raise RegistryError(
                f"{model} and {shown} are the same bundle, sha256 "
                f"{candidate.bundle.digest[:16]}...; name another to compare it with."
            )
        return gate.decide(candidate, rivals, measured=own.measured, source=source, bounds=bounds)


def _registered_rivals(
    client: "MlflowClient", name: str, number: str, other: Registered | None, bounds: Bounds
) -> list[Rival]:
    if other is not None:
        version = tracking.find_version(client, other.name, other.which)
        found = rival(client, version, tracking.bundle_of(client, version))
        return [found if other.name == name else Rival(str(other), found.bundle, found.trained)]
    tracking.check_known(client, name)
    champion = moves.champion_alias(client, name)
    if champion and champion == number:
        advice = "there is no other version yet to compare it with."
        if others := [other for other in tracking.numbers(client, name) if str(other) != number]:
            advice = (
                f"name another to compare it with: 'tlpipe compare {name}@{number} "
                f"{name}@{others[-1]}'."
            )
        raise RegistryError(f"{name} version {number} is the one in production; {advice}")
    if not champion and not moves.history(client, name):
        return []
    return rivals(client, name, number, bounds.compared_versions)


def of_version(
    client: "MlflowClient", version: "ModelVersion", bundle: Bundle, bounds: Bounds
) -> Candidate:
    """Return a registered version as the gate takes it, with the files that its run keeps."""
    signature = None
    if bounds.public_key is not None:
        signature = tracking.artifact(client, version.run_id, bundles.SIGNATURE)
    held = f"{tracking.MODEL_FOLDER}/{held_out.NAME}"
    return Candidate(
        version=str(version.version),
        bundle=bundle,
        held_out=tracking.artifact(client, version.run_id, held),
        copies=tracking.artifact(client, version.run_id, publishing.LEAKS),
        signature=signature,
    )


def _of_folder(
    client: "MlflowClient | None", name: str, folder: Path, own: Own, bounds: Bounds
) -> Candidate:
    """Return a folder's bundle, with what the project or, for a registered one, its run keeps."""
    bundle = bundles.load(folder)
    is_own = own.bundle.is_dir() and bundles.digest(own.bundle) == bundle.digest
    if client is not None and not is_own:
        with suppress(RegistryError):
            version = tracking.find_version(client, name, bundle.digest)
            return replace(of_version(client, version, bundle, bounds), version=str(folder))
    signature = bundles.signature_beside(folder)
    return Candidate(
        version=str(folder),
        bundle=bundle,
        held_out=own.held_out if is_own and own.held_out.is_file() else None,
        copies=own.leaks_report if is_own and own.leaks_report.is_file() else None,
        signature=signature if signature.is_file() else None,
    )


def rivals(client: "MlflowClient", name: str, candidate: str, most: int) -> list[Rival]:
    """Return the version in production and those before it that nobody has taken out, at ``most``.

    Where the champion itself is gone, the last good one stands for it.

    Raises:
        ComparisonError: none can be loaded.
    """
    try:
        serving = tracking.fetch(client, name, moves.CHAMPION)
    except (ArtifactError, RegistryError) as error:
        raise ComparisonError(
            f"nothing that was in production is left to compare with: {error}"
        ) from None
    served = tracking.find_version(client, name, serving.version)
    found = {serving.version: rival(client, served, serving.bundle)}
    for number in reversed(moves.standing(moves.history(client, name))):
        if len(found) == most:
            break
        if number == candidate or number in found:
            continue
        try:
            version = tracking.find_version(client, name, number)
            found[number] = rival(client, version, tracking.bundle_of(client, version))
        except (ArtifactError, RegistryError) as error:
            _log.warning("nothing is compared with %s version %s: %s", name, number, error)
    return list(found.values())


def rival(client: "MlflowClient", version: "ModelVersion", bundle: Bundle) -> Rival:
    """Return a registered version to compare with, and what trained it, where its run says so."""
    split = tracking.artifact(client, version.run_id, tracking.SPLIT)
    return Rival(str(version.version), bundle, _trained(split, bundle))


def _rival_of_folder(folder: Path, own: Own) -> Rival:
    bundle = bundles.load(folder)
    return Rival(str(folder), bundle, _trained(own.measured.split, bundle))


def _trained(split: Path | None, bundle: Bundle) -> frozenset[bytes] | None:
    """Return the keys of the images that trained a bundle; None where this is not its table."""
    if split is None or files.sha256(split) != bundle.provenance.get("split_sha256"):
        return None
    try:
        return gate.trained(split)
    except ArtifactError:  # written by another version of tlpipe
        return None
