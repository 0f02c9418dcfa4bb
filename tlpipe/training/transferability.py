"""How well features suit labels before anything is tuned: linear probes, LogME, learning curves.

Probes are cross-validated on a sample of images, on all training images of a fold or on fewer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlpipe import resampling
from tlpipe.progress import Meter
from tlpipe.resampling import ALWAYS_TRAINS
from tlpipe.runtime import generator
from tlpipe.training import linear_probe
from tlpipe.training.linear_probe import FOLDS, Floats, Head, Labels
from tlpipe.training.model import Examples

_ROUNDS, _SETTLED = 100, 1e-6  # of the search for the evidence's maximum
_LEAST = 1e-12  # that it divides by or takes a logarithm of
# Exponents that are tried: a half is what a mean of independent terms has; networks lie below.
# Source: Hestness et al. (2017), Deep learning scaling is predictable, empirically.
_EXPONENTS = np.geomspace(0.1, 1.0, 40)
MOST_TIMES = 4.0  # as many images as were measured: beyond that a curve says nothing
CONFIDENCE = 0.9
_L2 = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
_ITERATIONS, _TOLERANCE = 200, 1e-5
# Shares of the training images of a fold, and how often each is drawn.
SHARES = {0.125: 8, 0.25: 4, 0.5: 2, 1.0: 1}


@dataclass(frozen=True)
class Sample:
    """The images that are looked at: (N,) rows, label numbers, groups' numbers, folds."""

    examples: Examples
    groups: Labels
    folds: Labels
    classes: int

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        """Which images a fold holds out."""
        held: npt.NDArray[np.bool_] = self.folds != ALWAYS_TRAINS
        return held


def held_out_misses(
    features: Floats, sample: Sample, share: float = 1.0, draws: int = 1
) -> npt.NDArray[np.bool_]:
    """Return which images are answered wrongly by linear probes that have not seen them, (K, H).

    For each of K draws, and each fold, a probe is fitted on a share of the other folds and answers
    for this one. The l2 is that of the least loss of all probes together.

    Args:
        features: (N, D).
        sample: labels and folds of the N images, of which H are held out.
        share: of each class's training images, in (0, 1]; one image of it at least.
        draws: K, how often that share is drawn.
    """
    standardised = linear_probe.standardisation([features]).apply(features)
    probes = [
        [
            _Probe(standardised, sample, _training(sample, fold, share, draw), fold)
            for fold in range(int(sample.folds.max()) + 1)
        ]
        for draw in range(draws)
    ]
    least, best = np.inf, np.zeros(0, np.bool_)
    for l2 in _L2:
        losses = np.zeros((draws, len(features)))
        misses = np.zeros((draws, len(features)), np.bool_)
        for draw, folds in enumerate(probes):
            for probe in folds:
                losses[draw, probe.tested], misses[draw, probe.tested] = probe.fit(l2)
        loss = float(losses[:, sample.held].mean())
        if loss >= least:
            break
        least, best = loss, misses[:, sample.held]
    return best


def _training(sample: Sample, fold: int, share: float, draw: int) -> Labels:
    """Return the places of a share of each class's images outside of a fold."""
    order = generator(draw, f"learning curve {fold}").permutation(len(sample.folds))
    order = order[sample.folds[order] != fold]
    labels = sample.examples.labels[order]
    members = [order[labels == label] for label in range(sample.classes)]
    return np.concatenate([rows[: max(round(share * len(rows)), 1)] for rows in members])


class _Probe:
    """A linear probe of one fold, which goes on from the l2 before."""

    def __init__(self, features: Floats, sample: Sample, training: Labels, fold: int) -> None:
        self.tested = np.flatnonzero(sample.folds == fold)
        self._known, self._shown = features[training], features[self.tested]
        if len(training) < features.shape[1]:
            # The solution lies in the span of the training images: the same in fewer columns.
            basis = np.linalg.qr(self._known.T)[0]
            self._known, self._shown = self._known @ basis, self._shown @ basis
        self._targets = sample.examples.labels[training]
        self._truth = sample.examples.labels[self.tested]
        self._classes = sample.classes
        self._start: Head | None = None

    def fit(self, l2: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return the losses (n,) of the fold's images in nats, and which are answered wrongly."""
        from scipy.special import log_softmax

        self._start = linear_probe.solve(
            [(self._known, self._targets)],
            np.ones(len(self._targets)),
            classes=self._classes,
            l2=l2,
            max_iterations=_ITERATIONS,
            tolerance=_TOLERANCE,
            start=self._start,
        ).head
        logs = log_softmax(self._start.logits(self._shown), axis=1)
        return -logs[np.arange(len(logs)), self._truth], logs.argmax(axis=1) != self._truth


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
    # What the features are multiplied by says nothing of them, and decides where the search begins.
    size = np.sqrt((features**2).mean()) or 1.0
    left, singular, _ = np.linalg.svd(features / size, full_matrices=False)
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
        if abs(log_evidence - before) < _SETTLED * count:
            break
        before = log_evidence
        gamma = float((beta * squares / precision).sum())
        alpha = max(gamma, _LEAST) / max(weight, _LEAST)
        beta = max(count - gamma, _LEAST) / max(residual, _LEAST)
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
        if not max(high, needed[0]) <= (MOST_TIMES - 1) * images:
            return None
        return float(needed[0]), low, high


def _at(laws: Floats, images: float) -> Floats:
    """Return the errors (...) that laws (..., 3) have at so many images a class."""
    found: Floats = laws[..., 0] * images ** -laws[..., 1] + laws[..., 2]
    return found


def measure_curve(features: Floats, sample: Sample, shown: Meter) -> LearningCurve | None:
    """Fit probes on ever fewer of the training images of each fold, and a law to their errors.

    None where the classes are too small for three sizes.
    """
    largest = (1 - 1 / FOLDS) * len(features) / sample.classes
    sizes = {share: draws for share, draws in SHARES.items() if share * largest >= 1}
    misses = []
    for share, draws in sizes.items():
        misses.append(held_out_misses(features, sample, share, draws))
        shown.advance(1)
    groups = np.unique(sample.groups[sample.held], return_inverse=True)[1]
    return learning_curve(largest * np.array(list(sizes)), misses, groups)


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
