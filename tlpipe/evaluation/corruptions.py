"""Common corruptions of images, to measure robustness: blur, noise, JPEG, brightness.

Source of the idea and of the kinds: Hendrycks and Dietterich (2019), Benchmarking neural network
robustness to common corruptions and perturbations.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from tlpipe.data.images import Pixels
from tlpipe.seeds import generator

# Mild, medium and strong: blur, radius in pixels; noise, deviation in grey levels; JPEG, quality;
# brightness, factor.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "blur": (1.0, 2.0, 4.0),
    "noise": (10.0, 25.0, 50.0),
    "jpeg": (50, 25, 10),
    "dark": (0.7, 0.45, 0.25),
    "bright": (1.3, 1.7, 2.2),
}


def corrupt(images: Pixels, keys: Sequence[str], kind: str, strength: float) -> Pixels:
    """Return images (N, H, W, 3) uint8 RGB, each changed in this way.

    ``keys``: (N,) what each is called. What becomes of an image depends on it, its key, the kind
    and the strength, not on the images beside it.
    """
    return np.stack(
        [
            _noisy(image, key, strength)
            if kind == "noise"
            else np.asarray(_change(Image.fromarray(image), kind, strength))
            for image, key in zip(images, keys, strict=True)
        ]
    )


def _noisy(image: Pixels, key: str, strength: float) -> Pixels:
    noise = generator(0, f"noise {strength} {key}").normal(0, strength, image.shape)
    noisy: Pixels = (image + noise).round().clip(0, 255).astype(np.uint8)
    return noisy


def _change(image: Image.Image, kind: str, strength: float) -> Image.Image:
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength))
    if kind == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(strength))
        return Image.open(file)
    return ImageEnhance.Brightness(image).enhance(strength)
