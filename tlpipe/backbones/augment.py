"""Random crop, flip, rotation and colour jitter, as one affine grid and one colour matrix.

Its parameters are sampled with a seed on the CPU; they are applied where the images are.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tlpipe.params import Section

if TYPE_CHECKING:
    from torch import Tensor

UNIFORMS = 9
_WIDEST = np.log(4 / 3)  # of a crop, as logarithm of its aspect ratio
_GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Augmentation(Section):
    """How much images may vary and keep their label."""

    horizontal_flip: bool = Field(default=True, description="Flip every other image left to right.")
    min_crop_area: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Random crop: the smallest share of the image that one shows.",
    )
    rotation_degrees: float = Field(
        default=0.0, ge=0, le=180, description="Random rotation by up to so much, either way."
    )
    colour_jitter: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Colour jitter: how far brightness, contrast and saturation may change.",
    )


def sample(
    augmentation: Augmentation, uniforms: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Return the augmentation parameters of each image, (B, 9) float32.

    ``uniforms``: (B, ``UNIFORMS``) uniform in [0, 1). A row of the result: the affine map (2 x 3)
    from places in the result to places in the image, both in [-1, 1]; factors of brightness,
    contrast and saturation.
    """
    area, shape, left, top, angle, flip = uniforms[:, :6].T
    area = augmentation.min_crop_area + area * (1 - augmentation.min_crop_area)
    # A crop of the whole area is a square.
    aspect = np.exp(np.minimum(_WIDEST, -np.log(area)) * (2 * shape - 1))
    width, height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    turn = np.radians(augmentation.rotation_degrees) * (2 * angle - 1)
    side = np.where(augmentation.horizontal_flip & (flip < 0.5), -width, width)
    parameters = np.column_stack(
        [
            *(side * np.cos(turn), -height * np.sin(turn), (1 - width) * (2 * left - 1)),
            *(side * np.sin(turn), height * np.cos(turn), (1 - height) * (2 * top - 1)),
            1 + augmentation.colour_jitter * (2 * uniforms[:, 6:] - 1),
        ]
    )
    return parameters.astype(np.float32)


def apply(squares: "Tensor", parameters: "Tensor", crop_px: int) -> "Tensor":
    """Return the augmented images.

    ``squares``: (B, S, S, 3) uint8 RGB; ``parameters``: (B, 9) float32, as ``sample`` makes them.
    Returns: (B, 3, crop_px, crop_px) float32, RGB in [0, 255].
    """
    import torch
    from torch.nn import functional

    images = squares.permute(0, 3, 1, 2).to(torch.float32)
    grid = functional.affine_grid(
        parameters[:, :6].reshape(-1, 2, 3), [len(images), 3, crop_px, crop_px], align_corners=False
    )
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    # Colour is mixed with gray, then contrast with the mean gray: together one matrix an image.
    brightness, contrast, saturation = parameters[:, 6:].reshape(-1, 3, 1, 1).unbind(1)
    weights = images.new_tensor(_GRAY)
    mean = (images.mean((2, 3)) @ weights).reshape(-1, 1, 1)
    colours = saturation * torch.eye(3, device=weights.device) + (1 - saturation) * weights
    offset = brightness * (1 - contrast) * mean
    changed = torch.baddbmm(offset, brightness * contrast * colours, images.flatten(2))
    return changed.clamp_(0, 255).view_as(images)
