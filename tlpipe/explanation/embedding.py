"""Images as points: their features, the training images nearest to some, and a map of all.

Features are what the trained network's last stage gives, which is what its head decides by.
"""

import io
import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tlpipe.data import pixels as packed
from tlpipe.explanation.channels import batches, middle
from tlpipe.explanation.maps import Network
from tlpipe.progress import Meter, meter
from tlpipe.training.model import Dataset

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_COMPONENTS = 50  # of PCA, that t-SNE sees
_PERPLEXITY = 30  # neighbours that count, about
_FEW = 3 * _PERPLEXITY
_ITERATIONS = 1000


def features(
    network: Network, data: Dataset, squares: packed.Chunks, rows: Ints, shown: Meter
) -> Floats:
    """Return the trained network's features of images, (N, D).

    Where all of it is frozen they are stored; else the open stages run, on what the last frozen
    one gave if that is stored.
    """
    stored, opened = data.activations, data.open_stages
    if not opened:
        shown.advance(len(rows))
        found: Floats = stored.features[rows].astype(np.float32)
        return found
    blocks = []
    stages, crop_px = list(network.stages.values()), data.backbone.preprocessing.crop_px
    for batch in batches(len(rows)):
        with torch.inference_mode():
            if stored.boundary is None:
                images = torch.from_numpy(middle(squares, rows[batch], crop_px))
                current, left = network.normalise(images), stages
            else:
                plain = stored.boundary[rows[batch]][:, 0].astype(np.float32)
                current, left = torch.from_numpy(plain), stages[-opened:]
                stored.boundary.unmap()
            for stage in left:
                current = stage(current)
        blocks.append(current.numpy())
        squares.unmap()
        shown.advance(len(blocks[-1]))
    return np.concatenate(blocks)


def answers(network: Network, found: Floats) -> tuple[Ints, Floats]:
    """Return the number of the class that the head names for features (N, D), and all logits."""
    with torch.inference_mode():
        logits: Floats = network.head(torch.from_numpy(found)).numpy()
    return logits.argmax(axis=1), logits


@dataclass(frozen=True)
class Nearest:
    """For Q images the K nearest of N others, nearest first: (Q, K) positions and cosines."""

    positions: Ints
    cosines: Floats


def nearest(
    queries: Floats,
    blocks: Iterable[Floats],
    count: int,
    *,
    own: Ints | None = None,
    groups: Ints | None = None,
) -> Nearest:
    """Return for each row of queries (Q, D) the most similar of other rows, by cosine.

    ``blocks``: the other rows, some at a time, (n, D); positions count through all of them.
    ``own`` (Q,), ``groups`` (N,): numbers of groups; the cosine to a row of one's own is -inf.
    """
    asked = _unit(queries)
    best = np.empty((len(asked), 0), np.float32)
    where = np.empty((len(asked), 0), np.int64)
    seen = 0
    for block in blocks:
        new = asked @ _unit(block).T
        if own is not None and groups is not None:
            new[own[:, None] == groups[seen : seen + len(block)]] = -np.inf
        cosines = np.concatenate([best, new], axis=1)
        here = np.broadcast_to(np.arange(seen, seen + len(block)), (len(asked), len(block)))
        positions = np.concatenate([where, here], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        best = np.take_along_axis(cosines, order, axis=1)
        where = np.take_along_axis(positions, order, axis=1)
        seen += len(block)
    return Nearest(where, best)


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Floats = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


class _Iterations(io.StringIO):
    """Takes what t-SNE prints, and tells a meter which iteration it says."""

    def __init__(self, shown: Meter) -> None:
        super().__init__()
        self._shown, self._done = shown, 0

    def write(self, text: str) -> int:
        for said in re.findall(r"Iteration (\d+)", text):
            self._shown.advance(int(said) - self._done)
            self._done = int(said)
        return len(text)


def place(found: Floats) -> Floats:
    """Return a place on a plane for each of N images, (N, 2) in [0, 1], by features (N, D).

    Neighbours stay neighbours as far as a plane allows it (t-SNE); distances between far apart
    ones say little. Fewer images than a neighbourhood are placed by principal components.

    Source: van der Maaten (2014), Accelerating t-SNE using tree-based algorithms, JMLR 15; started
    from principal components as in Kobak and Berens (2019), Nature Communications 10.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # Where all are equal, the share of the variance that a component explains is 0 / 0.
    with threadpool_limits(1), np.errstate(invalid="ignore"):
        most = min(_COMPONENTS, *found.shape)
        components = PCA(most, svd_solver="covariance_eigh").fit_transform(
            found.astype(np.float64)  # it squares them
        )
        placed = components[:, :2]
        if len(found) > _FEW:
            with (
                meter("t-SNE, iterations", total=_ITERATIONS) as shown,
                redirect_stdout(_Iterations(shown)),
            ):
                placed = TSNE(
                    init="pca",
                    max_iter=_ITERATIONS,
                    perplexity=_PERPLEXITY,
                    random_state=0,
                    n_jobs=1,
                    verbose=2,
                ).fit_transform(components)
    if placed.shape[1] < 2:
        placed = np.pad(placed, ((0, 0), (0, 2 - placed.shape[1])))
    low, high = placed.min(axis=0), placed.max(axis=0)
    scaled: Floats = ((placed - low) / np.maximum((high - low).max(), 1e-12)).astype(np.float32)
    return scaled
