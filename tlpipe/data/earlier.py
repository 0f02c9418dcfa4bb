"""What an earlier run of ``ingest`` has left, so that nothing is decoded twice.

An image is known by its content. A file need not even be read to know its content, if it lies there
as it did: the file ``.seen.csv`` beside the manifest notes how. That one is no output, since times
and inodes are not the same anywhere else; without it files are only read again.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from tlpipe import files
from tlpipe.data import pixels as packed
from tlpipe.data.images import Sampling
from tlpipe.data.manifest import Entry, load_duplicates, load_manifest
from tlpipe.data.pixels import PackedPixels
from tlpipe.data.values import ValueRange, is_deep
from tlpipe.errors import ArtifactError

_log = logging.getLogger(__name__)
SEEN = ("name", "stamp", "sha256")
Known = tuple[Entry, int]


class Earlier:
    """Images that need not be decoded; none, where they were made in another way."""

    def __init__(
        self,
        manifest: Path,
        duplicates: Path,
        pixels: Path,
        report: Path,
        *,
        sampling: Sampling,
        decoder: str,
        compared: str,
    ) -> None:
        """Take what lies at the outputs' paths, if it belongs together.

        ``decoder`` and ``compared`` say by what images are decoded, and compared with each other,
        now. ``keys`` are the images' keys as numbers; ``near`` are the pairs of keys whose images
        were found nearly equal, of all that were kept. Pictures of more than 8 bits are taken only
        where ``sampling`` states their range of values; with others, all are compared anew.
        """
        self.pixels: PackedPixels | None = None
        self.value_range: ValueRange | None = None
        self.keys = np.empty(0, np.uint64)
        self.near: list[tuple[int, int]] = []
        self._by_key: dict[bytes, Known] = {}
        self._seen: dict[str, Sequence[str]] = {}
        try:
            found = packed.load(pixels)
            made_by = (found.sampling, found.decoder, files.read_json(report)["compared"])
            wanted = sampling.model_copy(update={"value_range": found.sampling.value_range})
            if made_by != (wanted, decoder, compared):
                return
            if found.data_sha256 != files.sha256(manifest):
                return
            entries = list(load_manifest(manifest))
            keys = [entry.key for entry in entries]
            numbers = [int.from_bytes(key) for key in keys]
            of = dict(zip((entry.path for entry in entries), numbers, strict=True))
            pairs = [(of[pair.path], of[pair.other]) for pair in load_duplicates(duplicates)]
            intact = found.intact()
        except (ArtifactError, OSError, KeyError, ValueError, TypeError):
            return
        self.pixels = found
        self.value_range = found.sampling.value_range
        is_same = None is not sampling.value_range == self.value_range
        usable = [is_same or not is_deep(entry.mode) for entry in entries]
        if all(usable):
            self.keys = np.array(numbers, np.uint64)
            self.near = pairs
        self._by_key = {
            key: (entry, row)
            for row, (key, entry) in enumerate(zip(keys, entries, strict=True))
            if intact[row] and usable[row]
        }
        if damaged := int((~intact).sum()):
            _log.warning("%s of the stored images are damaged and are decoded again", damaged)
        with suppress(ArtifactError):
            rows = files.read_csv(_seen_path(manifest), SEEN)
            self._seen = {name: known for name, *known in rows}

    def by_key(self, key: bytes) -> Known | None:
        """Return the entry of an equal image and its row, if there is one."""
        return self._by_key.get(key)

    def by_stamp(self, name: str, stamp: str) -> Known | None:
        """Return what a whole file is known as, if it lies there as it did."""
        known = self._seen.get(name)
        if known is None or not stamp or known[0] != stamp:
            return None
        return self._by_key.get(bytes.fromhex(known[1][:16]))


def remember(manifest: Path, seen: Path) -> None:
    """Keep the table that notes how the files of this run lie there, a row of ``SEEN`` for each."""
    seen.replace(_seen_path(manifest))


def _seen_path(manifest: Path) -> Path:
    return manifest.with_name(".seen.csv")
