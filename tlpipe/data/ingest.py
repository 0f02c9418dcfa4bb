"""Stage ``ingest``: read every file of the source once, refuse the bad ones, keep the pixels."""

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tlpipe import files
from tlpipe.data import pixels as packed
from tlpipe.data import sources
from tlpipe.data.images import Pixels, Sampling, read_square
from tlpipe.data.manifest import Entry, Reject, save_manifest, save_rejects
from tlpipe.errors import DataError, ImageError
from tlpipe.params import Section
from tlpipe.progress import track

_log = logging.getLogger(__name__)


class Params(Section):
    """What to read, and how large the pixels are kept."""

    source: str = Field(
        min_length=1,
        description="A folder of class folders, or the YAML file of a built-in data set.",
    )
    short_side_px: int = Field(
        default=256, ge=32, le=1024, description="Length of the stored images' side, in pixels."
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bicubic", description="How images are resized."
    )


def run(*, manifest: Path, rejects: Path, pixels: Path, report: Path, params: Params) -> None:
    """Write the manifest, the rejected files, the pixels and the data report.

    Raises:
        DataError: the source is missing, or what is usable of it makes no data set.
    """
    candidates = sources.find(Path(params.source))
    sampling = Sampling(short_side_px=params.short_side_px, interpolation=params.interpolation)
    with files.replacing_folder(pixels) as folder:
        array = packed.create(folder, len(candidates), sampling)
        outcomes = _read_all(candidates, array, sampling)
        outcomes = _without_conflicts(outcomes)
        entries = [outcome for outcome in outcomes if isinstance(outcome, Entry)]
        refused = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        save_rejects(rejects, refused)
        _check_usable(candidates, entries, rejects)
        if refused:
            usable = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Entry)]
            packed.keep_rows(folder, usable)
        save_manifest(manifest, entries)
        packed.finish(folder, sampling, files.sha256(manifest))
    files.write_json(report, _describe(params.source, entries, refused))
    _log.info("%s images in %s classes, %s rejected", *_counts(entries, refused))


def _read_all(
    candidates: Sequence[sources.Candidate], array: Pixels, sampling: Sampling
) -> list[Entry | Reject]:
    """Decode every file into its row of ``array``, on all cores; order and bytes stay the same."""

    def read(row: int) -> Entry | Reject:
        candidate = candidates[row]
        try:
            data = candidate.read()
            array[row], header = read_square(data, sampling)
        except ImageError as error:
            return Reject(candidate.path, error.reason, error.detail)
        sha256 = hashlib.sha256(data).hexdigest()
        return Entry(
            path=candidate.path,
            label=candidate.label,
            sha256=sha256,
            bytes=len(data),
            width=header.width,
            height=header.height,
            mode=header.mode,
            group=sha256[:16],
            split=candidate.split,
        )

    count = len(candidates)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(track(pool.map(read, range(count)), total=count, description="ingest"))


def _without_conflicts(outcomes: Sequence[Entry | Reject]) -> list[Entry | Reject]:
    """Refuse every file whose very bytes stand under two labels."""
    labels = defaultdict(set)
    for outcome in outcomes:
        if isinstance(outcome, Entry):
            labels[outcome.sha256].add(outcome.label)
    checked: list[Entry | Reject] = []
    for outcome in outcomes:
        if isinstance(outcome, Entry) and len(labels[outcome.sha256]) > 1:
            names = ", ".join(sorted(labels[outcome.sha256]))
            outcome = Reject(outcome.path, "conflict", f"the same image under the labels {names}")
        checked.append(outcome)
    return checked


def _check_usable(
    candidates: Sequence[sources.Candidate], entries: Sequence[Entry], rejects: Path
) -> None:
    usable = Counter(entry.label for entry in entries)
    for label, found in sorted(Counter(candidate.label for candidate in candidates).items()):
        if usable[label] < 3:
            raise DataError(
                f"the class {label!r} has {usable[label]} usable images of {found}; expected at "
                f"least 3: one each to train, to validate and to test. Add images or take the "
                f"class out; {rejects} says what was refused."
            )


def _describe(source: str, entries: Sequence[Entry], refused: Sequence[Reject]) -> dict[str, Any]:
    return {
        "source": Path(source).name,
        "images": len(entries),
        "classes": dict(Counter(entry.label for entry in entries)),
        "given_splits": dict(Counter(entry.split for entry in entries if entry.split)),
        "rejected": dict(Counter(reject.reason for reject in refused)),
        "modes": dict(Counter(entry.mode for entry in entries)),
    }


def _counts(entries: Sequence[Entry], refused: Sequence[Reject]) -> tuple[int, int, int]:
    return len(entries), len({entry.label for entry in entries}), len(refused)
