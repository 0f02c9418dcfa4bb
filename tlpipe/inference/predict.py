"""Command ``predict``: answer for image files from a bundle."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tlpipe.errors import ImageError
from tlpipe.export.bundle import Bundle
from tlpipe.inference.predictor import Predictor


def run(*, bundle: Bundle, images: Sequence[Path], precision: str = "fp32") -> list[dict[str, Any]]:
    """Return one answer per image, in order: ``path`` and either the prediction or ``error``.

    A file that cannot be read costs its own answer only.

    Raises:
        ParamsError: the bundle has no graph of that precision.
    """
    predictor = Predictor(bundle, precision=precision)
    return [{"path": str(image), **_answer(predictor, image)} for image in images]


def _answer(predictor: Predictor, image: Path) -> dict[str, Any]:
    try:
        return asdict(predictor.predict(image.read_bytes()))
    except ImageError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"unreadable: {error.strerror}"}
