"""Linear probe: multinomial logistic regression, with the l2 that cross-validation picks.

With l2 > 0 the objective is strictly convex in the weight, so what L-BFGS converges to depends
on the data, their weights and l2 alone: no seed, no learning rate, no number of epochs.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from tlpipe.data.pixels import Chunks
from tlpipe.held_out import HeldOut
from tlpipe.resampling import ALWAYS_TRAINS, held_out_folds
from tlpipe.training.model import Dataset, Examples, Measured, Step
from tlpipe.training.recipe import Recipe, class_weights

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Block = tuple[Floats, Labels]

# Least validation loss among 0, 0.1, 0.3 and 1 (one scale for all) on the digits, hymenoptera and
# sign-digits; with 0, ten images a class came out with a validation loss four times as large.
_FLOOR = 0.3


@dataclass(frozen=True)
class Head:
    """``logits = features @ weight.T + bias``; weight: (C, D), bias: (C,)."""

    weight: Floats
    bias: Floats

    def logits(self, features: Floats) -> Floats:
        """Return (N, C) logits of (N, D) features."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Solution:
    """Where the solver ended; ``train_loss``: weighted mean cross-entropy in nats, without l2."""

    head: Head
    train_loss: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Standardisation:
    """What is taken off each feature and what it is then divided by, both (D,)."""

    mean: Floats
    scale: Floats

    def apply(self, features: Floats) -> Floats:
        """Return (N, D) features standardised."""
        return (features - self.mean) / self.scale

    def fold(self, head: Head) -> Head:
        """Return the head for raw features that equals ``head`` on standardised ones."""
        weight = head.weight / self.scale
        return Head(weight, head.bias - weight @ self.mean)


def standardisation(blocks: Iterable[Floats]) -> Standardisation:
    """Return the standardisation of features that come in blocks of rows (n, D).

    A feature that hardly varies over the training images would be blown up to the size of the
    others, and with it the noise of half precision and the few images where it does vary; so none
    is divided by less than ``_FLOOR`` of the features' typical standard deviation.

    Source: Chan, Golub and LeVeque (1979), Updating formulae and a pairwise algorithm for computing
    sample variances, eq. 2.1.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        new_mean = block.mean(axis=0)
        total = count + len(block)
        apart = new_mean - mean
        squares = squares + ((block - new_mean) ** 2).sum(axis=0)
        squares = squares + apart**2 * (count * len(block) / total)
        mean = mean + apart * (len(block) / total)
        count = total
    std = np.sqrt(squares / count)
    typical = float(np.sqrt((std**2).mean())) or 1.0
    return Standardisation(mean, np.maximum(std, _FLOOR * typical))


def solve(
    blocks: Iterable[Block],
    weights: Floats,
    *,
    classes: int,
    l2: float,
    max_iterations: int,
    tolerance: float,
    start: Head | None = None,
) -> Solution:
    """Minimise the weighted mean cross-entropy + l2 / 2 * |weight|^2.

    Args:
        blocks: features (n, D) with label numbers (n,), read anew at every iteration.
        weights: (N,) of the rows of all blocks in turn, not negative; a row of weight 0 is left
            out.
        classes: C, more than every label number.
        l2: strength of the penalty, of the weight alone.
        max_iterations: of L-BFGS.
        tolerance: relative decrease of the objective at which the solver stops.
        start: where it starts from, zeros if None.

    Source: Bishop, Pattern Recognition and Machine Learning (2006), section 4.3.4, eq. 4.108-4.109.
    """
    import scipy.optimize  # loads SciPy's BLAS: only what is loaded can be limited
    from scipy.special import log_softmax
    from threadpoolctl import threadpool_limits

    shares = weights / weights.sum()
    width = next(iter(blocks))[0].shape[1]
    shape = (classes, width)

    def objective(flat: Floats) -> tuple[float, Floats]:
        head = _unflatten(flat, shape)
        loss = l2 / 2 * (head.weight**2).sum()
        weight, bias = l2 * head.weight, np.zeros(classes)
        done = 0
        for features, labels in blocks:
            share = shares[done : done + len(labels)]
            done += len(labels)
            log_probabilities = log_softmax(head.logits(features), axis=1)
            rows = np.arange(len(labels))
            loss -= share @ log_probabilities[rows, labels]
            residual = np.exp(log_probabilities)  # (n, C)
            residual[rows, labels] -= 1
            residual *= share[:, None]
            weight += residual.T @ features
            bias += residual.sum(axis=0)
        return loss, np.concatenate([weight.ravel(), bias])

    first = start or Head(np.zeros(shape), np.zeros(classes))
    # NumPy and SciPy bring a BLAS each; with more threads the two pools spin against each other,
    # for twenty times the CPU seconds on the digits, and the sums depend on their number.
    with threadpool_limits(1):
        result = scipy.optimize.minimize(
            objective,
            np.concatenate([first.weight.ravel(), first.bias]),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "ftol": tolerance,
                # Each class has its share of the gradient; of 1,000 classes all are small.
                "gtol": tolerance / classes,
            },
        )
    head = _unflatten(result.x, shape)
    train_loss = float(result.fun - l2 / 2 * (head.weight**2).sum())
    return Solution(head, train_loss, int(result.nit), bool(result.success))


def _unflatten(flat: Floats, shape: tuple[int, int]) -> Head:
    size = shape[0] * shape[1]
    return Head(flat[:size].reshape(shape), flat[size:])


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

    def __init__(self, blocks: Iterator[Floats], labels: Labels) -> None:
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

    def __iter__(self) -> Iterator[Block]:
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


def _read_into(file: IO[bytes], block: Floats, offset: int) -> None:
    """Fill a block from a place of a file, without moving the position that others read at."""
    left = memoryview(block.data).cast("B")
    while left:
        count = os.preadv(file.fileno(), [left], offset)
        assert count, "the temporary file of features has become shorter"
        left, offset = left[count:], offset + count


# Reads the features of rows in blocks (n, D), of every view where that is asked for.
Read = Callable[[npt.NDArray[np.int64], bool], Iterator[Floats]]


def stored(data: Dataset) -> Read:
    """Return what reads the stored features of the pretrained network.

    Where all of it is frozen they may be stored in views: (N, V, D), the plain one first.
    """
    found = data.activations
    is_whole = data.open_stages == 0 and found.boundary is not None
    features: Chunks = found.boundary if is_whole else found.features  # type: ignore[assignment]
    views, width = features.shape[1:] if len(features.shape) == 3 else (1, features.shape[1])

    def read(rows: npt.NDArray[np.int64], every_view: bool) -> Iterator[Floats]:
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
    fold_heads: tuple[Head, ...]
    logits: npt.NDArray[np.float32]
    step: Step


@dataclass(frozen=True)
class Probe:
    """A fitted head and how it came about.

    ``head`` and the folds' heads take features standardised by ``standard``; ``folds``: (N,) the
    fold that held an image out, or ``ALWAYS_TRAINS``; ``path``: every l2 tried, strongest first.
    """

    head: Head
    standard: Standardisation
    folds: npt.NDArray[np.int64]
    best: CrossValidated
    path: tuple[Step, ...]

    def raw(self, head: Head) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
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
            heads=[self.raw(Head(wider * f.weight, wider * f.bias)) for f in folds],
        )

    def answers(self, read: Read, examples: Examples) -> HeldOut:
        """Return what the head answers for images that it has not trained on."""
        logits = np.concatenate(
            [self.head.logits(self.standard.apply(block)) for block in read(examples.rows, False)]
        ).astype(np.float32)
        return HeldOut(examples.rows, examples.labels, logits, np.zeros_like(examples.rows))


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
    standard = standardisation(read(train.rows, True))
    blocks = (standard.apply(block) for block in read(examples.rows, True))
    weights = np.ones(len(examples))
    if recipe.balance != "none":
        weights = class_weights(examples.labels, classes)[examples.labels]
    names = [data.labels[label] for label in examples.labels]
    folds = held_out_folds(names, [data.groups[row] for row in examples.rows], FOLDS)
    path: list[Step] = []
    best: CrossValidated | None = None
    tried: CrossValidated | None = None
    # Folds are solved in threads of their own. What BLAS may take is the whole process's business.
    with threadpool_limits(1), closing(Table(blocks, examples.labels)) as table:
        for l2 in sorted(l2s, reverse=True):
            tried = cross_validate(table, weights, folds, classes, l2, max_iterations, tried)
            path.append(tried.step)
            if best is None or tried.step.validation.loss < best.step.validation.loss:
                best = tried
            _say(tried, "accuracy" if recipe.balance == "none" else "balanced accuracy")
            if path[-_RISES:].count(best.step) == 0:
                break
        assert best is not None
        solution = solve(
            table,
            np.repeat(weights * is_fitted, table.views),
            classes=classes,
            l2=best.l2,
            max_iterations=max_iterations,
            tolerance=_FINE,
        )
    _say_why(best, len(path), l2s, solution)
    shares = np.bincount(examples.labels, weights, minlength=classes) / weights.sum()
    if best.step.validation.loss > (chance := float(-(shares * np.log(shares)).sum())):
        _log.warning(
            "that is no better than the shares of the classes alone, whose loss is %.4f: too few "
            "images or groups, or labels that these features do not tell apart",
            chance,
        )
    return Probe(solution.head, standard, folds, best, tuple(path))


def cross_validate(
    table: Table,
    weights: Floats,
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

    def without(fold: int) -> Solution:
        return solve(
            table,
            np.repeat(weights * (folds != fold), table.views),
            classes=classes,
            l2=l2,
            max_iterations=max_iterations,
            tolerance=_ROUGH,
            start=stronger.fold_heads[fold] if stronger else None,
        )

    with ThreadPoolExecutor(min(count, len(os.sched_getaffinity(0)))) as pool:
        solutions = list(pool.map(without, range(count)))
    found = tuple(solution.head for solution in solutions)
    logits = np.full((len(folds), classes), np.nan, np.float32)
    done = 0
    for features, _ in table:
        plain = features[:: table.views]
        own = folds[done : done + len(plain)]
        for fold, head in enumerate(found):
            logits[done : done + len(plain)][own == fold] = head.logits(plain[own == fold])
        done += len(plain)
    step = Step(
        float(np.mean([solution.train_loss for solution in solutions])),
        score(logits, table.labels, weights),
        l2,
    )
    return CrossValidated(l2, found, logits, step)


def score(logits: npt.NDArray[np.float32], labels: Labels, weights: Floats) -> Measured:
    """Return the weighted mean cross-entropy in nats and accuracy of the images held out.

    Where classes count the same, that is the balanced accuracy.
    """
    from scipy.special import log_softmax

    held = ~np.isnan(logits[:, 0])
    log_probabilities = log_softmax(logits[held].astype(np.float64), axis=1)
    losses = -log_probabilities[np.arange(len(log_probabilities)), labels[held]]
    hits = logits[held].argmax(axis=1) == labels[held]
    loss, accuracy = (np.average(values, weights=weights[held]) for values in (losses, hits))
    return Measured(float(loss), float(accuracy))


def _say(tried: CrossValidated, measure: str) -> None:
    held = int(np.count_nonzero(~np.isnan(tried.logits[:, 0])))
    _log.info(
        "l2 %g: %s-fold loss %.4f, %s %.3f on %s images",
        *(tried.l2, len(tried.fold_heads), tried.step.validation.loss),
        *(measure, tried.step.validation.accuracy, held),
    )


def _say_why(best: CrossValidated, tried: int, l2s: Sequence[float], solution: Solution) -> None:
    left = f"; {len(l2s) - tried} weaker ones were left out" if tried < len(l2s) else ""
    _log.info("chosen: l2 %g, which has the least loss%s", best.l2, left)
    if len(l2s) > 1 and best.l2 in (min(l2s), max(l2s)):
        _log.info("it is at the end of train.l2; one beyond it may be better")
    if not solution.converged:
        _log.warning(
            "the head did not converge in %s iterations; raise train.max_iterations",
            solution.iterations,
        )
