"""How many labels the order of ``tlpipe label`` saves: ``python benchmarks/label.py [SET ...]``.

A third of each set's images test, whole groups of near duplicates at a time; the rest is a folder
without labels. Starting from none, images are labelled by their true classes, in rounds of ten: in
the order that ``label`` proposes, and in random order. After each round a linear probe is solved on
what is labelled, the same way for both, and answers for the test images. The table asks how many
labels it takes to be as accurate as random order is with N labels; means over all seeds, each of
which draws other test images, and an interval by bootstrap over seeds. Both orders run in turn.

The method was chosen on hymenoptera and rsscn; the sets that are judged by default had no say.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from tlpipe.backbones import embed, sampling
from tlpipe.data import ingest
from tlpipe.labelling.proposals import Known, Reading, propose, read
from tlpipe.progress import meter
from tlpipe.training import linear_probe

ROOT = Path(__file__).resolve().parent.parent
SETS = ("sign-digits", "trash")
NETWORK = embed.Params(threads=2)
ROUND = 10
ASKED = (50, 100, 150, 200, 300)  # labels in random order
GOAL = 0.7
CONFIDENCE, BOOTSTRAP = 0.9, 2000
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=SETS, metavar="SET")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--labels", type=int, default=300, help="Label so many, at most.")
    parser.add_argument("--keep", type=Path, help="What was embedded there is not embedded again.")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    columns = ("data", "classes", "accuracy", "labels at random", "in this order", "ratio")
    table = Table(*columns, title=f"{given.seeds} seeds, {CONFIDENCE:.0%} intervals")
    said = []
    with tempfile.TemporaryDirectory() as name:
        for data in given.sets:
            folder = (given.keep or Path(name)) / data
            found = curves(given.data / data, folder, given.seeds, given.labels)
            ratios = add_rows(table, data, *found)
            table.add_section()
            reached = sum(ratio <= GOAL for ratio in ratios.values())
            said.append(
                f"{data}: {GOAL} or less in {reached} of {len(ratios)} rows; the mean ratio is "
                f"{np.mean([*ratios.values()]):.2f}"
            )
    Console(width=100).print(table)
    print("\n".join(said))


def curves(data: Path, folder: Path, seeds: int, most: int) -> tuple[int, Floats, Floats]:
    """Return how many classes there are, and accuracies (seeds, rounds) in both orders."""
    section = sampling.resolve(ingest.Params(source=str(data)), NETWORK.backbone)
    images = read(Reading(str(data), folder, section, NETWORK), "")
    names = [Path(item.subjects[0].path).parent.name for item in images.items]
    classes, labels = np.unique(names, return_inverse=True)
    groups = grouped(folder / "manifest.csv", [item.subjects[0].path for item in images.items])
    ours, random = [], []
    with meter(data.name, total=2 * seeds) as shown:
        for seed in range(seeds):
            order = np.random.default_rng(seed)
            tests = np.isin(groups, drawn(groups, order))
            pool, test = np.flatnonzero(~tests), np.flatnonzero(tests)
            known = Known.nothing(tuple(classes))
            arguments = (images.features, labels.astype(np.int64), pool, test, known, most)
            ours.append(labelled(*arguments, order=None))
            shown.advance(1)
            random.append(labelled(*arguments, order=order.permutation(len(pool))))
            shown.advance(1)
    return len(classes), np.array(ours), np.array(random)


def grouped(manifest: Path, paths: list[str]) -> Labels:
    """Return the number of each image's group of near duplicates."""
    from tlpipe.data.manifest import load_manifest

    group = {entry.path: entry.group for entry in load_manifest(manifest)}
    return np.unique([group[path] for path in paths], return_inverse=True)[1].astype(np.int64)


def drawn(groups: Labels, random: np.random.Generator) -> Labels:
    """Return a third of the groups."""
    found = random.permutation(groups.max() + 1)
    return found[: len(found) // 3]


def labelled(
    features: Floats,
    labels: Labels,
    pool: Labels,
    test: Labels,
    known: Known,
    most: int,
    *,
    order: Labels | None,
) -> Floats:
    """Label a pool in an order, or as is proposed; return the accuracy after each round."""
    marks, accuracies = np.full(len(pool), -1, np.int64), []
    standard = linear_probe.standardisation([features[pool]])
    shown, asked = standard.apply(features[pool]), standard.apply(features[test])
    for start in range(0, min(most, len(pool) - ROUND), ROUND):
        if order is None:
            rows = np.array(propose(features[pool], marks, known, ROUND), np.int64)
        else:
            rows = order[start : start + ROUND]
        marks[rows] = labels[pool][rows]
        is_labelled = marks >= 0
        head = linear_probe.solve(
            [(shown[is_labelled], marks[is_labelled])],
            np.ones(int(is_labelled.sum())),
            classes=len(known.classes),
            l2=0.01,
            max_iterations=100,
            tolerance=1e-5,
        ).head
        accuracies.append((head.logits(asked).argmax(axis=1) == labels[test]).mean())
    return np.array(accuracies)


def needed(curve: Floats, wanted: float) -> float:
    """Return after how many labels a mean curve reaches an accuracy, between rounds in a line."""
    best = np.maximum.accumulate(curve)
    reached = np.flatnonzero(best >= wanted)
    if not len(reached):
        return float("inf")
    place = int(reached[0])
    if place == 0:
        return float(ROUND)
    before, after = best[place - 1], best[place]
    return ROUND * (place + float((wanted - before) / (after - before)))


def compared(ours: Floats, random: Floats, labels: int) -> tuple[float, float, float]:
    """Return what random order has reached with so many labels, and how many each order needs."""
    wanted = float(random.mean(axis=0)[: labels // ROUND].max())
    return wanted, needed(random.mean(axis=0), wanted), needed(ours.mean(axis=0), wanted)


def add_rows(
    table: Table, data: str, classes: int, ours: Floats, random: Floats
) -> dict[int, float]:
    """Add a row for each number of labels; return the ratios."""
    draws = np.random.default_rng(0).integers(0, len(ours), (BOOTSTRAP, len(ours)))
    ratios = {}
    for labels in (n for n in ASKED if n <= ROUND * random.shape[1]):
        wanted, of_random, of_ours = compared(ours, random, labels)
        ratios[labels] = of_ours / of_random
        many = []
        for rows in draws:
            _, one, other = compared(ours[rows], random[rows], labels)
            many.append(other / one)
        low, high = np.quantile(
            many, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest"
        )
        cells = (str(classes), f"{wanted:.3f}", f"{of_random:.0f}", f"{of_ours:.0f}")
        table.add_row(data, *cells, f"{ratios[labels]:.2f} ({low:.2f} to {high:.2f})")
    print(f"{data}: {ratios}", file=sys.stderr, flush=True)
    return ratios


if __name__ == "__main__":
    main()
