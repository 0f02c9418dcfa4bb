"""The choice of l2: ``python benchmarks/linear_probe.py [--data FOLDER] [--seeds 5]``.

Accuracy and log loss on test splits, mean over seeds that draw splits anew. Ours: four-fold
cross-validation over the training and the validation split, least mean loss, then a fit on both.
The peer: what version 0.1 did and many scripts do, by scikit-learn: decades of l2 fitted on the
training split alone, of which the strongest within one standard error of the best on validation is
taken. Both see the same features and the same images; log losses are after temperature scaling on
what each has held out. ``images``: so many of each class for training and for validation each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from accuracy import ROOT, Case, first, prepare
from rich.console import Console
from rich.table import Table
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from tlpipe import held_out
from tlpipe.training import linear_probe
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.recipe import Recipe

Floats = npt.NDArray[np.float64]
IMAGES = (5, 10, 50, 200, None)
DECADES = (1.0, 0.1, 0.01, 0.001, 0.0001)
# Of the built-in digits so many of each class, so that 200 can train.
CASES = [
    Case("hymenoptera", "all", 0),
    Case("rsscn", "all", 0),
    Case("trash", "all", 0),
    Case("digits", "all", 0),
    Case("digits", "all", 0, digits=334),
    Case("sign-digits", "all", 0, validation=0.15, test=0.15),
]
Answer = Callable[[Floats], Floats]


def ours(data: Dataset) -> tuple[Answer, float, float]:
    """Return what gives logits of features, the temperature, and the l2."""
    found = linear_probe.fit(linear_probe.stored(data), data, data.labelled, Recipe())
    held = found.held_out(data.labelled)
    divisor = held_out.fit_temperature(held.logits, held.labels)
    return lambda x: found.head.logits(found.standard.apply(x)), divisor, found.best.l2


def by_validation(data: Dataset) -> tuple[Answer, float, float]:
    """Do the same by one standard error over decades, on the training split alone."""
    train, validation = (features(data, part) for part in (data.train, data.validation))
    standard = linear_probe.standardisation([train])
    tried = []
    for l2 in DECADES:
        model = LogisticRegression(C=1 / (l2 * len(train)), max_iter=3000, tol=1e-5)
        model.fit(standard.apply(train), data.train.labels)
        logits = answer(model, standard)(validation)
        losses = -log_softmax(logits, axis=1)[np.arange(len(logits)), data.validation.labels]
        tried.append((model, l2, logits, losses))
    best = min(tried, key=lambda t: t[3].mean())[3]
    allowed = best.mean() + best.std() / np.sqrt(len(best))
    model, l2, logits, _ = next(t for t in tried if t[3].mean() <= allowed)
    divisor = held_out.fit_temperature(logits.astype(np.float32), data.validation.labels)
    return answer(model, standard), divisor, l2


def answer(model: LogisticRegression, standard: linear_probe.Standardisation) -> Answer:
    """Return what gives logits (N, C), also where there are two classes."""

    def logits(x: Floats) -> Floats:
        found = model.decision_function(standard.apply(x))
        return np.stack([-found / 2, found / 2], axis=1) if found.ndim == 1 else found

    return logits


def features(data: Dataset, examples: Examples) -> Floats:
    """Return the stored features of images."""
    return np.concatenate(list(linear_probe.stored(data)(examples.rows, False)))


def measure(
    way: Callable[[Dataset], tuple[Answer, float, float]], data: Dataset, test: Examples
) -> tuple[float, float, float, float]:
    """Return accuracy and log loss on the test images, the l2, and CPU seconds."""
    start = time.process_time()
    logits_of, divisor, l2 = way(data)
    seconds = time.process_time() - start
    logits = logits_of(features(data, test))
    losses = -log_softmax(logits / divisor, axis=1)[np.arange(len(logits)), test.labels]
    hits = logits.argmax(axis=1) == test.labels
    return float(hits.mean()), float(losses.mean()), l2, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="Cases of this data set alone.")
    given = parser.parse_args()
    names = ("accuracy", "log loss", "l2 (median)", "CPU s")
    table = Table("data", "images", "test", *(f"{name}:\nours, peer" for name in names), "reached")
    with tempfile.TemporaryDirectory() as name:
        for case in (case for case in CASES if given.only in case.data):
            folder, source = Path(name) / f"{case.data} {case.digits}", given.data / case.data
            folder.mkdir()
            if case.data == "digits":
                drawn = yaml.safe_load((ROOT / "data" / "digits.yaml").read_text())
                source = folder / "digits.yaml"
                source.write_text(yaml.safe_dump(drawn | {"images_per_class": case.digits}))
            found: dict[int | None, list[list[tuple[float, float, float, float]]]] = {}
            for seed in range(given.seeds):
                whole, test = prepare(folder, source, case, seed)
                least = np.bincount(whole.train.labels).min()
                for count in IMAGES:
                    data = whole
                    if count is not None:
                        train, validation = (
                            first(whole.train, count),
                            first(whole.validation, count),
                        )
                        data = replace(whole, train=train, validation=validation)
                    if count is None or count <= least:
                        pair = [measure(way, data, test) for way in (ours, by_validation)]
                        found.setdefault(count, []).append(pair)
            for count, pairs in found.items():
                if len(pairs) < given.seeds:
                    continue
                values = np.array(pairs)  # (seeds, 2, 4)
                means, medians = values.mean(axis=0), np.median(values, axis=0)
                cells = [
                    f"{means[0, 0]:.4f}, {means[1, 0]:.4f}",
                    f"{means[0, 1]:.3f}, {means[1, 1]:.3f}",
                    f"{medians[0, 2]:.2g}, {medians[1, 2]:.2g}",
                    f"{means[0, 3]:.1f}, {means[1, 3]:.1f}",
                ]
                spread = statistics.stdev(values[:, 0, 0] - values[:, 1, 0])
                noise = spread / given.seeds**0.5
                is_better = means[0, 0] >= means[1, 0]
                reached = "yes" if is_better else f"no ({means[0, 0] - means[1, 0]:+.4f}"
                reached += "" if is_better else f", its standard error {noise:.4f})"
                table.add_row(case.data, str(count or "all"), str(len(test)), *cells, reached)
                Console(stderr=True, width=110).print(case.data, count or "all", *cells, reached)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
