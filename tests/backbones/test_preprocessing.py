"""The network sees what its weights were measured on: compared with timm and torchvision.

Known differences, which no case below has: a JPEG of more than four times the stored side is
decoded at half size; transparency is laid over white; images are turned upright.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from tlpipe.backbones.backbone import _contract, describe
from tlpipe.data.images import Preprocessing, crop_middle, read_square

# Names with the libraries' own: bilinear and bicubic, many sizes, several normalisations.
NAMES = (
    "efficientnet_b0",
    "efficientnet_lite0",
    "inception_v3",
    "resnet50",
    "swin_t",
    "timm/convnext_atto",
    "timm/resnet18",
    "timm/vit_tiny_patch16_224",
)


def transform(name: str) -> Callable[[Image.Image], torch.Tensor]:
    """Return what the library itself does to an image."""
    made: Callable[[Image.Image], torch.Tensor]
    if not name.startswith("timm/") and "lite" not in name:
        made = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        return made
    known = timm.get_pretrained_cfg(name.removeprefix("timm/").replace("eff", "tf_eff"))
    made = timm.data.create_transform(
        **timm.data.resolve_data_config({}, pretrained_cfg=known.to_dict())
    )
    return made


def levels(normalised: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return (3, H, W) in levels of 0 to 255."""
    mean, std = (np.array(getattr(preprocessing, n))[:, None, None] for n in ("mean", "std"))
    found: np.ndarray = (normalised * std + mean) * 255
    return found


@pytest.mark.parametrize("name", NAMES)
def test_photos_are_seen_as_the_library_shows_them(
    name: str, shared_data: Callable[[str], Path]
) -> None:
    preprocessing = describe(name).preprocessing
    shown = transform(name)
    crop_px = preprocessing.crop_px
    photos = sorted((shared_data("hymenoptera") / "val").rglob("*.jpg"))[::8]
    assert len(photos) > 10
    for path in photos:
        with Image.open(path) as photo:
            theirs = levels(shown(photo.convert("RGB")).numpy(), preprocessing)
            is_wide = photo.width > photo.height
        square, _ = read_square(path.read_bytes(), preprocessing)
        ours = crop_middle(square, crop_px).transpose(2, 0, 1).astype(float)
        assert ours.shape == theirs.shape == (3, crop_px, crop_px)
        # Where the margin is odd, the middle of the middle may lie a pixel aside of the middle.
        is_odd = (preprocessing.short_side_px - crop_px) % 2
        moved = [_difference(ours, theirs, by, is_wide) for by in ((-1, 0, 1) if is_odd else (0,))]
        differ = min(moved, key=np.mean)
        assert differ.max() < 1.01, path
        assert (differ > 0.5).mean() < 0.005, path


def _difference(ours: np.ndarray, theirs: np.ndarray, by: int, is_wide: bool) -> np.ndarray:
    """Return how far two images differ, one of them moved along the longer side of the photo."""
    moved = np.roll(ours, by, axis=2 if is_wide else 1)
    apart: np.ndarray = np.abs(moved - theirs)
    return apart[:, 1:-1, 1:-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "timm/dm_nfnet_f0",
            "squeezed into a square as a whole (crop_mode 'squash'); tlpipe",
        ),
        ("timm/deepseek_vit_412m", "padded to a square (crop_mode 'border'); tlpipe keeps the"),
    ],
)
def test_of_images_that_were_cropped_otherwise_it_is_said(
    name: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    preprocessing, _ = _contract(name)
    assert f"{name} was validated on images that were {message}" in caplog.text
    assert (
        preprocessing.crop_px == timm.get_pretrained_cfg(name.removeprefix("timm/")).input_size[1]
    )


@pytest.mark.parametrize("name", ["timm/convnext_atto", "timm/resnet50"])
def test_the_size_is_that_of_training_as_in_timm_s_own_validation(name: str) -> None:
    known = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert known.test_input_size not in (None, known.input_size)
    expected = timm.data.resolve_data_config({}, pretrained_cfg=known.to_dict())
    assert describe(name).preprocessing.crop_px == expected["input_size"][1]
