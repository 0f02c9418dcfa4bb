"""The gate: may this bundle go into production?

The candidate and the last versions in production answer for the candidate's test split now; what
was measured in other times or on other images counts for nothing. Every rule gives a line: what was
found, what was expected, and whether it holds, fails, or cannot tell. A rule that nobody set a
bound for is not asked.
"""

import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tlpipe import files
from tlpipe.data import ingest
from tlpipe.data import pixels as packed
from tlpipe.data.images import Sampling
from tlpipe.data.manifest import load_manifest, load_split
from tlpipe.data.values import UNREADABLE, is_deep
from tlpipe.errors import ArtifactError, GateError, TlpipeError
from tlpipe.inference.predictor import Predictor
from tlpipe.metrics import answers, generalisation, scores, speed
from tlpipe.metrics.answers import Answers, Part
from tlpipe.metrics.curves import Hits
from tlpipe.onnx_export import signing
from tlpipe.onnx_export.bundle import EXACT, Bundle
from tlpipe.params import Section
from tlpipe.resampling import detectable_loss, group_numbers, paired_difference
from tlpipe.sources.candidates import Reject

_log = logging.getLogger(__name__)
_CONFIDENCE = 0.95

Verdict = Literal["holds", "fails", "cannot tell"]


class Bounds(Section):
    """What a version must reach before it goes into production; on its test split, in fp32."""

    accuracy: float = Field(default=0.0, ge=0, le=1, description="Accuracy, at least.")
    recall: float = Field(
        default=0.0, ge=0, le=1, description="Recall of every class, at least; each must be tested."
    )
    images: int = Field(
        default=20, ge=1, description="Test images, at least; those of one group count as one."
    )
    loss: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description=(
            "How far its accuracy may be below that of the best of the last versions in "
            "production, as far as the test images can tell. One that is lower beyond chance "
            "never passes."
        ),
    )
    last: int = Field(
        default=5,
        ge=1,
        description=(
            "How many of the last versions in production it is compared with, so that small "
            "losses do not add up."
        ),
    )
    calibration_error: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=(
            "Calibration error, at most: the debiased root mean square difference between "
            "confidence and accuracy (Kumar, Liang and Ma, 2019)."
        ),
    )
    milliseconds: float | None = Field(
        default=None, gt=0, description="Time of an answer for one image, at most."
    )
    megabytes: float | None = Field(
        default=None, gt=0, description="Size of the exact graph, at most."
    )
    below_validation: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="By how much test accuracy may be below validation accuracy beyond chance.",
    )
    other_labels: bool = Field(
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
class Rival:
    """A version that is or was in production; ``trained``: the keys of its images, where known."""

    version: str
    bundle: Bundle
    trained: frozenset[bytes] | None


@dataclass(frozen=True)
class Measured:
    """The stored images that a bundle is judged on: of the workspace that it was made in."""

    pixels: Path
    manifest: Path
    split: Path

    def check(self, bundle: Bundle) -> None:
        """Check that these are the images that the bundle was made with, parted as then.

        Raises:
            GateError: they are others, so nothing can be said.
        """
        commit = bundle.provenance.get("git_commit") or "its commit"
        advice = (
            f"so it cannot be compared on its test images. Go to the workspace where it was made, "
            f"or check out {commit} and run 'dvc repro evaluate'."
        )
        for path in (self.manifest, self.split, self.pixels):
            if not path.exists():
                raise GateError(f"{path} is not here, {advice}")
        made_with = (
            bundle.provenance["origin"]["data_sha256"],
            bundle.provenance.get("split_sha256"),
        )
        here = files.sha256(self.manifest), files.sha256(self.split)
        if here != made_with or packed.load(self.pixels).sampling != sampling_of(bundle):
            raise GateError(
                f"what {self.manifest}, {self.split} and {self.pixels} hold is not the data of the "
                f"version to be promoted, {advice}"
            )


def judge(
    candidate: Bundle,
    version: str,
    rivals: Sequence[Rival],
    *,
    measured: Measured,
    source: ingest.Params,
    held_out: Path | None,
    signature: Path | None,
    bounds: Bounds,
) -> Decision:
    """Compare a version with the one in production, the first of the rivals, and those before it.

    ``source``: from where the images are read anew where a rival sees them differently.
    ``held_out``: predictions of the candidate's training for images that it held out, and
    ``signature``: the candidate's; None where its run has none.

    Raises:
        GateError: the version in production cannot be measured on these images.
    """
    squares = packed.load(measured.pixels).array
    (part,) = answers.parts(("test",), candidate.labels, squares, measured.manifest, measured.split)
    threads = candidate.provenance["origin"]["threads"]
    predictor = Predictor(candidate, threads=threads)
    given = part.ask(predictor, f"version {version}")
    recalls = _recalls(given, candidate.labels)
    accuracy, guessed = float(given.hits.mean()), max(np.bincount(part.truth)) / len(part.truth)
    leaked = int(_in_training(part, trained(measured.split), measured).sum())
    groups = int(group_numbers(part.groups).max()) + 1
    rules = [
        Rule("images", str(groups), f"at least {bounds.images}", _holds(groups >= bounds.images)),
        _at_least("accuracy", accuracy, bounds.accuracy),
        Rule(
            "skill",
            f"{accuracy:.4f}",
            f"above {guessed:.4f}, which the most frequent class alone has",
            _holds(accuracy > guessed),
        ),
        _recall(recalls, candidate.labels, bounds.recall),
        Rule("leaks", f"{leaked} test images", "none that training has seen", _holds(leaked == 0)),
        _validation(given, part, candidate, held_out, measured.split, bounds.below_validation),
    ]
    error = scores.calibration_error(given.probabilities, part.truth, part.groups, _CONFIDENCE)
    numbers: dict[str, Any] = {
        "images": len(part.rows),
        "groups": groups,
        "accuracy": accuracy,
        "recall": recalls,
        "calibration_error": error["value"] if error else None,
        "milliseconds": speed.milliseconds_for(predictor, squares, 1),
        "megabytes": candidate.graphs[EXACT].stat().st_size / 1e6,
    }
    for name in ("calibration_error", "milliseconds", "megabytes"):
        if (most := getattr(bounds, name)) is not None:
            rules.append(_at_most(name, numbers[name], most))
    if bounds.public_key is not None:
        rules.append(_signed(candidate, Path(bounds.public_key), signature))
    if rivals:
        # The best of several is found by chance more often: Dunn (1961), Multiple comparisons
        # among means, JASA 56.
        confidence = 1 - (1 - _CONFIDENCE) / len(rivals)
        compared = []
        for rival in rivals:
            try:
                compared.append(
                    _compare(rival, candidate, given.hits, part, measured, source, confidence)
                )
            except GateError as error:
                if rival is rivals[0]:
                    raise
                _log.warning("nothing is compared with version %s: %s", rival.version, error)
        rules += [
            _change(compared, bounds.loss),
            _labels(candidate, rivals[0].bundle, bounds.other_labels),
        ]
        numbers["compared"] = [asdict(one) for one in compared]
    champion = rivals[0].version if rivals else None
    return Decision(version, champion, tuple(rules), numbers)


def _holds(is_so: bool) -> Verdict:
    return "holds" if is_so else "fails"


def _recalls(given: Answers, labels: Sequence[str]) -> dict[str, float]:
    """Return the share of right answers for each class that has test images."""
    return {
        label: float(given.hits[given.truth == number].mean())
        for number, label in enumerate(labels)
        if (given.truth == number).any()
    }


def _recall(recalls: Mapping[str, float], labels: Sequence[str], least: float) -> Rule:
    """Ask for the recall of the worst class; of one without test images nobody knows it."""
    worst = min(recalls, key=lambda label: recalls[label])
    unknown = [label for label in labels if label not in recalls]
    untested = f"; without test images: {', '.join(unknown)}" if unknown else ""
    verdict = _holds(recalls[worst] >= least)
    if verdict == "holds" and unknown and least:
        verdict = "cannot tell"
    found = f"{recalls[worst]:.4f} (class {worst}{untested})"
    return Rule("recall", found, f"at least {least:.4f}", verdict)


def trained(split: Path) -> frozenset[bytes]:
    """Return the keys of the images that train a model, by its split table.

    Raises:
        ArtifactError: the table is damaged, or of another version of tlpipe.
    """
    seen = ("train", "validation")
    return frozenset(row.key for row in load_split(split) if row.split in seen)


def _in_training(part: Part, keys: Container[bytes], measured: Measured) -> npt.NDArray[np.bool_]:
    """Return which images are among those of the keys, or have their like there, (N,) bool."""
    alike = {e.group for e in load_manifest(measured.manifest) if e.group and e.key in keys}
    return np.array([e.key in keys or e.group in alike for e in part.entries], bool)


def _validation(
    given: Answers,
    part: Part,
    candidate: Bundle,
    held_out: Path | None,
    split: Path,
    bound: float,
) -> Rule:
    """Compare with the accuracy on images held out of training."""
    by = f"by more than {bound:g} " if bound else ""
    expected = f"test accuracy that is not below it {by}beyond chance"
    if held_out is None:
        advice = "register it anew: 'dvc repro --force --single-item register'"
        found = "no predictions held out in its run"
        return Rule("validation", found, f"some; {advice}", "cannot tell")
    try:
        validation, groups = answers.of_held_out(held_out, candidate, split)
    except ArtifactError as error:
        return Rule("validation", str(error), expected, "cannot tell")
    compared = generalisation.compare(validation.hits, groups, given.hits, part.groups, _CONFIDENCE)
    is_near = compared["difference"]["high"] >= -bound
    return Rule("validation", generalisation.describe(compared), expected, _holds(is_near))


@dataclass(frozen=True)
class Compared:
    """How a candidate did beside a version that is or was in production.

    Attributes:
        version: of the other.
        accuracy: of the other, on test images that it has not trained on; ``None`` without any.
        trained_on: how many of the test images the other has trained on, which do not count;
            ``None`` where its run does not say.
        unread: how many it cannot read, for want of a range of values: they count as wrong.
        change: of accuracy, with its interval; ``None`` without images.
        detectable_loss: the smallest loss that such images show in four of five cases.
        groups: of the images that count.
    """

    version: str
    accuracy: float | None
    trained_on: int | None
    unread: int
    change: dict[str, float] | None
    detectable_loss: float | None
    groups: int


def _compare(
    rival: Rival,
    candidate: Bundle,
    hits: Hits,
    part: Part,
    measured: Measured,
    source: ingest.Params,
    confidence: float,
) -> Compared:
    """Compare on the test images that the other has not trained on."""
    trained_on, fresh = None, np.ones(len(part.rows), bool)
    if rival.trained is not None:
        fresh = ~_in_training(part, rival.trained, measured)
        trained_on = int((~fresh).sum())
    if not fresh.any():
        return Compared(rival.version, None, trained_on, 0, None, None, 0)
    new = part.some(np.flatnonzero(fresh).tolist())
    theirs, unread = _hits_of(rival, candidate, new, source)
    change = paired_difference(theirs, hits[fresh], new.groups, confidence)
    return Compared(
        rival.version,
        float(theirs.mean()),
        trained_on,
        unread,
        change,
        detectable_loss(change),
        int(group_numbers(new.groups).max()) + 1,
    )


def _hits_of(
    rival: Rival, candidate: Bundle, part: Part, source: ingest.Params
) -> tuple[Hits, int]:
    """Return which of the images another version names right.

    And how many it cannot read, for want of a range of values or of contrast in its own: it names
    none of them.
    """
    numbers = {label: number for number, label in enumerate(rival.bundle.labels)}
    # A class that it does not know it cannot name.
    truth = np.array([numbers.get(candidate.labels[true], -1) for true in part.truth], np.int64)
    theirs, ours = (sampling_of(bundle) for bundle in (rival.bundle, candidate))
    same = replace(part, truth=truth)
    predictor = Predictor(rival.bundle, threads=candidate.provenance["origin"]["threads"])
    if theirs == ours:
        return same.ask(predictor, f"version {rival.version}").hits, 0
    hits, read = np.zeros(len(same.rows), bool), np.zeros(len(same.rows), bool)
    with TemporaryDirectory() as folder:
        for which, seen in _seen_by(theirs, ours, same, Path(folder), source):
            hits[which] = seen.ask(predictor, f"version {rival.version}").hits
            read[which] = True
    return hits, int((~read).sum())


def _seen_by(
    theirs: Sampling, ours: Sampling, part: Part, folder: Path, source: ingest.Params
) -> Iterator[tuple[list[int], Part]]:
    """Yield images as another classifier sees them, stored in a folder; not what it cannot read.

    With each part: which of the images it holds. Where only the range of values is another, images
    of 8 bits are the same.

    Raises:
        GateError: an image is no longer there.
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
    writer, places, refused = packed.Writer(folder, theirs), dict[bytes, int](), set[bytes]()
    try:
        for outcome in ingest.some(source, theirs, wanted.keys()):
            if isinstance(outcome, Reject):
                if outcome.reason in UNREADABLE:
                    refused.add(wanted[outcome.path])
                continue
            key = outcome.entry.key
            if key == wanted[outcome.entry.path] and key not in places:
                places[key] = len(places)
                writer.append(key, outcome.square, outcome.thumbnail)
        writer.close()
        writer.finish(decoder="", data_sha256="", data_version="")
    except TlpipeError as error:
        raise GateError(
            f"a version that is or was in production sees images differently ({theirs}), and they "
            f"cannot be read again for it: {error}"
        ) from None
    _check_all_there(wanted, {*places, *refused}, source, theirs)
    which = [i for i, entry in enumerate(part.entries) if wanted.get(entry.path) in places]
    if which:
        rows = [places[part.entries[i].key] for i in which]
        yield which, replace(part.some(which), squares=packed.load(folder).array, rows=rows)


def _check_all_there(
    wanted: Mapping[str, bytes], found: Container[bytes], source: ingest.Params, sampling: Sampling
) -> None:
    if missing := [path for path, key in wanted.items() if key not in found]:
        raise GateError(
            f"{len(missing)} test images, such as {missing[0]}, are no longer in {source.source}, "
            f"or cannot be read as a version in production does ({sampling}), so it cannot be "
            f"measured on them. Fetch the data: 'dvc pull'."
        )


def sampling_of(bundle: Bundle) -> Sampling:
    """Return how a bundle wants images to be stored."""
    seen = bundle.preprocessing
    return Sampling(**{key: getattr(seen, key) for key in Sampling.model_fields})


def _change(compared: Sequence[Compared], loss: float) -> Rule:
    """Compare with the best of the last versions in production, on the images new to it.

    Worse beyond chance fails. Where it may be worse by more than ``loss``, the images cannot tell:
    the lower end of the interval is a test of non-inferiority (Piaggio et al. (2012), Reporting of
    noninferiority and equivalence randomized trials, JAMA 308).
    """
    known = [(one, one.change) for one in compared if one.change is not None]
    expected = f"not below 0 beyond chance, and above {-loss:+.4f} as far as can be told"
    if not known:
        versions = ", ".join(one.version for one in compared)
        found = f"every test image trained version {versions}, so nothing can be compared"
        return Rule("accuracy_change", found, expected, "cannot tell")
    best, change = min(known, key=lambda one: one[1]["value"])
    verdict: Verdict = "holds" if change["low"] >= -loss else "cannot tell"
    if change["high"] < 0:
        verdict = "fails"
    which = f"version {best.version}"
    if len(compared) > 1:
        which += f", the best of the last {len(compared)} in production"
    parts = [
        f"{change['value']:+.4f} against {which} ({change['confidence']:.0%} interval "
        f"{change['low']:+.4f} to {change['high']:+.4f})",
        f"{best.groups} test images show a loss from {best.detectable_loss:.4f} on",
    ]
    if verdict == "cannot tell" and change["value"] > -loss:
        ratio = (change["value"] - change["low"]) / (change["value"] + loss)
        parts.append(f"some {math.ceil(best.groups * ratio**2)} could tell")
    if best.trained_on is None:
        parts.append("whether it trained on some of them is not known")
    elif best.trained_on:
        parts.append(f"{best.trained_on} that it trained on, or their like, do not count")
    if best.unread:
        parts.append(
            f"{best.unread} test images count as wrong for it, which cannot read them (more than 8 "
            f"bits)"
        )
    return Rule("accuracy_change", "; ".join(parts), expected, verdict)


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


def _signed(candidate: Bundle, key: Path, signature: Path | None) -> Rule:
    expected = f"a signature by the owner of {key}"
    if signature is None:
        return Rule("signature", "none", f"{expected}: 'tlpipe sign NAME@ALIAS'", "fails")
    try:
        signing.check(candidate.folder, key, signature)
    except TlpipeError as error:
        return Rule("signature", str(error), expected, "fails")
    return Rule("signature", "valid", expected, "holds")


def _at_least(name: str, found: float, least: float) -> Rule:
    return Rule(name, f"{found:.4f}", f"at least {least:.4f}", _holds(found >= least))


def _at_most(name: str, found: float | None, most: float) -> Rule:
    if found is None:
        expected = (
            f"at most {most:.4f}; test on images of two groups or more, or set "
            f"register.gate.{name} to null"
        )
        return Rule(name, scores.UNKNOWN, expected, "cannot tell")
    return Rule(name, f"{found:.4f}", f"at most {most:.4f}", _holds(found <= most))
