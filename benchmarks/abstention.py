"""Whether thresholds keep what they promise: ``python benchmarks/abstention.py [--data FOLDER]``.

Of each data set and seed, which draws splits anew, the linear probe's out-of-fold predictions give
a threshold for so many per cent of errors, as ``evaluate`` picks it, and the test images tell how
many of the answers above it are wrong. ``kept``: in how many runs no more were wrong than promised.
The peer is the threshold that would just have kept the rate on the same predictions.
"""

import argparse
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from accuracy import ROOT, Case, prepare
from linear_probe import features
from rich.console import Console
from rich.table import Table
from scipy.special import softmax

from tlpipe import held_out
from tlpipe.data.manifest import load_split
from tlpipe.evaluation import metrics
from tlpipe.graph import PATHS
from tlpipe.training import linear_probe
from tlpipe.training.recipe import Recipe

CASES = [
    Case("hymenoptera", "all", 0),
    Case("rsscn", "all", 0),
    Case("trash", "all", 0),
    Case("digits", "all", 0),
    Case("sign-digits", "all", 0, validation=0.15, test=0.15),
]
RATES = (0.02, 0.05, 0.1)
CONFIDENCE_LEVEL = 0.95


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    names = ("thresholds", "answered", "wrong", "kept")
    table = Table("data", "promised", *(f"{name}:\nours, peer" for name in names))
    sums = np.zeros((2, 2))
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            folder, source = Path(name) / case.data, given.data / case.data
            folder.mkdir()
            if case.data == "digits":
                source = folder / "digits.yaml"
                shutil.copy(ROOT / "data" / "digits.yaml", source)
            found: dict[float, list[list[tuple[float, float]]]] = {rate: [] for rate in RATES}
            for seed in range(given.seeds):
                data, test = prepare(folder, source, case, seed)
                fitted = linear_probe.fit(linear_probe.stored(data), data, data.labelled, Recipe())
                held = fitted.held_out(data.labelled)
                divisor = held_out.fit_temperature(held.logits, held.labels)
                seen = softmax(held.logits / np.float32(divisor), axis=1)
                confidence, hits = (
                    seen.max(axis=1).astype(float),
                    seen.argmax(axis=1) == held.labels,
                )
                logits = fitted.head.logits(fitted.standard.apply(features(data, test)))
                asked = softmax((logits / divisor).astype(np.float32), axis=1)
                right = asked.argmax(axis=1) == test.labels
                assigned = load_split(folder / PATHS["split"])
                groups = [assigned[row].group for row in held.rows]
                for rate in RATES:
                    pair = (
                        metrics.threshold_for(confidence, hits, groups, rate, CONFIDENCE_LEVEL),
                        metrics.observed_threshold(metrics.coverage(confidence, hits), rate),
                    )
                    found[rate].append([outcome(asked.max(axis=1), right, t) for t in pair])
            for rate, runs in found.items():
                values = np.array(runs)  # (seeds, 2, 2)
                known = ~np.isnan(values[:, :, 0])
                kept = (values[:, :, 1] <= rate) & known
                sums += [known.sum(axis=0), kept.sum(axis=0)]
                cells = [
                    f"{known[:, 0].sum()}, {known[:, 1].sum()} of {given.seeds}",
                    *(", ".join(mean(values[:, way, which]) for way in (0, 1)) for which in (0, 1)),
                    f"{kept[:, 0].sum()}, {kept[:, 1].sum()}",
                ]
                table.add_row(case.data, f"{rate:.0%}", *cells)
                Console(stderr=True).print(case.data, rate, *cells)
    console = Console(width=110)
    console.print(table)
    ours, peer = (sums[1] / sums[0]).tolist()
    holds = "holds" if ours >= 0.9 else "DOES NOT HOLD"
    console.print(
        f"kept: {ours:.3f} of the thresholds, peer {peer:.3f}; at least 0.9 expected: {holds}"
    )


def outcome(confidence: np.ndarray, right: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return which share is answered and which of that is wrong; NaN without a threshold."""
    if math.isinf(threshold):
        return math.nan, math.nan
    answered = confidence >= threshold
    return float(answered.mean()), float((~right[answered]).mean()) if answered.any() else 0.0


def mean(values: np.ndarray) -> str:
    """Return the mean of what is known."""
    known = values[~np.isnan(values)]
    return f"{known.mean():.3f}" if len(known) else "-"


if __name__ == "__main__":
    main()
