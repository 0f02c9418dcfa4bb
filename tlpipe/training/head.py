"""Multinomial logistic regression on features, by L-BFGS.

With l2 > 0 the objective is strictly convex in the weight, so what the solver converges to depends
on the data, their weights and l2 alone: no seed, no learning rate, no number of epochs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
class Step:
    """One l2 of the linear probe's path, or an epoch; losses in nats, accuracy in [0, 1].

    Before the first epoch nobody has computed a training loss. The linear probe's "validation" is
    cross-validation; an epoch has no ``l2``.
    """

    train_loss: float | None
    validation_loss: float
    validation_accuracy: float
    l2: float | None = None


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
            log_probabilities = log_softmax(head.logits(features))
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


def log_softmax(logits: Floats) -> Floats:
    """Return the logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _unflatten(flat: Floats, shape: tuple[int, int]) -> Head:
    size = shape[0] * shape[1]
    return Head(flat[:size].reshape(shape), flat[size:])
