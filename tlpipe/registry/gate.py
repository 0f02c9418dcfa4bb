"""The gate: may this bundle go into production?

The candidate and the last versions in production answer for the candidate's test split now; what
was measured in other times or on other images counts for nothing. Every rule gives a line: what was
found, what was expected, and whether it holds, fails, or cannot tell. A rule that nobody set a
bound for is not asked.
"""

import logging
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tlpipe import bundle as bundles
from tlpipe import files, versioning
from tlpipe.bundle import Bundle
from tlpipe.data import ingest, leaks, pixels
from tlpipe.data.images import Sampling
from tlpipe.data.manifest import Entry, load_manifest, load_split
from tlpipe.data.values import UNREADABLE, is_deep
from tlpipe.errors import ArtifactError, ComparisonError, TlpipeError
from tlpipe.evaluation import answers, metrics
from tlpipe.evaluation.answers import Answers, Part
from tlpipe.params import Section
from tlpipe.predict import Predictor
from tlpipe.resampling import (
    detectable_drop,
    group_numbers,
    images_to_tell,
    paired_difference,
    share_interval,
)
from tlpipe.sources import Reject
from tlpipe.sources.paths import some

_log = logging.getLogger(__name__)
_CONFIDENCE = 0.95

Verdict = Literal["holds", "fails", "cannot tell"]


class Bounds(Section):
    """What a version must reach before it goes into production; on its test split, in fp32."""

    min_accuracy: float = Field(default=0.0, ge=0, le=1, description="Accuracy, at least.")
    min_recall: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description=(
            "Recall of every class, at least; each must be tested on so many images that one "
            "mistake is allowed."
        ),
    )
    min_test_images: int = Field(
        default=20, ge=1, description="Test images, at least; those of one group count as one."
    )
    max_accuracy_drop: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description=(
            "How far its accuracy may be below that of each of the last versions in "
            "production, as far as the test images can tell. One that is lower beyond chance "
            "never passes."
        ),
    )
    compared_versions: int = Field(
        default=3,
        ge=1,
        description=(
            "How many of the last versions in production it is compared with, so that small "
            "drops do not add up."
        ),
    )
    max_calibration_error: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=(
            "Calibration error, at most: the debiased root mean square difference between "
            "confidence and accuracy (Kumar, Liang and Ma, 2019)."
        ),
    )
    max_latency_ms: float | None = Field(
        default=None,
        gt=0,
        description="Latency of an answer for one image, in milliseconds, at most.",
    )
    max_model_mb: float | None = Field(
        default=None, gt=0, description="Size of the fp32 graph, in megabytes, at most."
    )
    max_validation_gap: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="By how much test accuracy may be below validation accuracy beyond chance.",
    )
    allow_other_labels: bool = Field(
        default=False, description="Whether it may have other classes than the one in production."
    )
    public_key: str | None = Field(
        default=None, min_length=1, description="PEM file of who must have signed the bundle."
    )


@dataclass(frozen=True)
class Rule:
    """One line of a decision."""

    name: str
    found: str
    expected: str
    verdict: Verdict


@dataclass(frozen=True)
class Decision:
    """Whether a version may replace another (None: there is none), with every number."""

    candidate: str
    champion: str | None
    rules: tuple[Rule, ...]
    numbers: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        """It holds where every rule does, and fails where one does."""
        found = {rule.verdict for rule in self.rules}
        return "fails" if "fails" in found else "cannot tell" if "cannot tell" in found else "holds"

    @property
    def reasons(self) -> str:
        """The rules that do not hold, in words."""
        lines = []
        for rule in self.rules:
            if rule.verdict != "holds":
                name = f"{rule.name} cannot tell:" if rule.verdict == "cannot tell" else rule.name
                lines.append(f"{name} {rule.found}, expected {rule.expected}")
        return "; ".join(lines)

    def content(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Candidate:
    """A version that may go into production, and what was found of it before.

    Attributes:
        version: its number, or what it was named by.
        bundle: what would serve.
        held_out: predictions of its training for images that it held out, a file.
        copies: what ``audit`` found of copies across its splits, a file.
        signature: of its bundle, a file. Each file is ``None`` where there is none.
    """

    version: str
    bundle: Bundle
    held_out: Path | None
    copies: Path | None
    signature: Path | None


@dataclass(frozen=True)
class Rival:
    """A version to compare with; ``trained``: the keys of its images, where they are known."""

    version: str
    bundle: Bundle
    trained: frozenset[bytes] | None


@dataclass(frozen=True)
class Measured:
    """The stored images that a bundle is measured on: of the workspace that it was made in."""

    pixels: Path
    manifest: Path
    split: Path

    def check(self, bundle: Bundle) -> None:
        """Check that these are the images that the bundle was made with, split as then.

        Raises:
            ComparisonError: they are others, so nothing can be said.
        """
        commit = bundle.provenance.get("git_commit") or ""
        out = f"check out {commit}" if versioning.is_commit(commit) else "check out what made it"
        advice = (
            f"so the version cannot be compared on its test images. Go to the project where it was "
            f"made, or {out} and run 'dvc repro evaluate'."
        )
        for path in (self.manifest, self.split, self.pixels):
            if not path.exists():
                raise ComparisonError(f"{path} is not here, {advice}")
        made_with = (
            bundle.provenance["origin"]["data_sha256"],
            bundle.provenance.get("split_sha256"),
        )
        here = files.sha256(self.manifest), files.sha256(self.split)
        if here != made_with or pixels.load(self.pixels).sampling != sampling_of(bundle):
            raise ComparisonError(
                f"{self.manifest}, {self.split} and {self.pixels} hold other data than the version "
                f"was made with, {advice}"
            )


def decide(
    candidate: Candidate,
    rivals: Sequence[Rival],
    *,
    measured: Measured,
    source: ingest.Params,
    bounds: Bounds,
) -> Decision:
    """Compare a version with the one in production, the first of the rivals, and those before it.

    ``source``: from where the images are read anew where a rival sees them differently.

    Raises:
        ComparisonError: the version in production cannot be measured on these images.
    """
    bundle = candidate.bundle
    squares = pixels.load(measured.pixels).array
    (part,) = answers.parts(("test",), bundle.labels, squares, measured.manifest, measured.split)
    entries = list(load_manifest(measured.manifest))
    predictor = Predictor(bundle, threads=bundle.provenance["origin"]["threads"])
    given = part.ask(predictor, titled(candidate.version))
    recalls = _recalls(given, bundle.labels)
    accuracy = share_interval(given.hits, part.groups, _CONFIDENCE)
    guessed = max(np.bincount(part.truth)) / len(part.truth)
    leaked = int(_in_training(part, trained(measured.split), entries).sum())
    groups = _count(part)
    rules = [
        Rule(
            "test_images",
            str(groups),
            f"at least {bounds.min_test_images}",
            _holds(groups >= bounds.min_test_images),
        ),
        Rule(
            "accuracy",
            f"{accuracy['value']:.4f} ({_interval(accuracy)})",
            f"at least {bounds.min_accuracy:.4f}, as measured",
            _holds(accuracy["value"] >= bounds.min_accuracy),
        ),
        Rule(
            "skill",
            f"{accuracy['value']:.4f}",
            f"above {guessed:.4f}, which the most frequent class alone has",
            _holds(bool(accuracy["value"] > guessed)),
        ),
        _recall(recalls, part, bundle.labels, bounds.min_recall),
        Rule("leaks", f"{leaked} test images", "none that training has seen", _holds(leaked == 0)),
        _copies(candidate.copies),
        _validation(given, part, candidate, measured.split, bounds.max_validation_gap),
    ]
    error = metrics.calibration_error(given.probabilities, part.truth, part.groups, _CONFIDENCE)
    numbers: dict[str, Any] = {
        "images": len(part.rows),
        "groups": groups,
        "accuracy": accuracy["value"],
        "recall": recalls,
        "calibration_error": error["value"] if error else None,
        "latency_ms": answers.milliseconds_for(predictor, squares, 1),
        "model_mb": bundle.graphs["fp32"].stat().st_size / 1e6,
    }
    if bounds.max_calibration_error is not None:
        rules.append(_calibration(error, bounds.max_calibration_error))
    for name in ("latency_ms", "model_mb"):
        if (most := getattr(bounds, f"max_{name}")) is not None:
            rules.append(_at_most(name, numbers[name], most))
    if bounds.public_key is not None:
        rules.append(_signed(candidate, Path(bounds.public_key)))
    if rivals:
        compared = []
        for rival in rivals:
            try:
                found = _compare(rival, bundle, given.hits, part, entries, source, len(rivals))
            except ComparisonError as error:
                if rival is rivals[0]:
                    raise
                _log.warning("nothing is compared with %s: %s", titled(rival.version), error)
            else:
                compared.append(found)
        rules += [
            _change(compared, bounds.max_accuracy_drop, bounds.min_test_images),
            _labels(bundle, rivals[0].bundle, bounds.allow_other_labels),
        ]
        numbers["compared"] = [asdict(one) for one in compared]
    champion = rivals[0].version if rivals else None
    return Decision(candidate.version, champion, tuple(rules), numbers)


def titled(version: str) -> str:
    """Return how a version is called in words: by its number, or as what it was named by."""
    return f"version {version}" if version.isdecimal() else version


def _holds(is_so: bool) -> Verdict:
    return "holds" if is_so else "fails"


def _interval(found: Mapping[str, float]) -> str:
    return f"{_CONFIDENCE:.0%} interval {found['low']:.4f} to {found['high']:.4f}"


def _recalls(given: Answers, labels: Sequence[str]) -> dict[str, float]:
    """Return the share of right answers for each class that has test images."""
    return {
        label: float(given.hits[given.truth == number].mean())
        for number, label in enumerate(labels)
        if (given.truth == number).any()
    }


def _recall(recalls: Mapping[str, float], part: Part, labels: Sequence[str], least: float) -> Rule:
    """Ask for the recall of the worst class.

    Nobody knows it of a class without test images, and where a single mistake among its images is
    more than the floor allows, being right says nothing: 0.9 takes ten images.
    """
    worst = min(recalls, key=lambda label: recalls[label])
    counts = Counter(labels[true] for true in part.truth)
    groups = {*zip(part.truth.tolist(), group_numbers(part.groups).tolist(), strict=True)}
    independent = Counter(labels[true] for true, _ in groups)
    needed = math.ceil(round(1 / (1 - least), 6)) if least < 1 else 1
    few = [label for label in labels if independent[label] < needed] if least else []
    found = f"{recalls[worst]:.4f} (class {worst}, {counts[worst]} test images)"
    verdict = _holds(recalls[worst] >= least)
    if few:
        found += f"; fewer than {needed} independent test images: {some(few, 5)}"
        verdict = "cannot tell" if verdict == "holds" else verdict
    expected = f"at least {least:.4f}, of every class"
    if not least:
        expected = "nothing: register.gate.min_recall is 0"
    return Rule("recall", found, expected, verdict)


def _copies(path: Path | None) -> Rule:
    """Ask that held-out images are no more often copies of training images than in clean sets."""
    expected = "no more copies of training images among those held out than clean sets show"
    if path is None:
        return Rule("copies", "its run does not say", expected, "cannot tell")
    found = files.read_json(path)
    if "pretrained" in found:
        expected += ", and none that the weights were pretrained on"
    is_clean = not found["is_above_clean"] and not leaks.held_out_pretrained(found)
    return Rule("copies", leaks.describe(found), expected, _holds(is_clean))


def _calibration(error: Mapping[str, float] | None, most: float) -> Rule:
    """Decide by the interval: noise is taken off the value, which is often 0 by chance."""
    if error is None:
        expected = (
            f"at most {most:.4f}; test on images of two groups or more, or set "
            f"register.gate.max_calibration_error to null"
        )
        return Rule("calibration_error", metrics.UNKNOWN, expected, "cannot tell")
    found = f"{error['value']:.4f} ({_interval(error)})"
    verdict: Verdict = "cannot tell"
    if error["high"] <= most or error["low"] > most:
        verdict = _holds(error["high"] <= most)
    return Rule("calibration_error", found, f"at most {most:.4f}", verdict)


def trained(split: Path) -> frozenset[bytes]:
    """Return the keys of the images that train a model, by its split table.

    Raises:
        ArtifactError: the table is damaged, or of another version of tlpipe.
    """
    seen = ("train", "validation")
    return frozenset(row.key for row in load_split(split) if row.split in seen)


def _in_training(
    part: Part, keys: Container[bytes], entries: Sequence[Entry]
) -> npt.NDArray[np.bool_]:
    """Return which images are among those of the keys, or have their like there, (N,) bool.

    ``entries``: of the whole manifest, whose groups say what is alike.
    """
    alike = {e.group for e in entries if e.group and e.key in keys}
    return np.array([e.key in keys or e.group in alike for e in part.entries], bool)


def _validation(
    given: Answers,
    part: Part,
    candidate: Candidate,
    split: Path,
    bound: float,
) -> Rule:
    """Compare with the accuracy on images held out of training."""
    by = f"by more than {bound:g} " if bound else ""
    expected = f"test accuracy that is not below it {by}beyond chance"
    if candidate.held_out is None:
        advice = "register it anew: 'dvc repro --force --single-item register'"
        found = "no predictions held out in its run"
        return Rule("validation", found, f"some; {advice}", "cannot tell")
    try:
        validation, groups = answers.of_held_out(candidate.held_out, candidate.bundle, split)
    except ArtifactError as error:
        return Rule("validation", str(error), expected, "cannot tell")
    compared = metrics.compare_validation(
        validation.hits, groups, given.hits, part.groups, _CONFIDENCE
    )
    is_near = compared["difference"]["high"] >= -bound
    return Rule("validation", metrics.describe_gap(compared), expected, _holds(is_near))


@dataclass(frozen=True)
class Compared:
    """How a candidate did beside a version that is or was in production.

    On the test images that the other has not trained on and whose class it knows.

    Attributes:
        version: of the other.
        groups: how many of these images are independent of one another.
        accuracy: of the other on them; ``None`` without any, as are the following.
        change: of accuracy, with its interval.
        is_worse: whether the candidate is below it beyond chance, with all others in mind.
        detectable_drop: the smallest drop of accuracy that such images show in four of five cases.
        trained_on: how many test images the other has trained on; ``None`` where its run does not
            say.
        unknown: how many test images have a class that it does not know.
        unread: how many it cannot read, for want of a range of values: they count as wrong.
    """

    version: str
    groups: int
    accuracy: float | None
    change: dict[str, float] | None
    is_worse: bool
    detectable_drop: float | None
    trained_on: int | None
    unknown: int
    unread: int


def _compare(
    rival: Rival,
    candidate: Bundle,
    hits: npt.NDArray[np.bool_],
    part: Part,
    entries: Sequence[Entry],
    source: ingest.Params,
    rivals: int,
) -> Compared:
    """Compare on the images that count; one of so many ``rivals``."""
    known = set(rival.bundle.labels)
    is_known = np.array([candidate.labels[true] in known for true in part.truth], bool)
    trained_on, counts = None, is_known
    if rival.trained is not None:
        seen = _in_training(part, rival.trained, entries)
        trained_on, counts = int(seen.sum()), is_known & ~seen
    unknown = int((~is_known).sum())
    if not counts.any():
        return Compared(rival.version, 0, None, None, False, None, trained_on, unknown, 0)
    new = part.some(np.flatnonzero(counts).tolist())
    theirs, unread = _hits_of(rival, candidate, new, source)
    given = (theirs, hits[counts], new.groups)
    # One of several is lower by chance more often: Dunn (1961), Multiple comparisons among means,
    # JASA 56. That all of them are near needs no such care.
    strict = 1 - (1 - _CONFIDENCE) / rivals
    return Compared(
        rival.version,
        _count(new),
        float(theirs.mean()),
        paired_difference(*given, _CONFIDENCE),
        paired_difference(*given, strict)["high"] < 0,
        detectable_drop(*given, strict),
        trained_on,
        unknown,
        unread,
    )


def _count(part: Part) -> int:
    """Return how many of the images are independent: those of one group count as one."""
    return int(group_numbers(part.groups).max()) + 1


def _hits_of(
    rival: Rival, candidate: Bundle, part: Part, source: ingest.Params
) -> tuple[npt.NDArray[np.bool_], int]:
    """Return which of the images, all of classes that it knows, another version names right.

    And how many it cannot read, for want of a range of values or of contrast in its own: it names
    none of them.
    """
    numbers = {label: number for number, label in enumerate(rival.bundle.labels)}
    truth = np.array([numbers[candidate.labels[true]] for true in part.truth], np.int64)
    theirs, ours = (sampling_of(bundle) for bundle in (rival.bundle, candidate))
    same = replace(part, truth=truth)
    try:
        predictor = Predictor(rival.bundle, threads=candidate.provenance["origin"]["threads"])
    except ArtifactError as error:
        raise ComparisonError(f"{titled(rival.version)} cannot answer: {error}") from None
    if theirs == ours:
        return same.ask(predictor, titled(rival.version)).hits, 0
    hits, read = np.zeros(len(same.rows), bool), np.zeros(len(same.rows), bool)
    with TemporaryDirectory() as folder:
        for which, seen in _seen_by(theirs, ours, same, Path(folder), source):
            hits[which] = seen.ask(predictor, titled(rival.version)).hits
            read[which] = True
    return hits, int((~read).sum())


def _seen_by(
    theirs: Sampling, ours: Sampling, part: Part, folder: Path, source: ingest.Params
) -> Iterator[tuple[list[int], Part]]:
    """Yield images as another classifier sees them, stored in a folder; not what it cannot read.

    With each part: which of the images it holds. Where only the range of values is another, images
    of 8 bits are the same.

    Raises:
        ComparisonError: an image is no longer there.
    """
    is_other = theirs != ours.model_copy(update={"value_range": theirs.value_range})
    deep = [is_deep(entry.mode) for entry in part.entries]
    if not is_other and not all(deep):
        same = [i for i, is_so in enumerate(deep) if not is_so]
        yield same, part.some(same)
    has_range = theirs.value_range is not None
    wanted = {
        entry.path: entry.key
        for entry, is_so in zip(part.entries, deep, strict=True)
        if (is_so and has_range) or (not is_so and is_other)
    }
    if not wanted:
        return
    writer, places, unreadable = pixels.Writer(folder, theirs), dict[bytes, int](), set[bytes]()
    try:
        for outcome in ingest.some(source, theirs, wanted.keys()):
            if isinstance(outcome, Reject):
                if outcome.reason in UNREADABLE:
                    unreadable.add(wanted[outcome.path])
                continue
            key = outcome.entry.key
            if key == wanted[outcome.entry.path] and key not in places:
                places[key] = len(places)
                writer.append(key, outcome.square, outcome.thumbnail)
    except TlpipeError as error:
        raise ComparisonError(
            f"a version to compare with sees images differently ({theirs}), and they cannot be "
            f"read again for it: {error}"
        ) from None
    finally:
        writer.close()
    writer.finish(decoder="", data_sha256="", data_version="")
    _check_all_there(wanted, {*places, *unreadable}, source, theirs)
    which = [i for i, entry in enumerate(part.entries) if wanted.get(entry.path) in places]
    if which:
        rows = [places[part.entries[i].key] for i in which]
        yield which, replace(part.some(which), squares=pixels.load(folder).array, rows=rows)


def _check_all_there(
    wanted: Mapping[str, bytes], found: Container[bytes], source: ingest.Params, sampling: Sampling
) -> None:
    if missing := [path for path, key in wanted.items() if key not in found]:
        raise ComparisonError(
            f"{len(missing)} test images, such as {missing[0]}, are no longer in {source.source}, "
            f"or cannot be read as a version to compare with does ({sampling}), so it cannot be "
            f"measured on them. Fetch the data: 'dvc pull'."
        )


def sampling_of(bundle: Bundle) -> Sampling:
    """Return how a bundle wants images to be stored."""
    seen = bundle.preprocessing
    return Sampling(**{key: getattr(seen, key) for key in Sampling.model_fields})


def _change(compared: Sequence[Compared], max_drop: float, least: int) -> Rule:
    """Compare with the version in production, the first one, and with those before it.

    Worse than one of them beyond chance fails. Where it may be worse than one of them by more than
    ``max_drop``, the images cannot tell: the lower end of the interval is a test of non-inferiority
    (Piaggio et al. (2012), Reporting of noninferiority and equivalence randomized trials, JAMA
    308). The version in production needs ``least`` images that count; without them nothing can be
    told, and one before it is left out. So is one before it that may have trained on some of them;
    where that is the one in production, being below it tells nothing.
    """
    champion, *before = compared
    few = [one.version for one in before if one.groups < least]
    unclear = [one.version for one in before if one.trained_on is None]
    taking_part = [champion, *(one for one in before if one.version not in {*few, *unclear})]
    worse = [one for one in taking_part if one.is_worse and one.trained_on is not None]
    unsure = [
        one
        for one in taking_part
        if one.change is None or one.change["low"] < -max_drop or one.is_worse
    ]
    verdict: Verdict = "fails" if worse else "holds"
    if not worse and (unsure or champion.groups < least):
        verdict = "cannot tell"

    def lowest(one: Compared) -> float:
        return one.change["low"] if one.change else -math.inf

    shown = min(worse or [*unsure, champion], key=lowest)
    parts = [_described(shown, max_drop if verdict == "cannot tell" else None)]
    if champion.groups < least:
        parts.append(
            f"{champion.groups} test images count beside {titled(champion.version)}; {least} have "
            f"to"
        )
    if len(taking_part) > 1:
        parts.append(f"the one that decides of {len(taking_part)} versions")
    if few:
        parts.append(f"too few test images count beside version {some(few, 5)}")
    if unclear:
        parts.append(f"what trained version {some(unclear, 5)} is not known, so it is left out")
    expected = f"not below 0 beyond chance, and above {-max_drop:+.4f} as far as can be told"
    return Rule("accuracy_change", "; ".join(parts), expected, verdict)


def _described(one: Compared, max_drop: float | None) -> str:
    """Say what was found beside a version; ``max_drop``: then also how many images would tell."""
    parts = []
    if (change := one.change) is not None:
        parts = [
            f"{change['value']:+.4f} against {titled(one.version)} ({change['confidence']:.0%} "
            f"interval {change['low']:+.4f} to {change['high']:+.4f})",
            f"{one.groups} independent test images can show a drop of {one.detectable_drop:.4f} "
            f"or more",
        ]
        if max_drop is not None and change["low"] < -max_drop < change["value"]:
            needed = images_to_tell(change, one.groups, max_drop)
            parts.append(f"some {needed} would tell in four of five cases")
    if one.trained_on is None:
        parts.append(f"whether {titled(one.version)} trained on some is not known")
    elif one.trained_on:
        parts.append(f"{one.trained_on} that it trained on, or their like, do not count")
    if one.unknown:
        parts.append(f"{one.unknown} of classes that it does not know do not count")
    if one.unread:
        parts.append(
            f"{one.unread} count as wrong for it, which cannot read them (more than 8 bits)"
        )
    return "; ".join(parts)


def label_changes(before: Iterable[str], after: Iterable[str]) -> str:
    """Return which labels are gone and which are new, in words; nothing where none is."""
    gone, new = sorted({*before} - {*after}), sorted({*after} - {*before})
    changes = (("gone", gone), ("new", new))
    return "; ".join(f"{what}: {', '.join(labels)}" for what, labels in changes if labels)


def _labels(candidate: Bundle, champion: Bundle, may_differ: bool) -> Rule:
    if is_same := candidate.labels == champion.labels:
        found = f"the same {len(candidate.labels)}"
    else:
        found = label_changes(champion.labels, candidate.labels) or "another order"
    expected = "any" if may_differ else "the same, in the same order"
    return Rule("labels", found, expected, _holds(may_differ or is_same))


def _signed(candidate: Candidate, key: Path) -> Rule:
    expected = f"a signature by the owner of {key}"
    if candidate.signature is None:
        return Rule("signature", "none", f"{expected}: 'tlpipe sign NAME@ALIAS'", "fails")
    try:
        bundles.check_signature(candidate.bundle.folder, key, candidate.signature)
    except TlpipeError as error:
        return Rule("signature", str(error), expected, "fails")
    return Rule("signature", "valid", expected, "holds")


def _at_most(name: str, found: float, most: float) -> Rule:
    return Rule(name, f"{found:.4f}", f"at most {most:.4f}", _holds(found <= most))
