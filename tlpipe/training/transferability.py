"""How well features suit labels before anything is tuned: LogME, and learning curves."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlpipe import resampling
from tlpipe.runtime import generator
from tlpipe.training.linear_probe import Floats, Labels

_ROUNDS, _TOLERANCE = 100, 1e-6  # of the search for the evidence's maximum
# Exponents that are tried: a half is what a mean of independent terms has; networks lie below.
# Source: Hestness et al. (2017), Deep learning scaling is predictable, empirically.
_EXPONENTS = np.geomspace(0.1, 1.0, 40)
_MOST_TIMES = 4.0  # as many images as were measured: beyond that a curve says nothing
CONFIDENCE = 0.9


def logme(features: Floats, labels: Labels) -> float:
    """Return the logarithm of the maximum evidence of labels given features, in nats an image.

    For each class, membership (0 or 1) is a linear function of the features with a normal prior of
    precision alpha and noise of precision beta; both are those of the greatest evidence. The mean
    over classes, higher is better, comparable between features of the same images.

    Args:
        features: (N, D), N and D at least 1.
        labels: (N,) in [0, C).

    Source: You et al. (2021), LogME: practical assessment of pre-trained models for transfer
    learning, ICML, algorithms 1 and 3; the singular values as in You et al. (2022), JMLR 23.
    """
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    count = len(features)
    squares = singular**2
    found = []
    for number in np.unique(labels):
        truth = (labels == number).astype(np.float64)
        along = (left.T @ truth) ** 2  # (min(N, D),)
        beside = max(float(truth @ truth - along.sum()), 0.0)
        found.append(_evidence(squares, along, beside, count) / count)
    return float(np.mean(found))


def _evidence(squares: Floats, along: Floats, beside: float, count: int) -> float:
    """Return the greatest logarithm of the evidence of one target.

    ``squares``: of the singular values; ``along``: the target's squared parts along the left
    singular vectors; ``beside``: its squared norm outside of them.
    """
    alpha = beta = 1.0
    before = -math.inf
    for _ in range(_ROUNDS):
        precision = alpha + beta * squares
        weight = float((beta**2 * squares * along / precision**2).sum())  # |m|^2
        residual = float((along * (alpha / precision) ** 2).sum()) + beside  # |y - F m|^2
        log_evidence = 0.5 * (
            len(squares) * math.log(alpha)
            + count * math.log(beta)
            - float(np.log(precision).sum())
            - beta * residual
            - alpha * weight
            - count * math.log(2 * math.pi)
        )
        if abs(log_evidence - before) < _TOLERANCE * count:
            break
        before = log_evidence
        gamma = float((beta * squares / precision).sum())
        alpha = gamma / max(weight, 1e-12)
        beta = (count - gamma) / max(residual, 1e-12)
    return log_evidence


@dataclass(frozen=True)
class LearningCurve:
    """The error of a classifier over the training images of a class, a power law with a floor.

    ``error = scale * images^-exponent + floor``, fitted to what was measured, and to each of B
    resamplings of the images that it was measured on.

    Attributes:
        images: (S,) training images a class, ascending.
        errors: (S,) measured, in [0, 1].
        law: (3,) scale, exponent and floor.
        resampled: (B, 3) the same of each resampling.
    """

    images: Floats
    errors: Floats
    law: Floats
    resampled: Floats

    def error(self, images: float) -> tuple[float, float, float]:
        """Return the extrapolated error at so many images a class, and its interval."""
        low, high = resampling.ends(_at(self.resampled, images), CONFIDENCE)
        return float(_at(self.law, images)), low, high

    def gain(self, images: float, more: float) -> tuple[float, float, float]:
        """Return by how much ``more`` images a class lower the error, and the interval of that."""
        drawn = _at(self.resampled, images) - _at(self.resampled, images + more)
        value = float(_at(self.law, images) - _at(self.law, images + more))
        return value, *resampling.ends(drawn, CONFIDENCE)

    def more_for(self, gain: float, images: float) -> tuple[float, float, float] | None:
        """Return how many more images a class lower the error by ``gain``, and the interval.

        None where that may be beyond four times ``images``, or never.
        """
        laws = np.vstack([self.law, self.resampled])
        scale, exponent, floor = laws.T
        aim = _at(laws, images) - gain - floor
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            needed = np.where(aim > 0, (scale / aim) ** (1 / exponent), np.inf) - images
        low, high = (
            float(np.quantile(needed[1:], share, method="higher"))
            for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
        )
        if not max(high, needed[0]) <= (_MOST_TIMES - 1) * images:
            return None
        return float(needed[0]), low, high


def _at(laws: Floats, images: float) -> Floats:
    """Return the errors (...) that laws (..., 3) have at so many images a class."""
    found: Floats = laws[..., 0] * images ** -laws[..., 1] + laws[..., 2]
    return found


def learning_curve(
    images: Floats, misses: Sequence[npt.NDArray[np.bool_]], groups: Labels
) -> LearningCurve | None:
    """Fit a power law to errors over training images; None of fewer than three sizes.

    The interval is a bootstrap of the images that were answered and of the draws of those that were
    trained on.

    Args:
        images: (S,) training images a class, ascending.
        misses: of each size (K, N), which of N held-out images were answered wrongly after
            training on each of K draws.
        groups: (N,) numbers from 0; images of one group are resampled together.

    Source: Cortes et al. (1994), Learning curves: asymptotic values and rate of convergence, NIPS;
    Figueroa et al. (2012), Predicting sample size required for classification performance.
    """
    if len(images) < 3:
        return None
    number = int(groups.max()) + 1
    sizes = np.bincount(groups, minlength=number)
    sums = [
        np.stack([np.bincount(groups, draw, minlength=number) for draw in of_size])  # (K, G)
        for of_size in misses
    ]
    random = generator(0, "draws of a learning curve")
    drawn = []
    for counts in resampling.resamples(number):  # (B, G)
        columns = []
        for of_size in sums:
            draws = len(of_size)
            often = random.multinomial(draws, np.full(draws, 1 / draws), size=len(counts)) / draws
            columns.append((counts @ of_size.T * often).sum(axis=1) / (counts @ sizes))
        drawn.append(np.column_stack(columns))
    errors = np.array([of_size.mean() for of_size in misses])
    laws = _fit(images, np.vstack([errors, *drawn]))
    return LearningCurve(images, errors, laws[0], laws[1:])


def _fit(images: Floats, errors: Floats) -> Floats:
    """Return the laws (B, 3) of least squares for errors (B, S); scale and floor are not negative.

    Each exponent leaves a linear problem of two unknowns, of which the bounds cut a corner off.
    """
    best = np.full(len(errors), np.inf)
    laws = np.zeros((len(errors), 3))
    for exponent in _EXPONENTS:
        for scale, floor in _corners(images**-exponent, errors):
            left = errors - scale[:, None] * images**-exponent - floor[:, None]
            squares = (left**2).sum(axis=1)
            better = (scale >= 0) & (floor >= 0) & (squares < best - 1e-15)
            best[better] = squares[better]
            laws[better] = np.column_stack([scale, np.full_like(scale, exponent), floor])[better]
    return laws


def _corners(powers: Floats, errors: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Yield scales and floors: of plain least squares, without a floor, without a slope."""
    centred = powers - powers.mean()
    scale = errors @ centred / (centred @ centred)
    means = errors.mean(axis=1)
    yield scale, means - scale * powers.mean()
    yield errors @ powers / (powers @ powers), np.zeros(len(errors))
    yield np.zeros(len(errors)), means
