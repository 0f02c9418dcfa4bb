"""Fit the head on stored features, read block by block: memory does not grow with the images."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import numpy as np

from tlpipe.data.chunks import Chunks
from tlpipe.learning import head as heads
from tlpipe.learning.dataset import Dataset, Examples, Numbers

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 2**23


class Table:
    """Features (N, D) float64 with label numbers (N,), as blocks of rows that can be read again.

    One block is held in memory; more of them lie in a file that has no name.
    """

    def __init__(self, blocks: Iterator[heads.Floats], labels: heads.Labels) -> None:
        """Take the blocks, of one or more rows in turn for each label."""
        first = next(blocks)
        self._lengths, self._width = [len(first)], first.shape[1]
        self._first = first
        self._file: IO[bytes] | None = None
        for block in blocks:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
                self._file.write(first.data)
            self._lengths.append(len(block))
            self._file.write(np.ascontiguousarray(block).data)
        self._labels = np.repeat(labels, sum(self._lengths) // len(labels))

    def __iter__(self) -> Iterator[heads.Block]:
        if self._file is None:
            yield self._first, self._labels
            return
        self._file.seek(0)
        buffer, start = np.empty((max(self._lengths), self._width)), 0
        for length in self._lengths:
            block = buffer[:length]
            self._file.readinto(block.data)  # type: ignore[attr-defined]
            yield block, self._labels[start : start + length]
            start += length


# Reads the features of rows in blocks (n, D), of every view where that is asked for.
Read = Callable[[Numbers, bool], Iterator[heads.Floats]]


def stored(data: Dataset) -> Read:
    """Return what reads the stored features of the pretrained network.

    Where all of it is frozen they may be stored in views: (N, V, D), the plain one first.
    """
    found = data.activations
    is_whole = data.open_stages == 0 and found.boundary is not None
    features: Chunks = found.boundary if is_whole else found.features  # type: ignore[assignment]
    views, width = features.shape[1:] if len(features.shape) == 3 else (1, features.shape[1])

    def read(rows: Numbers, every_view: bool) -> Iterator[heads.Floats]:
        taken = views if every_view else 1
        step = max(_BLOCK_BYTES // (8 * width * views), 1)
        for start in range(0, len(rows), step):
            block = features[rows[start : start + step]].reshape(-1, views, width)
            yield block[:, :taken].reshape(-1, width).astype(np.float64)
            features.unmap()

    return read


def fit(
    read: Read, data: Dataset, *, penalties: Sequence[float], max_iterations: int
) -> tuple[heads.Solution, heads.Standardisation]:
    """Solve for each penalty on standardised features; return the best one, and how those are."""
    standard = heads.standardisation(read(data.train.rows, True))

    def table(examples: Examples, every_view: bool) -> Table:
        return Table((standard.apply(b) for b in read(examples.rows, every_view)), examples.labels)

    validation = table(data.validation, False)
    solutions = heads.solve_path(
        table(data.train, True),
        validation,
        classes=len(data.labels),
        penalties=penalties,
        max_iterations=max_iterations,
    )
    best = heads.choose(solutions, validation)
    for solution in solutions:
        _log.info(
            "penalty %g: validation loss %.4f, accuracy %.3f after %s iterations%s%s",
            solution.penalty,
            solution.last.validation_loss,
            solution.last.validation_accuracy,
            len(solution.history),
            "" if solution.converged else " (not converged; raise train.max_iterations)",
            " <- chosen" if solution is best else "",
        )
    return best, standard
