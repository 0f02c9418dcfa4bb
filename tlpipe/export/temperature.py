"""Make probabilities mean what they say: one number that all logits are divided by."""

import numpy as np
import numpy.typing as npt

# How far the logarithm of the temperature is expected to lie from 0: a few images, all of them
# right, would else ask for certainty.
_SPREAD = 1.0
_BOUNDS = (-3.0, 3.0)


def fit(logits: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]) -> float:
    """Return the temperature under which held-out labels are most likely.

    ``logits``: (N, C); ``truth``: (N,) class numbers.

    Source: Guo et al. (2017), On calibration of modern neural networks, section 4.2; with a normal
    prior on the logarithm.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    exact = logits.astype(np.float64)

    def objective(log_temperature: float) -> float:
        scaled = exact / np.exp(log_temperature)
        losses = logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]
        return float(losses.sum() + (log_temperature / _SPREAD) ** 2 / 2)

    found = minimize_scalar(objective, bounds=_BOUNDS, method="bounded")
    # Few digits: the file should not differ where the last bits of a logit do.
    return float(f"{np.exp(found.x):.3g}")
