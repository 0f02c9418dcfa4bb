"""The gate: may this bundle go into production?

Both the candidate and the champion answer for the candidate's test split now; what was measured in
other times or on other images counts for nothing. Every rule gives a line: what was found, what was
expected. A rule that nobody set a bound for is not asked.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
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
from tlpipe.resampling import paired_difference
from tlpipe.sources.candidates import Reject

_CONFIDENCE = 0.95


class Bounds(Section):
    """What a version must reach before it goes into production; on its test split, in fp32."""

    accuracy: float = Field(default=0.0, ge=0, le=1, description="Accuracy, at least.")
    recall: float = Field(
        default=0.0, ge=0, le=1, description="Recall of every class, at least; each must be tested."
    )
    loss: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="By how much its accuracy may be below that of the version in production.",
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
    passed: bool


@dataclass(frozen=True)
class Decision:
    """Whether a version may replace another (None: there is none), with every number."""

    candidate: str
    champion: str | None
    rules: tuple[Rule, ...]
    numbers: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return all(rule.passed for rule in self.rules)

    @property
    def reasons(self) -> str:
        """The rules that do not hold, in words."""
        lines = [f"{r.name} {r.found}, expected {r.expected}" for r in self.rules if not r.passed]
        return "; ".join(lines)

    def content(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return asdict(self) | {"passed": self.passed}


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
    champion: Bundle | None,
    *,
    names: tuple[str, str | None],
    measured: Measured,
    source: ingest.Params,
    held_out: Path | None,
    signature: Path | None,
    bounds: Bounds,
) -> Decision:
    """Compare a candidate with the champion; ``names`` are their versions.

    ``source``: from where the images are read anew where the champion sees them differently.
    ``held_out``: predictions of the candidate's training for images that it held out, and
    ``signature``: the candidate's; None where its run has none.

    Raises:
        GateError: the champion cannot be measured on these images.
    """
    squares = packed.load(measured.pixels).array
    (part,) = answers.parts(("test",), candidate.labels, squares, measured.manifest, measured.split)
    threads = candidate.provenance["origin"]["threads"]
    predictor = Predictor(candidate, threads=threads)
    given = part.ask(predictor, f"version {names[0]}")
    recalls = _recalls(given, candidate.labels)
    accuracy, guessed = float(given.hits.mean()), max(np.bincount(part.truth)) / len(part.truth)
    worst = min(recalls, key=lambda label: recalls[label])
    unknown = [label for label in candidate.labels if label not in recalls]
    untested = f"; without test images: {', '.join(unknown)}" if unknown else ""
    leaked = _leaked(measured)
    rules = [
        _at_least("accuracy", accuracy, bounds.accuracy),
        Rule(
            "skill",
            f"{accuracy:.4f}",
            f"above {guessed:.4f}, which the most frequent class alone has",
            bool(accuracy > guessed),
        ),
        Rule(
            "recall",
            f"{recalls[worst]:.4f} (class {worst}{untested})",
            f"at least {bounds.recall:.4f}",
            recalls[worst] >= bounds.recall and not (untested and bounds.recall),
        ),
        Rule("leaks", f"{leaked} test images", "none that training has seen", not leaked),
        _validation(given, part, candidate, held_out, measured.split, bounds.below_validation),
    ]
    error = scores.calibration_error(given.probabilities, part.truth, part.groups, _CONFIDENCE)
    numbers: dict[str, Any] = {
        "images": len(part.rows),
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
    if champion is not None:
        hits, unread = _hits_of(champion, candidate, part, source, threads, f"version {names[1]}")
        change = paired_difference(hits, given.hits, part.groups, _CONFIDENCE)
        numbers |= {
            "champion_accuracy": float(hits.mean()),
            "champion_cannot_read": unread,
            "change": change,
        }
        rules += [
            _change(change, bounds.loss, unread),
            _labels(candidate, champion, bounds.other_labels),
        ]
    return Decision(names[0], names[1], tuple(rules), numbers)


def _recalls(given: Answers, labels: Sequence[str]) -> dict[str, float]:
    """Return the share of right answers for each class that has test images."""
    return {
        label: float(given.hits[given.truth == number].mean())
        for number, label in enumerate(labels)
        if (given.truth == number).any()
    }


def _leaked(measured: Measured) -> int:
    """Count the test images that are, or whose like are, among those that trained."""
    entries, rows = load_manifest(measured.manifest), load_split(measured.split)
    marks = [
        (row.split, {row.key, entry.group or row.key})
        for entry, row in zip(entries, rows, strict=True)
    ]
    seen = set().union(*(mark for split, mark in marks if split in ("train", "validation")))
    return sum(split == "test" and not mark.isdisjoint(seen) for split, mark in marks)


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
        return Rule("validation", "no predictions held out in its run", f"some; {advice}", False)
    try:
        validation, groups = answers.of_held_out(held_out, candidate, split)
    except ArtifactError as error:
        return Rule("validation", str(error), expected, False)
    found = generalisation.compare(validation.hits, groups, given.hits, part.groups, _CONFIDENCE)
    is_near = found["difference"]["high"] >= -bound
    return Rule("validation", generalisation.describe(found), expected, is_near)


def _hits_of(
    champion: Bundle, candidate: Bundle, part: Part, source: ingest.Params, threads: int, name: str
) -> tuple[Hits, int]:
    """Return which of the candidate's test images the champion names right.

    And how many it cannot read, for want of a range of values or of contrast in its own: it names
    none of them.
    """
    numbers = {label: number for number, label in enumerate(champion.labels)}
    # A class that it does not know it cannot name.
    truth = np.array([numbers.get(candidate.labels[true], -1) for true in part.truth], np.int64)
    theirs, ours = (sampling_of(bundle) for bundle in (champion, candidate))
    same = replace(part, truth=truth)
    predictor = Predictor(champion, threads=threads)
    if theirs == ours:
        return same.ask(predictor, name).hits, 0
    with TemporaryDirectory() as folder:
        if theirs != ours.model_copy(update={"value_range": theirs.value_range}):
            return _read_again(same, Path(folder), source, theirs).ask(predictor, name).hits, 0
        hits, read = np.zeros(len(same.rows), bool), np.zeros(len(same.rows), bool)
        for which, seen in _in_another_range(same, Path(folder), source, theirs):
            hits[which], read[which] = seen.ask(predictor, name).hits, True
    return hits, int((~read).sum())


def _in_another_range(
    part: Part, folder: Path, source: ingest.Params, sampling: Sampling
) -> Iterator[tuple[list[int], Part]]:
    """Yield images of a part as who has another range of values sees them; not what it cannot read.

    With each part: which of the images it holds. Those of 8 bits are the same in every range.

    Raises:
        GateError: an image is no longer there.
    """
    plain = [i for i, entry in enumerate(part.entries) if not is_deep(entry.mode)]
    deep = [i for i, entry in enumerate(part.entries) if is_deep(entry.mode)]
    if plain:
        yield plain, part.some(plain)
    if not deep or sampling.value_range is None:
        return
    others = part.some(deep)
    wanted = {entry.path: entry.key for entry in others.entries}
    writer, places, refused = packed.Writer(folder, sampling), dict[bytes, int](), set[bytes]()
    try:
        for outcome in ingest.some(source, sampling, wanted.keys()):
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
        raise _unreadable(sampling, error) from None
    _check_all_there(others, {*places, *refused}, source, sampling)
    which = [i for i in deep if part.entries[i].key in places]
    if which:
        rows = [places[part.entries[i].key] for i in which]
        yield which, replace(part.some(which), squares=packed.load(folder).array, rows=rows)


def _read_again(part: Part, folder: Path, source: ingest.Params, sampling: Sampling) -> Part:
    """Return the same images as another classifier sees them."""
    outputs = {name: folder / name for name in ("manifest", "rejects", "duplicates", "report")}
    try:
        ingest.run(
            **outputs,
            pixels=folder / "pixels",
            data_version="",
            params=source.model_copy(update=sampling.model_dump()),
        )
    except TlpipeError as error:
        raise _unreadable(sampling, error) from None
    places = {entry.key: row for row, entry in enumerate(load_manifest(outputs["manifest"]))}
    _check_all_there(part, places, source, sampling)
    rows = [places[entry.key] for entry in part.entries]
    return replace(part, squares=packed.load(folder / "pixels").array, rows=rows)


def _unreadable(sampling: Sampling, error: TlpipeError) -> GateError:
    return GateError(
        f"the version in production sees images differently ({sampling}), and they cannot be "
        f"read again for it: {error}"
    )


def _check_all_there(
    part: Part, found: Container[bytes], source: ingest.Params, sampling: Sampling
) -> None:
    if missing := [entry.path for entry in part.entries if entry.key not in found]:
        raise GateError(
            f"{len(missing)} test images, such as {missing[0]}, are no longer in {source.source}, "
            f"or cannot be read as the version in production does ({sampling}), so it cannot be "
            f"measured on them. Fetch the data: 'dvc pull'."
        )


def sampling_of(bundle: Bundle) -> Sampling:
    """Return how a bundle wants images to be stored."""
    seen = bundle.preprocessing
    return Sampling(**{key: getattr(seen, key) for key in Sampling.model_fields})


def _change(change: dict[str, float], loss: float, unread: int = 0) -> Rule:
    found = (
        f"{change['value']:+.4f} ({_CONFIDENCE:.0%} interval {change['low']:+.4f} to "
        f"{change['high']:+.4f})"
    )
    if unread:
        found += (
            f"; {unread} test images count as wrong for the version in production, which cannot "
            f"read them (more than 8 bits)"
        )
    expected = f"at least {-loss:+.4f}, and not below 0 beyond chance"
    return Rule(
        "accuracy_change", found, expected, change["value"] >= -loss and change["high"] >= 0
    )


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
    return Rule("labels", found, expected, may_differ or is_same)


def _signed(candidate: Bundle, key: Path, signature: Path | None) -> Rule:
    expected = f"a signature by the owner of {key}"
    if signature is None:
        return Rule("signature", "none", f"{expected}: 'tlpipe sign NAME@ALIAS'", False)
    try:
        signing.check(candidate.folder, key, signature)
    except TlpipeError as error:
        return Rule("signature", str(error), expected, False)
    return Rule("signature", "valid", expected, True)


def _at_least(name: str, found: float, least: float) -> Rule:
    return Rule(name, f"{found:.4f}", f"at least {least:.4f}", found >= least)


def _at_most(name: str, found: float | None, most: float) -> Rule:
    if found is None:
        expected = (
            f"at most {most:.4f}; test on images of two groups or more, or set "
            f"register.gate.{name} to null"
        )
        return Rule(name, scores.UNKNOWN, expected, False)
    return Rule(name, f"{found:.4f}", f"at most {most:.4f}", found <= most)
