"""Answer with a bundle: what the evaluation measures is what the server serves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlpipe.data.images import Pixels, crop_middle, read_square
from tlpipe.errors import ArtifactError
from tlpipe.export.bundle import IMAGES, LOGITS, PROBABILITIES, Bundle
from tlpipe.runtime import open_session

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """``probabilities`` has every label, the likeliest first; they sum to 1."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Predictor:
    """A bundle with its ONNX Runtime session; safe to call from several threads."""

    def __init__(
        self, bundle: Bundle, *, precision: str = "fp32", threads: int | None = None
    ) -> None:
        """Open a graph of a bundle, which ``bundle.load`` has verified.

        ``precision``: one of those that the bundle has; ``threads``: threads for one call; None
        lets ONNX Runtime take every core.

        Raises:
            ArtifactError: the ONNX Runtime that is installed cannot run it.
            ParamsError: the bundle has no graph of that precision.
        """
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

    def predict(self, image: bytes) -> Prediction:
        """Answer for the bytes of one image file.

        Raises:
            ImageError: the bytes are no usable image.
        """
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
