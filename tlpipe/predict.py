"""Command ``predict``: answer for image files with a bundle.

``Predictor`` is what the evaluation measures and what the server serves.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlpipe.bundle import IMAGES, LOGITS, PROBABILITIES, Bundle, load
from tlpipe.data.images import FORMATS, UNREAD, Pixels, crop_middle, read_square
from tlpipe.errors import ArtifactError, ImageError, ParamsError
from tlpipe.runtime import open_session

_log = logging.getLogger(__name__)
Scores = npt.NDArray[np.float32]
_SHOWN = 5  # names of what is left out


@dataclass(frozen=True)
class Prediction:
    """``probabilities`` has every label, the likeliest first; they sum to 1."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Predictor:
    """A bundle with its ONNX Runtime session; safe to call from several threads.

    Example:
        >>> predictor = Predictor(bundle, threads=1)  # or the folder of a bundle
        >>> predictor.predict(image).label in bundle.labels  # image: the bytes of an image file
        True
        >>> predictor.predict("artifacts/evaluate/examples/0.png") == predictor.predict(image)
        True
    """

    def __init__(
        self, bundle: Bundle | Path | str, *, precision: str = "fp32", threads: int | None = None
    ) -> None:
        """Open a graph of a bundle.

        Args:
            bundle: as ``load_bundle`` returns it, or its folder, which is verified.
            precision: one of those that the bundle has.
            threads: for one call; None lets ONNX Runtime take every core.

        Raises:
            ArtifactError: the bundle is damaged, or the installed ONNX Runtime cannot run it.
            ParamsError: that is no bundle, or it has no graph of that precision.
        """
        if isinstance(bundle, (str, Path)):
            bundle = _from_folder(Path(bundle))
        elif not isinstance(bundle, Bundle):
            raise ParamsError(
                f"expected a bundle, such as load_bundle returns, or the path of its folder; got "
                f"{type(bundle).__name__}."
            )
        self.bundle = bundle
        graph = bundle.graph(precision)
        try:
            self._session = open_session(graph, threads=threads)
        except Exception as error:  # ONNX Runtime's errors have no class in common
            import onnxruntime

            made_with = bundle.provenance.get("packages", {}).get("onnxruntime", "unknown")
            raise ArtifactError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {graph}: "
                f"{' '.join(str(error).split())[:300]}. It was made with {made_with}; install that "
                f"or a newer one, or export the model anew."
            ) from error

    @property
    def provider(self) -> str:
        """The execution provider that runs the graph."""
        return str(self._session.get_providers()[0])

    def predict(self, image: bytes | Path | str) -> Prediction:
        """Answer for one image file: its bytes, or its path.

        Raises:
            ImageError: it is no usable image.
            OSError: the file cannot be read.
            ParamsError: it is neither bytes nor a path, but an array, an opened image, a list.
        """
        if isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        elif not isinstance(image, (bytes, bytearray, memoryview)):
            raise ParamsError(
                f"expected the bytes of one image file, such as Path('x.jpg').read_bytes(), or its "
                f"path; got {type(image).__name__}."
            )
        pixels, _ = read_square(image, self.bundle.preprocessing)
        _, probabilities = self.scores(pixels[np.newaxis])
        return self.name(probabilities[0])

    def scores(self, squares: Pixels) -> tuple[Scores, Scores]:
        """Return logits and probabilities, (N, C) each, of (N, short side, short side, 3) uint8."""
        images = np.ascontiguousarray(crop_middle(squares, self.bundle.preprocessing.crop_px))
        logits, probabilities = self._session.run([LOGITS, PROBABILITIES], {IMAGES: images})
        return logits, probabilities

    def name(self, probabilities: Sequence[float] | Scores) -> Prediction:
        """Put the labels to one row of probabilities (C,)."""
        pairs = zip(self.bundle.labels, map(float, probabilities), strict=True)
        ranked = dict(sorted(pairs, key=lambda pair: -pair[1]))
        label, probability = next(iter(ranked.items()))
        return Prediction(label, probability, ranked)


def _from_folder(folder: Path) -> Bundle:
    if not folder.is_dir():
        raise ParamsError(
            f"{folder} is no folder of a bundle; expected one, or what load_bundle returns for a "
            f"registered model: Predictor(load_bundle('digits@champion'))."
        )
    return load(folder)


def run(*, bundle: Bundle, images: Sequence[Path], precision: str = "fp32") -> list[dict[str, Any]]:
    """Return one answer per image, in order: ``path`` and either the prediction or ``error``.

    A file that cannot be read costs its own answer only. Of a folder, the files with the ending of
    an image are answered for, in the order of their names.

    Raises:
        ParamsError: the bundle has no graph of that precision, or a folder has no such file.
    """
    predictor = Predictor(bundle, precision=precision)
    return [
        {"path": str(image), **_answer(predictor, image)}
        for path in images
        for image in (_images_in(path) if path.is_dir() else [path])
    ]


def _images_in(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    names = {suffix for suffix, name in known.items() if name in FORMATS}
    names.update(*(suffixes for suffixes, _ in UNREAD))  # answered for with an error
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in entries if path.suffix.lower() in names and path.is_file()]
    if left := [f"{path.name}{'/' * path.is_dir()}" for path in entries if path not in set(found)]:
        more = ", ..." * (len(left) > _SHOWN)
        _log.warning(
            "not answered for, since not called as images are: %d of the %d in %s: %s%s",
            *(len(left), len(entries), folder, ", ".join(left[:_SHOWN]), more),
        )
    if not found:
        raise ParamsError(
            f"the folder {folder} holds no images itself; expected one with images directly in it, "
            f"or files, such as {folder}/*/*.jpg."
        )
    return found


def _answer(predictor: Predictor, image: Path) -> dict[str, Any]:
    try:
        return asdict(predictor.predict(image))
    except ImageError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"unreadable: {error.strerror}"}
