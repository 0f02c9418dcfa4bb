"""Solve the head: multinomial logistic regression on frozen features, by L-BFGS.

The objective is convex, so the solution depends on the data and the penalty alone: no seed, no
learning rate, no number of epochs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

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
    """The state after one iteration of the solver, or an epoch; losses in nats, accuracy in [0, 1].

    Before the first epoch nobody has computed a training loss.
    """

    train_loss: float | None
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Solution:
    """The head that one penalty leads to, and the way there."""

    penalty: float
    head: Head
    history: list[Step]
    converged: bool

    @property
    def last(self) -> Step:
        """The state that the solver ended in."""
        return self.history[-1]


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
    train: Iterable[Block],
    validation: Iterable[Block],
    *,
    classes: int,
    penalty: float,
    max_iterations: int,
    start: Head | None = None,
) -> Solution:
    """Minimise mean cross-entropy + penalty / 2 * |weight|^2 over the training images.

    Both sets come as blocks of rows, which are read anew at every iteration.

    Source: Bishop, Pattern Recognition and Machine Learning (2006), section 4.3.4, eq. 4.108-4.109.
    """
    from scipy.optimize import minimize

    count, width = 0, 0
    for features, _ in train:
        count, width = count + len(features), features.shape[1]
    shape = (classes, width)

    def objective(flat: Floats) -> tuple[float, Floats]:
        head = _unflatten(flat, shape)
        loss = penalty / 2 * (head.weight**2).sum()
        weight, bias = penalty * head.weight, np.zeros(classes)
        for features, labels in train:
            log_probabilities = log_softmax(head.logits(features))
            rows = np.arange(len(labels))
            loss -= log_probabilities[rows, labels].sum() / count
            residual = np.exp(log_probabilities)  # (N, C)
            residual[rows, labels] -= 1
            weight += residual.T @ features / count
            bias += residual.sum(axis=0) / count
        return loss, np.concatenate([weight.ravel(), bias])

    history: list[Step] = []

    def note(intermediate_result: "OptimizeResult") -> None:
        head = _unflatten(intermediate_result.x, shape)
        train_loss = intermediate_result.fun - penalty / 2 * (head.weight**2).sum()
        history.append(Step(float(train_loss), *score(head, validation)))

    first = start or Head(np.zeros(shape), np.zeros(classes))
    result = minimize(
        objective,
        np.concatenate([first.weight.ravel(), first.bias]),
        jac=True,
        method="L-BFGS-B",
        callback=note,
        options={"maxiter": max_iterations, "ftol": 1e-7, "gtol": 1e-5},
    )
    if not history:
        note(result)  # the start was the solution
    return Solution(penalty, _unflatten(result.x, shape), history, bool(result.success))


def solve_path(
    train: Iterable[Block],
    validation: Iterable[Block],
    *,
    classes: int,
    penalties: Sequence[float],
    max_iterations: int,
) -> list[Solution]:
    """Solve for each penalty, the strongest first, each from where the one before it ended."""
    import scipy.optimize  # noqa: F401  loads SciPy's BLAS: only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    solutions: list[Solution] = []
    # NumPy and SciPy bring a BLAS each; with more threads the two pools spin against each other,
    # for twenty times the CPU seconds on the digits, and the sums depend on their number.
    with threadpool_limits(1):
        for penalty in sorted(penalties, reverse=True):
            solutions.append(
                solve(
                    train,
                    validation,
                    classes=classes,
                    penalty=penalty,
                    max_iterations=max_iterations,
                    start=solutions[-1].head if solutions else None,
                )
            )
    return solutions


def score(head: Head, blocks: Iterable[Block]) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy."""
    hits, lost = [], []
    for features, labels in blocks:
        logits = head.logits(features)
        lost.append(-log_softmax(logits)[np.arange(len(labels)), labels])
        hits.append(logits.argmax(axis=1) == labels)
    return float(np.concatenate(lost).mean()), float(np.concatenate(hits).mean())


def choose(solutions: Sequence[Solution], validation: Iterable[Block]) -> Solution:
    """Return the one of the strongest penalty whose loss is that of the best one, but for chance.

    Few validation images tell penalties apart by luck, and a stronger one is the safer choice.

    Source: Breiman et al. (1984), Classification and regression trees, section 3.4.3, the rule of
    one standard error.
    """
    best = min(solutions, key=lambda solution: solution.last.validation_loss)
    lost = np.concatenate(
        [
            -log_softmax(best.head.logits(features))[np.arange(len(labels)), labels]
            for features, labels in validation
        ]
    )
    allowed = lost.mean() + lost.std() / np.sqrt(len(lost))
    close = [solution for solution in solutions if solution.last.validation_loss <= allowed]
    return max(close, key=lambda solution: solution.penalty)


def log_softmax(logits: Floats) -> Floats:
    """Return the logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _unflatten(flat: Floats, shape: tuple[int, int]) -> Head:
    size = shape[0] * shape[1]
    return Head(flat[:size].reshape(shape), flat[size:])
