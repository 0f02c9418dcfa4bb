"""Stage ``ingest``: read every file of the source once, reject the bad ones, keep the pixels."""

import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import features
from pydantic import Field, field_validator, model_validator

from tlpipe import files
from tlpipe.code_digest import of_modules, versions
from tlpipe.data import charts
from tlpipe.data.images import LIBHEIF, UNREAD, Sampling
from tlpipe.data.journal import Earlier, FirstPass, Journal, Outcome, remember
from tlpipe.data.manifest import Duplicate, Entry, save_duplicates, save_manifest, save_rejects
from tlpipe.data.reading import read_all
from tlpipe.data.values import Measured, is_deep
from tlpipe.errors import ArtifactError, DataError
from tlpipe.params import Section, check_effect
from tlpipe.progress import track
from tlpipe.sources import Candidate, Reject, decisions, listing
from tlpipe.sources.storage import Folder
from tlpipe.sources.tables import Role

_log = logging.getLogger(__name__)
_CODE = tuple(f"tlpipe.data.{name}" for name in ("images", "reading", "values"))
_DECODERS = ("pillow", "pillow-heif")
_UNSEEN = 0.4  # share of the pictures' area; photos of 3:2 lose 0.33
_CODECS = ("libjpeg_turbo", "libtiff", "webp", "avif")


class Params(Section):
    """What to read, and how large the pixels are kept."""

    source: str = Field(
        min_length=1,
        description="A folder, a zip or tar archive, an address like s3://BUCKET/FOLDER, or the "
        "YAML file of a built-in data set.",
    )
    kind: listing.Kind = Field(
        default="auto",
        description="What labels are read from; recognised by default.",
    )
    pattern: str | None = Field(
        default=None,
        description="For folders: a regular expression, searched in each file's path; its group "
        "'label', and if wanted 'split' and 'group', say what they match.",
    )
    columns: dict[Role, str | None] = Field(
        default={},
        description="For tables: the names of columns by what they hold, such as {path: file, "
        "label: species}, where they are not known ones; null where no column does, as in {group: "
        "null}.",
    )
    label_files: str | None = Field(
        default=None,
        min_length=1,
        description="For tables and annotations: which files to read labels from where there are "
        "several, such as annotations/instances_*.json.",
    )
    box_margin: float = Field(
        default=0.1,
        ge=0,
        le=2,
        description="For boxes: what is added on each side, as a share of the box's longer side. "
        "The part is then widened to a square as far as the photo reaches.",
    )
    background: str | None = Field(
        default=None,
        min_length=1,
        description="For boxes: a class of this name, of one square a photo that no box touches.",
    )
    follow_links: bool = Field(
        default=False,
        description="Whether links of a folder may lead outside of it, and to folders. Links into "
        "a cache of DVC are always followed.",
    )
    decisions: str | None = Field(
        default=None,
        min_length=1,
        description="The table of decisions that 'tlpipe label' writes, such as labels.csv, to be "
        "applied.",
    )
    unlabelled: str | None = Field(
        default=None,
        min_length=1,
        description="A folder of unlabelled images, of which those are read that the table of "
        "decisions labels.",
    )
    max_rejected: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Largest share of rejected images; with more, ingest stops and writes nothing.",
    )
    short_side_px: Literal["auto"] | Annotated[int, Field(ge=32, le=1024)] = Field(
        default="auto",
        description="Length of the stored images' side, in pixels; auto is what embed.backbone was "
        "trained with; embed rejects any other.",
    )
    interpolation: Literal["auto", "bilinear", "bicubic"] = Field(
        default="auto", description="How images are resized; auto as above."
    )
    value_range: Literal["auto"] | tuple[float, float] | None = Field(
        default="auto",
        description="For pictures of more than 8 bits: [LOW, HIGH], the values that become black "
        "and white. auto measures all of them and takes what their bits hold, unless odd values "
        "leave the others no contrast; null rejects them.",
    )

    @field_validator("value_range", mode="before")
    @classmethod
    def _has_ends(cls, found: object) -> object:
        if not isinstance(found, list | tuple):
            return found
        match found:
            case [int() | float() as low, int() | float() as high] if low < high:
                return float(low), float(high)
        raise ValueError("it must be auto, null or [LOW, HIGH], two numbers of which one is lower")

    @field_validator("columns")
    @classmethod
    def _are_different(cls, columns: dict[Role, str | None]) -> dict[Role, str | None]:
        named = [column for column in columns.values() if column is not None]
        if missing := [role for role in ("path", "label") if columns.get(role, "") is None]:
            raise ValueError(f"a table without {missing[0]} says nothing; it must name a column")
        if len({*named}) < len(named):
            raise ValueError("one column cannot be two things; it must name different columns")
        return columns

    @field_validator("pattern")
    @classmethod
    def _has_label(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if "label" not in groups:
            raise ValueError("it must have a group (?P<label>...)")
        return pattern

    @model_validator(mode="after")
    def _is_of_folders(self) -> "Params":
        if self.pattern is not None and self.kind not in ("auto", "folders"):
            raise ValueError(
                f"pattern reads labels from the names of folders and files, and kind is "
                f"{self.kind}; take one of both out"
            )
        return self

    @model_validator(mode="after")
    def _has_labels_of_unlabelled(self) -> "Params":
        if self.decisions is None:
            reason = "ingest.decisions is null, and would say which class each of its images is of"
            check_effect("ingest", self, ("unlabelled",), reason)
        return self

    @model_validator(mode="after")
    def _has_files_of_labels(self) -> "Params":
        if self.label_files is not None and (self.pattern or self.kind == "folders"):
            raise ValueError("label_files has no effect where labels are read from folders' names")
        return self


def run(
    *,
    manifest: Path,
    rejects: Path,
    duplicates: Path,
    pixels: Path,
    data_report: Path,
    data_version: str,
    params: Params,
) -> None:
    """Write the manifest, the rejected files, the near duplicates, the pixels and the data report.

    ``data_version`` is DVC's hash of all that is read. What stands in the outputs from an earlier
    run is used: images that it has are not decoded again.

    Raises:
        DataError: the source is missing, or what is usable of it makes no data set.
        ValueError: how images are resized is still auto, which the backbone decides.
    """
    paths = {"manifest": manifest, "rejects": rejects, "duplicates": duplicates, "pixels": pixels}
    with opened(params) as source:
        _store(source, **paths, data_report=data_report, data_version=data_version, params=params)


def run_unlabelled(
    *,
    address: str,
    manifest: Path,
    rejects: Path,
    duplicates: Path,
    pixels: Path,
    data_report: Path,
    params: Params,
) -> None:
    """Write the same of an unlabelled folder, whose images have an empty label.

    ``params``: how images are resized, with nothing left to be decided.

    Raises:
        DataError: the folder is missing, or has no image that can be read.
    """
    read = params.model_copy(update={"source": address, "decisions": None, "unlabelled": None})
    paths = {"manifest": manifest, "rejects": rejects, "duplicates": duplicates, "pixels": pixels}
    with listing.unlabelled(address) as (storage, names):
        source = listing.Source(
            storage,
            lambda: (Candidate(name, name, "") for name in names),
            counts=Counter({"": len(names)}),
        )
        _store(source, **paths, data_report=data_report, data_version="", params=read)


def _store(
    source: listing.Source,
    *,
    manifest: Path,
    rejects: Path,
    duplicates: Path,
    pixels: Path,
    data_report: Path,
    data_version: str,
    params: Params,
) -> None:
    value_range = None if params.value_range == "auto" else params.value_range
    resizing = params.model_dump(include={"short_side_px", "interpolation"})
    sampling = Sampling(**resizing, value_range=value_range)
    decoder, compared = decoder_name(params.box_margin), _compared()
    outputs = (manifest, duplicates, pixels, data_report)
    earlier = Earlier(*outputs, sampling=sampling, decoder=decoder, compared=compared)
    is_labelled = any(source.counts)
    with files.replacing_folder(pixels) as folder:
        for note in source.notes:
            _log.info("%s", note)
        if params.value_range == "auto":
            sampling = sampling.model_copy(update={"value_range": earlier.value_range})
        measured, applied = Measured(sampling.value_range), decisions.Applied(source.decisions)
        journal = _read(source, folder, sampling, params.box_margin, earlier, measured, applied)
        if params.value_range == "auto" and measured.range() != sampling.value_range:
            sampling = sampling.model_copy(update={"value_range": measured.range()})
            measured, first = Measured(sampling.value_range), journal.set_aside()
            journal = _read(source, folder, sampling, params.box_margin, first, measured, applied)
            shutil.rmtree(first.pixels.array.folder)
        if params.value_range == "auto":
            measured.check()
        _say_range(measured, sampling, params)
        groups = journal.group(earlier)
        rejected = sorted([*journal.rejects, *source.rejects], key=lambda reject: reject.path)
        save_rejects(rejects, rejected)
        usable = journal.labels(groups.keep)
        if isinstance(params.value_range, tuple) and not measured.count:
            entries = journal.entries(groups, data_version)
            if not any(is_deep(entry.mode) for entry in entries):
                reason = f"no picture of {params.source} has more than 8 bits"
                check_effect("ingest", params, ("value_range",), reason)
        if is_labelled:
            counts = source.counts - applied.taken
            _check_usable(counts, usable, rejected, rejects, params.max_rejected)
        elif not usable:
            raise DataError(
                f"{params.source} has no image that can be read: {counted(rejected)}; the first is "
                f"{rejected[0].path!r}: {rejected[0].detail}. Name a folder of images."
            )
        writer = journal.pixels(groups.keep)
        entries = journal.entries(groups, data_version)
        described = _Description()
        source.decisions.check_unchanged()
        save_duplicates(duplicates, described.compare(journal.duplicates(groups.pairs)))
        save_manifest(manifest, described.watch(entries))
        remember(manifest, journal.seen)
        journal.remove()
        sha256 = files.sha256(manifest)
        writer.finish(decoder=decoder, data_sha256=sha256, data_version=data_version)
    content = {
        "source": Path(params.source).name,
        "data_version": data_version,
        "decoder": decoder,
        "compared": compared,
        "value_range": sampling.value_range,
        "rejected": dict(sorted(Counter(reject.reason for reject in rejected).items())),
        "duplicates": {
            "equal": groups.equal,
            "nearly_equal": groups.nearly_equal,
            "under_two_labels": described.under_two_labels,
        },
        **described.content(),
    }
    if params.decisions is not None:
        content["decisions"] = dict(sorted(applied.counts.items()))
        content["corrected"] = applied.corrected()
    files.write_json(data_report, content)
    for note in applied.notes():
        _log.info("%s", note)
    for warning in applied.warnings():
        _log.warning("%s", warning)
    if not is_labelled:
        _log.info("%s images, %s rejected", usable.total(), len(rejected))
        return
    _log.info("classes: %s", charts.counts(usable))
    _log.info(
        "%s images in %s classes, %s rejected, %s decoded; %s equal to another one, %s nearly so",
        usable.total(),
        len(usable),
        len(rejected),
        journal.decoded,
        groups.equal,
        groups.nearly_equal,
    )
    if (pair := described.conflict) is not None:
        _log.warning(
            "%s pairs of nearly equal images stand under two labels, such as %s (%s) and %s (%s): "
            "no model can tell them apart. See %s.",
            *(described.under_two_labels, pair.path, pair.label, pair.other, pair.other_label),
            duplicates,
        )
    if described.unseen > _UNSEEN:
        _log.warning(
            "%.0f %% of the pictures' area lies outside of their middle squares, which are all "
            "that is seen of them: what stands at the ends of wide or tall pictures is lost. Crop "
            "or split such pictures before.",
            100 * described.unseen,
        )


def _read(
    source: listing.Source,
    folder: Path,
    sampling: Sampling,
    margin: float,
    known: Earlier | FirstPass,
    measured: Measured,
    applied: decisions.Applied,
) -> Journal:
    """Read the source into a folder; ``measured`` takes the values of more than 8 bits."""
    if isinstance(known, FirstPass):
        outcomes = read_all(source, sampling, margin, None, measured, known)
        journal = Journal(folder, sampling, known.pixels, known.decoded)
    else:
        outcomes = read_all(source, sampling, margin, known, measured)
        journal = Journal(folder, sampling, known.pixels)
    with closing(journal):
        for outcome in track(outcomes, total=source.counts.total(), description="ingest"):
            journal.add(_decided(outcome, applied, source))
    return journal


def addresses(params: Params) -> dict[str, str]:
    """Return what the source is read from, by the keys that name it."""
    named = {key: getattr(params, key) for key in ("source", "decisions", "unlabelled")}
    return {f"ingest.{key}": address for key, address in named.items() if address is not None}


def _table(path: str) -> decisions.Decisions:
    """Read the project's decisions.

    Raises:
        ArtifactError: the table is missing, damaged, or decides differently on one image.
    """
    if not Path(path).is_file():
        raise ArtifactError(
            f"{path}, which ingest.decisions names, is missing; expected the table that 'tlpipe "
            f"label' writes. Get it back, as by 'git checkout -- {path}', or take "
            f"ingest.decisions out of params.yaml."
        )
    return decisions.load(Path(path))


def _decided(outcome: Outcome, applied: decisions.Applied, source: listing.Source) -> Outcome:
    """Return what becomes of an image by the decision on it, if there is one."""
    if isinstance(outcome, Reject):
        return outcome
    entry = outcome.entry
    if source.is_added(entry.path):
        if applied.is_same(entry.path, entry.sha256):
            return outcome
        return Reject(entry.path, "changed", "its bytes are not those that were labelled")
    row = applied.decide(entry.path, entry.sha256, entry.box, entry.label)
    if row is None or row.label == entry.label:
        return outcome
    if not row.label:
        who = f" by {row.by}" if row.by else ""
        return Reject(entry.path, "dropped", f"taken out of {entry.label}{who}, at {row.at}")
    return replace(outcome, entry=entry._replace(label=row.label))


def some(params: Params, sampling: Sampling, names: Container[str]) -> Iterator[Outcome]:
    """Read the images of these names alone, and yield what becomes of each.

    Raises:
        DataError: as ``opened``, or a file changes while it is read.
    """
    with opened(params) as source:
        chosen = replace(
            source, candidates=lambda: (c for c in source.candidates() if c.name in names)
        )
        yield from read_all(chosen, sampling, params.box_margin, None, Measured())


def _say_range(measured: Measured, sampling: Sampling, params: Params) -> None:
    if not measured.count or sampling.value_range is None:
        return
    low, high = sampling.value_range
    _log.info(
        "%s pictures have more than 8 bits, and values from %g to %g: %g becomes black and %g "
        "white.%s",
        measured.count,
        measured.lowest,
        measured.highest,
        low,
        high,
        " They are decoded anew each time, unless ingest.value_range states this range"
        if params.value_range == "auto"
        else "",
    )


@contextmanager
def opened(params: Params) -> Iterator[listing.Source]:
    """Open the source and list it; what cannot be a data set is an error before any work.

    Raises:
        ArtifactError: the table of decisions is missing or damaged.
        DataError: as ``listing.opened``.
        ParamsError: what is set for boxes, tables or links has no effect, as there are none.
    """
    table = None if params.decisions is None else _table(params.decisions)
    with ExitStack() as stack:
        source = stack.enter_context(
            listing.opened(
                params.source,
                kind=params.kind,
                pattern=params.pattern,
                background=params.background,
                columns=params.columns,
                label_files=params.label_files,
                follow_links=params.follow_links,
            )
        )
        for fields, reason in _without_effect(params, source):
            check_effect("ingest", params, fields, reason)
        if not source.has_boxes:
            reason = f"{params.source} holds no boxes"
            check_effect("ingest", params, ("background", "box_margin"), reason)
        for suffixes, advice in UNREAD:
            if count := sum(source.suffixes[suffix] for suffix in suffixes):
                total = source.counts.total()
                text = f"{count} of {total} files are called {suffixes[0]} and cannot be read here"
                source.notes.append(f"{text}: {advice}, or convert them")
        if table is not None:
            table.check_classes(source.counts)
            source = replace(source, decisions=table)
        if params.unlabelled is not None:
            source = stack.enter_context(listing.with_labelled(source, params.unlabelled))
        yield source


def _without_effect(
    params: Params, source: listing.Source
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield keys that have no effect on this source, and why."""
    if source.read_from == "built-in":
        yield ("kind", "pattern", "label_files"), f"{params.source} is a built-in data set"
    if source.read_from != "table":
        yield ("columns",), f"labels are read from {source.read_from}, and from no table"
    if not isinstance(source.storage, Folder):
        yield ("follow_links",), f"{params.source} is no folder of this machine, and has no links"


def decoder_name(box_margin: float) -> str:
    """Name what turns files into pixels: pixels of another decoder are never reused.

    The codecs inside of Pillow count too, since a distribution may build it with its own.
    """
    packages = " ".join(f"{name} {found}" for name, found in versions(*_DECODERS).items())
    codecs = ", ".join(f"{name} {features.version(name)}" for name in _CODECS)
    codecs += f", libheif {LIBHEIF}" if LIBHEIF else ""
    code = of_modules(*_CODE)
    return f"{packages}, {codecs}, code {code}, margin {box_margin:g}"


def _compared() -> str:
    """Name what finds near duplicates: pairs that were found in another way are never reused."""
    return of_modules("tlpipe.data.duplicates", "tlpipe.data.pixels")


def _check_usable(
    found: Counter[str],
    usable: Counter[str],
    rejected: Sequence[Reject],
    rejects: Path,
    max_rejected: float,
) -> None:
    constant = [reject for reject in rejected if reject.reason == "constant"]
    if constant and len(constant) >= usable.total():
        path, _, detail = constant[0]
        raise DataError(
            f"{len(constant)} pictures of more than 8 bits have no contrast, and {usable.total()} "
            f"images are usable; the first is {path!r}: {detail}."
        )
    for label in sorted(found):
        if usable[label] == 0:
            raise DataError(
                f"the class {label!r} has 0 usable images of {found[label]}; expected at least 3: "
                f"one each to train, to validate and to test. Add images or take the class out; "
                f"{rejects} says what was rejected."
            )
    check_rejected(rejected, usable.total(), max_rejected, f"{rejects} names each")


def check_rejected(
    rejected: Sequence[Reject], usable: int, max_rejected: float, where: str
) -> None:
    """Check that not too large a share of the images was rejected; ``where`` says which.

    Raises:
        DataError: more than ``max_rejected``.
    """
    # A square beside the boxes is ours to look for: where there is none, nothing given is lost.
    # What somebody took out is no fault of the source.
    meant = ("no_background", "dropped")
    rejected = [reject for reject in rejected if reject.reason not in meant]
    share = len(rejected) / max(len(rejected) + usable, 1)
    if share > max_rejected:
        raise DataError(
            f"{len(rejected)} of {len(rejected) + usable} images were rejected "
            f"({counted(rejected)}), a share of {share:.3f}; ingest.max_rejected is "
            f"{max_rejected:g}. The first is {rejected[0].path!r}: {rejected[0].detail}. {where}; "
            f"repair or remove them, or raise ingest.max_rejected."
        )


def counted(rejected: Iterable[Reject]) -> str:
    """Return how many were rejected for each reason, as text, the most frequent first."""
    reasons = Counter(reject.reason for reject in rejected)
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())


_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
}


class _Description:
    """Counts what passes by, for the data report."""

    def __init__(self) -> None:
        self._by: dict[str, Counter[str]] = {
            name: Counter() for name in ("classes", "given_splits", "modes", "formats", "sides")
        }
        self._misnamed = 0
        self.under_two_labels = 0
        self.conflict: Duplicate | None = None
        self._whole = self._outside = 0

    def watch(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the entries on, counting them."""
        for entry in entries:
            self._by["classes"][entry.label] += 1
            self._by["given_splits"][entry.split] += bool(entry.split)
            self._by["modes"][entry.mode] += 1
            self._by["formats"][entry.format] += 1
            # The longer side, in steps of a factor of two.
            self._by["sides"][str(2 ** int(math.log2(max(entry.width, entry.height))))] += 1
            file = entry.path.split("#")[0].lower()
            self._misnamed += not file.endswith(_EXTENSIONS[entry.format])
            if not entry.box:
                self._whole += entry.width * entry.height
                self._outside += entry.width * entry.height - min(entry.width, entry.height) ** 2
            yield entry

    @property
    def unseen(self) -> float:
        """The share of the area of whole pictures that lies outside of their middle squares."""
        return self._outside / self._whole if self._whole else 0.0

    def compare(self, pairs: Iterable[Duplicate]) -> Iterator[Duplicate]:
        """Yield nearly equal images on, counting the pairs under two labels."""
        for pair in pairs:
            if pair.label != pair.other_label:
                self.under_two_labels += 1
                self.conflict = self.conflict or pair
            yield pair

    def content(self) -> dict[str, Any]:
        """Return the counts."""
        counts = {name: dict(+counter) for name, counter in self._by.items()}
        return {"images": sum(counts["classes"].values()), "misnamed": self._misnamed, **counts}
