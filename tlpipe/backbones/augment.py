"""Show an image otherwise than it was taken: cropped, mirrored, turned, in other light.

What is done to an image is drawn with a seed, on the CPU; it is carried out where the images are.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tlpipe.params import Section

if TYPE_CHECKING:
    from torch import Tensor

CHANCES = 9
Draws = npt.NDArray[np.float32]
_WIDEST = np.log(4 / 3)  # of a crop, as logarithm of its aspect ratio
_GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Augmentation(Section):
    """How much images may vary and keep their label."""

    mirror: bool = Field(default=True, description="Mirror every other image left to right.")
    least_area: float = Field(
        default=0.5, gt=0, le=1, description="Smallest share of the image that a crop shows."
    )
    rotation_degrees: float = Field(
        default=0.0, ge=0, le=180, description="Turn by up to so much, either way."
    )
    light: float = Field(
        default=0.2, ge=0, lt=1, description="Change brightness, contrast and colour by this share."
    )


def draw(augmentation: Augmentation, chances: npt.NDArray[np.float64]) -> Draws:
    """Return what is done to each image, (B, 9) float32.

    ``chances``: (B, ``CHANCES``) uniform in [0, 1). A row of the result: the affine map (2 x 3)
    from places in the result to places in the image, both in [-1, 1]; factors of brightness,
    contrast and saturation.
    """
    area, shape, left, top, angle, flip = chances[:, :6].T
    area = augmentation.least_area + area * (1 - augmentation.least_area)
    # A crop of the whole area is a square.
    aspect = np.exp(np.minimum(_WIDEST, -np.log(area)) * (2 * shape - 1))
    width, height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    turn = np.radians(augmentation.rotation_degrees) * (2 * angle - 1)
    side = np.where(augmentation.mirror & (flip < 0.5), -width, width)
    draws = np.column_stack(
        [
            *(side * np.cos(turn), -height * np.sin(turn), (1 - width) * (2 * left - 1)),
            *(side * np.sin(turn), height * np.cos(turn), (1 - height) * (2 * top - 1)),
            1 + augmentation.light * (2 * chances[:, 6:] - 1),
        ]
    )
    return draws.astype(np.float32)


def apply(squares: "Tensor", draws: "Tensor", crop_px: int) -> "Tensor":
    """Return what was drawn of each image.

    ``squares``: (B, S, S, 3) uint8 RGB; ``draws``: (B, 9) float32, as ``draw`` makes them.
    Returns: (B, 3, crop_px, crop_px) float32, RGB in [0, 255].
    """
    import torch
    from torch.nn import functional

    images = squares.permute(0, 3, 1, 2).to(torch.float32)
    grid = functional.affine_grid(
        draws[:, :6].reshape(-1, 2, 3), [len(images), 3, crop_px, crop_px], align_corners=False
    )
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    # Colour is mixed with gray, then contrast with the mean gray: together one matrix an image.
    brightness, contrast, saturation = draws[:, 6:].reshape(-1, 3, 1, 1).unbind(1)
    weights = images.new_tensor(_GRAY)
    mean = (images.mean((2, 3)) @ weights).reshape(-1, 1, 1)
    colours = saturation * torch.eye(3, device=weights.device) + (1 - saturation) * weights
    offset = brightness * (1 - contrast) * mean
    changed = torch.baddbmm(offset, brightness * contrast * colours, images.flatten(2))
    return changed.clamp_(0, 255).view_as(images)
