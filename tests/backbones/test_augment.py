import numpy as np
import torch

from tlpipe.backbones import augment
from tlpipe.backbones.augment import UNIFORMS, Augmentation, apply, sample

PLAIN = Augmentation(horizontal_flip=False, min_crop_area=1.0, colour_jitter=0.0)


def uniforms(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, UNIFORMS))


def squares(count: int) -> torch.Tensor:
    """Smooth pictures, each another: what is resampled may differ by little."""
    rows, columns = torch.meshgrid(*2 * [torch.linspace(0, 3, 64)], indexing="ij")
    waves = torch.stack([torch.sin(2 * rows + (1 + c) * columns) for c in range(3)], dim=-1)
    return torch.stack([(waves + 1) * (60 + i % 40) for i in range(count)]).to(torch.uint8)


def done(augmentation: Augmentation, drawn: np.ndarray, crop_px: int = 64) -> torch.Tensor:
    images = squares(len(drawn))
    return apply(images, torch.from_numpy(sample(augmentation, drawn)), crop_px)


def test_nothing_is_changed_where_nothing_may_vary() -> None:
    result = done(PLAIN, uniforms(4))
    assert result.dtype == torch.float32 and result.shape == (4, 3, 64, 64)
    assert (result - squares(4).permute(0, 3, 1, 2)).abs().max() < 0.01


def test_every_other_image_is_mirrored() -> None:
    drawn = uniforms(200)
    result = done(PLAIN.model_copy(update={"horizontal_flip": True}), drawn)
    images = squares(200).permute(0, 3, 1, 2).float()
    as_it_is = (result - images).abs().amax((1, 2, 3)) < 0.01
    mirrored = (result - images.flip(3)).abs().amax((1, 2, 3)) < 0.01
    assert (as_it_is ^ mirrored).all()
    assert 80 < mirrored.sum() < 120


def test_a_crop_shows_the_allowed_share() -> None:
    drawn = sample(PLAIN.model_copy(update={"min_crop_area": 0.5}), uniforms(500))
    width, height = np.abs(drawn[:, 0]), np.abs(drawn[:, 4])
    assert 0.5 <= (width * height).min() + 1e-6 < 0.6
    assert (width * height).max() > 0.9
    assert (np.abs(drawn[:, 2]) + width <= 1 + 1e-6).all()  # nothing from outside of the image
    assert (np.abs(drawn[:, 5]) + height <= 1 + 1e-6).all()


def test_a_quarter_turn_is_one() -> None:
    drawn = uniforms(1)
    drawn[0, 4] = 1.0
    result = done(PLAIN.model_copy(update={"rotation_degrees": 90.0}), drawn)
    images = squares(1).permute(0, 3, 1, 2).float()
    turned = [torch.rot90(images, k, (2, 3)) for k in (1, -1)]
    assert min((result - other).abs().max() for other in turned) < 0.01


def test_light_changes_within_its_share() -> None:
    result = done(PLAIN.model_copy(update={"colour_jitter": 0.2}), uniforms(100))
    images = squares(100).permute(0, 3, 1, 2).float()
    ratio = result.mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert 0.77 < ratio.min() < 0.87 and 1.13 < ratio.max() < 1.23
    assert result.min() >= 0 and result.max() <= 255


def test_the_same_chances_give_the_same_views() -> None:
    one, two = (sample(Augmentation(), uniforms(5)) for _ in range(2))
    assert (one == two).all()
    assert sample(Augmentation(), uniforms(5, seed=1)).shape == (5, augment.UNIFORMS)
    assert (one[:3] == sample(Augmentation(), uniforms(5)[:3])).all()
