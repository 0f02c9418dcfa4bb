"""Intervals by the bootstrap: images drawn anew, with whole groups where they belong together."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tlpipe.seeds import generator

Weights = npt.NDArray[np.float64]
_RESAMPLES, _AT_ONCE = 1000, 50


def resamples(groups: Sequence[str]) -> Iterator[Weights]:
    """Yield how often each image counts in each resampling, (B, N) in parts.

    Groups are drawn with replacement, always the same for the same ones.

    Source: Efron and Tibshirani (1993), An introduction to the bootstrap, sections 6 and 13.3;
    Davison and Hinkley (1997), Bootstrap methods, section 3.8, for whole groups.
    """
    names = [group or f"\n{number}" for number, group in enumerate(groups)]
    _, place = np.unique(names, return_inverse=True)
    distinct = int(place.max()) + 1
    random = generator(0, "resamples")
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        counts = [
            np.bincount(random.integers(distinct, size=distinct), minlength=distinct)
            for _ in range(_AT_ONCE)
        ]
        yield np.stack(counts)[:, place].astype(np.float64)


def ends(drawn: Weights, confidence: float) -> tuple[float, float]:
    """Return between which values so large a share of the resampled ones lies."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    first: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
    second: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
    groups: Sequence[str],
    confidence: float,
) -> dict[str, float]:
    """Return by how much more often the second is right on the same images, with its interval."""
    gain = second.astype(np.float64) - first.astype(np.float64)
    drawn = np.concatenate([(w @ gain) / w.sum(axis=1) for w in resamples(groups)])
    low, high = ends(drawn, confidence)
    return {"value": float(gain.mean()), "low": low, "high": high, "confidence": confidence}
