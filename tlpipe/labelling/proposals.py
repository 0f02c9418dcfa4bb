"""Which images of an unlabelled folder to label next."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.backbones import activations as stored
from tlpipe.backbones import embed
from tlpipe.backbones.activations import ALL
from tlpipe.data import ingest
from tlpipe.data import pixels as packed
from tlpipe.data.manifest import load_manifest, load_split
from tlpipe.errors import ArtifactError, TlpipeError
from tlpipe.labelling.queues import USEFUL, Item, Queue, Shown
from tlpipe.labelling.table import Subject, Table, decided
from tlpipe.training import linear_probe

_log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
_L2, _MAX_ITERATIONS, _TOLERANCE = 0.01, 100, 1e-5  # as audit's, and no better than is needed
_AHEAD = 5  # rounds that are listed, so that nobody waits while the next one is computed


@dataclass(frozen=True)
class Reading:
    """An unlabelled folder: how it is read and embedded, and where that is kept.

    Attributes:
        address: the folder.
        kept: where pixels and activations lie, for the next time.
        ingest: how images are resized, with nothing left to be decided.
        embed: the network; all of it is frozen.
    """

    address: str
    kept: Path
    ingest: ingest.Params
    embed: embed.Params


@dataclass(frozen=True)
class Known:
    """What is labelled already: features (N, D), label numbers (N,), the classes, the images.

    ``graph`` names what computed the features; nothing where there are none.
    """

    features: Floats
    labels: Labels
    classes: tuple[str, ...]
    images: frozenset[str] = frozenset()
    graph: str = ""

    @classmethod
    def nothing(cls, classes: tuple[str, ...]) -> "Known":
        """Return that nothing is labelled yet."""
        return cls(np.empty((0, 0)), np.empty(0, np.int64), classes)


def known_of(activations: Path, split: Path, classes: tuple[str, ...]) -> Known:
    """Return a project's images for training and validation; test images choose nothing.

    Raises:
        ArtifactError: ``embed`` or ``split`` has not run, or not on the same images.
    """
    found, table = stored.load(activations), load_split(split)
    if len(found.keys) != len(table):
        raise ArtifactError(
            f"{activations} holds {len(found.keys)} images and {split} {len(table)}; expected the "
            f"same. Run 'tlpipe run'."
        )
    rows = [row for row, one in enumerate(table) if one.split in ("train", "validation")]
    numbers = [classes.index(table[row].label) for row in rows]
    return Known(
        found.features[np.array(rows, np.int64)].astype(np.float64),
        np.array(numbers, np.int64),
        classes,
        frozenset(one.sha256 for one in table),
        found.origin.graph,
    )


@dataclass(frozen=True)
class Images:
    """The images of a folder: what is asked of each, its features (N, D), and what made those."""

    items: tuple[Item, ...]
    features: Floats
    graph: str


def read(reading: Reading, prefix: str) -> Images:
    """Read and embed a folder; what was done before is not done again.

    ``prefix``: before its paths, in the table.

    Raises:
        DataError: it is missing, or has no image that can be read.
    """
    kept = reading.kept
    kept.mkdir(parents=True, exist_ok=True)
    paths = {
        name: kept / file
        for name, file in (
            ("manifest", "manifest.csv"),
            ("rejects", "rejects.csv"),
            ("duplicates", "duplicates.csv"),
            ("pixels", "pixels"),
            ("data_report", "report.json"),
        )
    }
    ingest.run_unlabelled(address=reading.address, **paths, params=reading.ingest)
    params = reading.embed.model_copy(update={"freeze": ALL, "views": 0, "advice": None})
    known = {name: paths[name] for name in ("manifest", "pixels")}
    embed.run(**known, activations=kept / "activations", params=params)
    squares = packed.load(paths["pixels"]).array
    found = stored.load(kept / "activations")
    rows: dict[str, int] = {}
    for row, entry in enumerate(entries := list(load_manifest(paths["manifest"]))):
        rows.setdefault(entry.sha256, row)  # of equal images one is asked for
    items = []
    for row in rows.values():
        entry = entries[row]
        subject = Subject(entry.sha256, "", prefix + entry.path, ("",))
        items.append(Item((_shown(subject, squares, row),), ""))
    chosen = np.array([*rows.values()], np.int64)
    return Images(tuple(items), found.features[chosen].astype(np.float64), found.origin.graph)


def _shown(subject: Subject, squares: packed.Chunks, row: int) -> Shown:
    return Shown(subject, "", lambda: squares[row])
