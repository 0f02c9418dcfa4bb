"""Ways to lay images out on a plane: ``python benchmarks/embedding.py PROJECT...``.

Features of the pretrained network of the images of projects, after 'tlpipe run', on a plane: ours
(t-SNE from principal components), two principal components alone, and UMAP where it is installed.
``trust``: trustworthiness, whether the ten nearest on the plane are near by features, too (Venna
and Kaski, 2001; 1 at best); ``kept``: the share of the ten nearest by features that are among the
ten nearest on the plane; CPU seconds with one thread, those of UMAP after a first run that compiles
it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from tlpipe.backbones import activations
from tlpipe.explanation import embedding
from tlpipe.graph import PATHS

Floats = npt.NDArray[np.float32]
NEAR = 10


def components(found: Floats) -> Floats:
    """Return two principal components."""
    placed: Floats = PCA(2, svd_solver="covariance_eigh").fit_transform(found)
    return placed


def umap(found: Floats) -> Floats:
    """Return UMAP's places, from as many components as ours."""
    from umap import UMAP

    reduced = PCA(min(50, *found.shape), svd_solver="covariance_eigh").fit_transform(found)
    placed: Floats = UMAP(random_state=0, n_jobs=1).fit_transform(reduced)
    return placed


def ways() -> dict[str, Callable[[Floats], Floats]]:
    """Return the ways that are installed."""
    known: dict[str, Callable[[Floats], Floats]] = {
        "ours": embedding.place,
        "components": components,
    }
    try:
        umap(np.random.default_rng(0).normal(size=(200, 60)).astype(np.float32))
    except ImportError:
        return known
    return {**known, "UMAP": umap}


def near(found: Floats) -> npt.NDArray[np.int64]:
    """Return the nearest of each row, (N, NEAR)."""
    search = NearestNeighbors(n_neighbors=NEAR).fit(found)
    nearest: npt.NDArray[np.int64] = search.kneighbors(return_distance=False)
    return nearest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("projects", type=Path, nargs="+")
    known = ways()
    table = Table("project", "images", *(f"{n}:\ntrust, kept, CPU s" for n in known))
    for project in parser.parse_args().projects:
        stored = activations.load(project / PATHS["activations"])
        found = stored.features[:].astype(np.float32)
        expected, cells = near(found), []
        for place in known.values():
            with threadpool_limits(1):
                start = time.process_time()
                placed = place(found)
                seconds = time.process_time() - start
            kept = np.mean([len({*a} & {*b}) for a, b in zip(near(placed), expected, strict=True)])
            trust = trustworthiness(found, placed, n_neighbors=NEAR)
            cells.append(f"{trust:.3f}, {kept / NEAR:.2f}, {seconds:.1f}")
        table.add_row(project.name, f"{len(found):,}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
