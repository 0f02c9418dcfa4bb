"""Linear probe: fit the head on features, with the l2 that cross-validation picks.

Folds hold out whole groups; what each fold's head answers for the images that it has not seen
(out-of-fold predictions) is what the l2, the temperature and the abstention threshold are chosen
by, so the head that ships is fitted on all images given.

Features are read block by block from a temporary file, so that of them memory holds one block a
fold; logits (N, C) of the images held out are kept. Each l2 costs one solution for each fold, and
each of the solver's iterations two products of (N, D) and (D, C). Folds run side by side, each on
one thread, so the number of cores changes no bit.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from tlpipe.data.chunks import Chunks
from tlpipe.data.folds import ALWAYS_TRAINS, held_out_folds
from tlpipe.held_out import HeldOut
from tlpipe.training import head as heads
from tlpipe.training.dataset import Dataset, Examples
from tlpipe.training.recipe import Recipe, class_weights

_log = logging.getLogger(__name__)
FOLDS = 4
_BLOCK_BYTES = 2**23
# A fold's head only has to rank l2s; the one that ships is solved until it moves no more.
_ROUGH, _FINE = 1e-6, 1e-10
# The held-out loss falls and then rises along the path: after so many rises the rest is skipped.
_RISES = 2


class Table:
    """Features (N * V, D) float64 of N images in V views, as blocks that can be read again.

    One block is held in memory; more of them lie in a file that has no name. Several threads may
    read at the same time, each into a block of its own.
    """

    def __init__(self, blocks: Iterator[heads.Floats], labels: heads.Labels) -> None:
        """Take the blocks, whole images each, and the label number of each image (N,)."""
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
        if self._file is not None:
            self._file.flush()
        self.labels = labels
        self.views = sum(self._lengths) // len(labels)
        self._repeated = np.repeat(labels, self.views)

    def __iter__(self) -> Iterator[heads.Block]:
        if self._file is None:
            yield self._first, self._repeated
            return
        buffer, start = np.empty((max(self._lengths), self._width)), 0
        for length in self._lengths:
            block = buffer[:length]
            _read_into(self._file, block, start * block.strides[0])
            yield block, self._repeated[start : start + length]
            start += length

    def close(self) -> None:
        """Take the file away."""
        if self._file is not None:
            self._file.close()


def _read_into(file: IO[bytes], block: heads.Floats, offset: int) -> None:
    """Fill a block from a place of a file, without moving the position that others read at."""
    left = memoryview(block.data).cast("B")
    while left:
        count = os.preadv(file.fileno(), [left], offset)
        assert count, "the temporary file of features has become shorter"
        left, offset = left[count:], offset + count


# Reads the features of rows in blocks (n, D), of every view where that is asked for.
Read = Callable[[npt.NDArray[np.int64], bool], Iterator[heads.Floats]]


def stored(data: Dataset) -> Read:
    """Return what reads the stored features of the pretrained network.

    Where all of it is frozen they may be stored in views: (N, V, D), the plain one first.
    """
    found = data.activations
    is_whole = data.open_stages == 0 and found.boundary is not None
    features: Chunks = found.boundary if is_whole else found.features  # type: ignore[assignment]
    views, width = features.shape[1:] if len(features.shape) == 3 else (1, features.shape[1])

    def read(rows: npt.NDArray[np.int64], every_view: bool) -> Iterator[heads.Floats]:
        taken = views if every_view else 1
        step = max(_BLOCK_BYTES // (8 * width * views), 1)
        for start in range(0, len(rows), step):
            block = features[rows[start : start + step]].reshape(-1, views, width)
            yield block[:, :taken].reshape(-1, width).astype(np.float64)
            features.unmap()

    return read


@dataclass(frozen=True)
class CrossValidated:
    """What one l2 gives, by the heads of all folds.

    ``fold_heads``: one for each fold; ``logits``: (N, C) float32 of the plain image by the head
    that has not seen it, NaN where every head has; ``step``: weighted mean losses, and accuracy.
    """

    l2: float
    fold_heads: tuple[heads.Head, ...]
    logits: npt.NDArray[np.float32]
    step: heads.Step


@dataclass(frozen=True)
class Probe:
    """A fitted head and how it came about.

    ``head`` and the folds' heads take features standardised by ``standard``; ``folds``: (N,) the
    fold that held an image out, or ``ALWAYS_TRAINS``; ``path``: every l2 tried, strongest first.
    """

    head: heads.Head
    standard: heads.Standardisation
    folds: npt.NDArray[np.int64]
    best: CrossValidated
    path: tuple[heads.Step, ...]

    def raw(self, head: heads.Head) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return weight (C, D) and bias (C,) of a head for features that are not standardised."""
        folded = self.standard.fold(head)
        return folded.weight.astype(np.float32), folded.bias.astype(np.float32)

    def held_out(self, examples: Examples) -> HeldOut:
        """Return the out-of-fold predictions for the images that were cross-validated.

        Their logits are as wide as those of the head that ships, which more images let grow: they
        are multiplied by the norm of its weight over the mean norm of the folds' weights. Without
        that, a temperature fitted on them leaves five images a class overconfident.
        """
        held = self.folds != ALWAYS_TRAINS
        folds = self.best.fold_heads
        norm = float(np.mean([np.linalg.norm(head.weight) for head in folds]))
        # Features that are all alike leave every weight at zero.
        wider = float(np.linalg.norm(self.head.weight)) / norm if norm else 1.0
        return HeldOut(
            rows=examples.rows[held],
            labels=examples.labels[held],
            logits=self.best.logits[held] * np.float32(wider),
            folds=self.folds[held],
            heads=[self.raw(heads.Head(wider * f.weight, wider * f.bias)) for f in folds],
        )


def fit(read: Read, data: Dataset, train: Examples, recipe: Recipe) -> Probe:
    """Choose the l2 by cross-validation over all labelled images, then fit it on some of them.

    Where ``recipe.balance`` is set, every class counts the same for fitting and for choosing.

    Args:
        read: gives the features of rows.
        data: its ``labelled`` images, training and validation, are cross-validated.
        train: what the head is fitted on, training and validation or the training split alone;
            those of the training split come first in both.
        recipe: the l2s to try, the solver's bound and the class balance.

    Source: Stone (1974), Cross-validatory choice and assessment of statistical predictions.
    """
    import scipy.optimize  # noqa: F401 - loads SciPy's BLAS: only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    examples, classes = data.labelled, len(data.labels)
    l2s, max_iterations = recipe.l2, recipe.max_iterations
    is_fitted = np.arange(len(examples)) < len(train)
    standard = heads.standardisation(read(train.rows, True))
    blocks = (standard.apply(block) for block in read(examples.rows, True))
    weights = np.ones(len(examples))
    if recipe.balance != "none":
        weights = class_weights(examples.labels, classes)[examples.labels]
    names = [data.labels[label] for label in examples.labels]
    folds = held_out_folds(names, [data.groups[row] for row in examples.rows], FOLDS)
    path: list[heads.Step] = []
    best: CrossValidated | None = None
    tried: CrossValidated | None = None
    # Folds are solved in threads of their own. What BLAS may take is the whole process's business.
    with threadpool_limits(1), closing(Table(blocks, examples.labels)) as table:
        for l2 in sorted(l2s, reverse=True):
            tried = cross_validate(table, weights, folds, classes, l2, max_iterations, tried)
            path.append(tried.step)
            if best is None or tried.step.validation_loss < best.step.validation_loss:
                best = tried
            _say(tried, "accuracy" if recipe.balance == "none" else "balanced accuracy")
            if path[-_RISES:].count(best.step) == 0:
                break
        assert best is not None
        solution = heads.solve(
            table,
            np.repeat(weights * is_fitted, table.views),
            classes=classes,
            l2=best.l2,
            max_iterations=max_iterations,
            tolerance=_FINE,
        )
    _say_why(best, len(path), l2s, solution)
    shares = np.bincount(examples.labels, weights, minlength=classes) / weights.sum()
    if best.step.validation_loss > (chance := float(-(shares * np.log(shares)).sum())):
        _log.warning(
            "that is no better than the shares of the classes alone, whose loss is %.4f: too few "
            "images or groups, or labels that these features do not tell apart",
            chance,
        )
    return Probe(solution.head, standard, folds, best, tuple(path))


def cross_validate(
    table: Table,
    weights: heads.Floats,
    folds: npt.NDArray[np.int64],
    classes: int,
    l2: float,
    max_iterations: int,
    stronger: CrossValidated | None = None,
) -> CrossValidated:
    """Fit a head without each fold and let it answer for that fold.

    Args:
        table: features and labels of N images.
        weights: (N,) how much each image counts.
        folds: (N,) the fold that holds an image out, or ``ALWAYS_TRAINS``.
        classes: C.
        l2: strength of the penalty.
        max_iterations: of the solver.
        stronger: what a stronger l2 gave, to start from.
    """
    count = int(folds.max()) + 1

    def solve(fold: int) -> heads.Solution:
        return heads.solve(
            table,
            np.repeat(weights * (folds != fold), table.views),
            classes=classes,
            l2=l2,
            max_iterations=max_iterations,
            tolerance=_ROUGH,
            start=stronger.fold_heads[fold] if stronger else None,
        )

    with ThreadPoolExecutor(min(count, len(os.sched_getaffinity(0)))) as pool:
        solutions = list(pool.map(solve, range(count)))
    found = tuple(solution.head for solution in solutions)
    logits = np.full((len(folds), classes), np.nan, np.float32)
    done = 0
    for features, _ in table:
        plain = features[:: table.views]
        own = folds[done : done + len(plain)]
        for fold, head in enumerate(found):
            logits[done : done + len(plain)][own == fold] = head.logits(plain[own == fold])
        done += len(plain)
    step = heads.Step(
        float(np.mean([solution.train_loss for solution in solutions])),
        *_score(logits, table.labels, weights),
        l2,
    )
    return CrossValidated(l2, found, logits, step)


def _score(
    logits: npt.NDArray[np.float32], labels: heads.Labels, weights: heads.Floats
) -> tuple[float, float]:
    """Return the weighted mean cross-entropy in nats and accuracy of the images held out.

    Where classes count the same, that is the balanced accuracy.
    """
    held = ~np.isnan(logits[:, 0])
    losses = -heads.log_softmax(logits[held].astype(np.float64))[
        np.arange(np.count_nonzero(held)), labels[held]
    ]
    hits = logits[held].argmax(axis=1) == labels[held]
    loss, accuracy = (np.average(values, weights=weights[held]) for values in (losses, hits))
    return float(loss), float(accuracy)


def _say(tried: CrossValidated, measure: str) -> None:
    held = int(np.count_nonzero(~np.isnan(tried.logits[:, 0])))
    _log.info(
        "l2 %g: %s-fold loss %.4f, %s %.3f on %s images",
        *(tried.l2, len(tried.fold_heads), tried.step.validation_loss),
        *(measure, tried.step.validation_accuracy, held),
    )


def _say_why(
    best: CrossValidated, tried: int, l2s: Sequence[float], solution: heads.Solution
) -> None:
    left = f"; {len(l2s) - tried} weaker ones were left out" if tried < len(l2s) else ""
    _log.info("chosen: l2 %g, which has the least loss%s", best.l2, left)
    if len(l2s) > 1 and best.l2 in (min(l2s), max(l2s)):
        _log.info("it is at the end of train.l2; one beyond it may be better")
    if not solution.converged:
        _log.warning(
            "the head did not converge in %s iterations; raise train.max_iterations",
            solution.iterations,
        )
