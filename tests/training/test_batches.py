from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.training.test_trainer import build_network
from tlpipe.backbones.stages import cut
from tlpipe.data import pixels
from tlpipe.training.batches import (
    StoredActivations,
    _Store,
    batches,
    mixed,
    soft,
    spatial_axes,
)
from tlpipe.training.model import Examples


def examples(counts: tuple[int, ...]) -> Examples:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Examples(np.arange(len(labels)) + 100, labels)


def test_an_epoch_has_every_image_once_in_batches_of_about_one_size() -> None:
    found = batches(examples((70, 27)), size=32, seed=0, epoch=3, weights=None)
    assert sorted(len(batch) for batch in found) == [24, 24, 24, 25]
    assert sorted(np.concatenate(found)) == list(range(97))
    again = batches(examples((70, 27)), size=32, seed=0, epoch=3, weights=None)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    others = [
        batches(examples((70, 27)), size=32, seed=s, epoch=e, weights=None)
        for s, e in ((1, 3), (0, 4))
    ]
    for other in others:
        assert not (np.concatenate(found) == np.concatenate(other)).all()


def test_drawing_by_chance_evens_out_classes() -> None:
    given = examples((900, 100))
    probabilities = np.where(given.labels == 0, 1 / 900, 1 / 100)
    found = batches(given, size=100, seed=0, epoch=0, weights=probabilities / probabilities.sum())
    rare = (given.labels[np.concatenate(found)] == 1).mean()
    assert 0.45 < rare < 0.55


@pytest.mark.parametrize(
    ("images", "size", "lengths"),
    [(33, 32, [17, 16]), (97, 32, [25, 24, 24, 24]), (64, 32, [32, 32]), (5, 32, [5])],
)
def test_no_batch_exceeds_the_size(images: int, size: int, lengths: list[int]) -> None:
    found = batches(examples((images,)), size=size, seed=0, epoch=0, weights=None)
    assert [len(batch) for batch in found] == lengths


def test_mixup_mixes_inputs_and_targets_alike() -> None:
    inputs = torch.arange(8.0).reshape(8, 1).repeat(1, 5)
    shares = []
    for seed in range(300):
        targets = soft(torch.arange(8), 8)
        new, labels = mixed("mixup", inputs, targets, 0.4, np.random.default_rng(seed))
        assert torch.allclose(labels.sum(1), torch.ones(8))
        assert torch.allclose(new[:, 0], labels @ torch.arange(8.0), atol=1e-5)
        own = labels.diagonal()
        shares.append(float(own[own < 1][0]))
    # One share for the whole batch, drawn from Beta(alpha, alpha).
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def pasted(inputs: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return mixed("cutmix", inputs, soft(torch.arange(6), 6), 1.0, np.random.default_rng(seed))


@pytest.mark.fault("T19")
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_cutmix_pastes_boxes_of_height_and_width_and_counts_their_area(
    is_channels_last: bool,
) -> None:
    side, channels = 20, 7
    inputs = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, channels, side, side)
    if is_channels_last:
        inputs = inputs.permute(0, 2, 3, 1)
    inputs = inputs.contiguous()
    before, sides = inputs.clone(), []
    for seed in range(40):
        new, labels = pasted(inputs, seed)
        if is_channels_last:
            new = new.permute(0, 3, 1, 2)
        assert torch.allclose(labels.sum(1), torch.ones(6))
        assert torch.allclose(new.mean((1, 2, 3)), labels @ torch.arange(6.0), atol=1e-4)
        for number, image in enumerate(new):
            assert (image == image[:1]).all()  # every channel alike
            rows, columns = torch.where(image[0] != number)
            if len(rows):
                box = (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1)
                assert len(rows) == box[0] * box[1]  # all of a rectangle
                assert labels[number, number] == pytest.approx(1 - len(rows) / side**2)
                sides.append(box)
    heights, widths = np.array(sides).T
    assert (heights != widths).any()  # cut off by the image's edge
    assert heights.max() > side // 2 and widths.max() > side // 2
    assert torch.equal(inputs, before)


@pytest.mark.fault("T19")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("swin_t", (-3, -2)), ("resnet18", (-2, -1)), ("timm/vit_tiny_patch16_224", None)],
)
def test_where_height_and_width_stand_is_seen_at_every_boundary(
    name: str, expected: tuple[int, int] | None
) -> None:
    seen = []
    with torch.inference_mode():
        current = torch.zeros(1, 3, 224, 224)
        for stage in cut(build_network(name), 224):
            current = stage(current)
            seen.append(spatial_axes(current.shape[1:]))
    *inner, last = seen
    assert inner and set(inner) == {expected} and last is None


def stored(folder: Path, rows: np.ndarray) -> pixels.Chunks:
    writer = pixels.ChunkWriter(folder, rows.shape[1:], "<f2")
    for number, row in enumerate(rows):
        writer.append(number.to_bytes(8), row)
    writer.close()
    return pixels.Chunks(folder, tuple(writer.names), rows.shape[1:], "<f2")


@pytest.mark.fault("T19")
def test_activations_keep_their_order_and_lie_in_memory_with_channels_last(tmp_path: Path) -> None:
    cpu, rows = torch.device("cpu"), np.arange(3)
    for name, shape in {"chw": (5, 4, 4), "hwc": (4, 4, 5), "tokens": (9, 5)}.items():
        (tmp_path / name).mkdir()
        values = np.random.default_rng(0).random((3, 2, *shape)).astype("<f2")
        feed = StoredActivations(stored(tmp_path / name, values), cpu, has_views=True)
        found = feed.plain(rows)
        assert np.array_equal(found.numpy(), values[:, 0])
        assert found.dtype == torch.float32
        assert np.array_equal(feed.augmented(rows, np.zeros((3, 9))).numpy(), values[:, 1])
        is_last = found.permute(0, 2, 3, 1).is_contiguous() if name == "chw" else True
        assert is_last and (name == "chw" or found.is_contiguous())


def test_all_rows_are_copied_into_one_tensor(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((600, 3)).astype("<f2")  # three blocks, one not full
    store = _Store(stored(tmp_path, values), torch.device("cpu"))
    found = store.load_all()
    assert found.dtype == torch.float16 and np.array_equal(found.numpy(), values)
    picked = np.array([599, 0, 256])
    assert np.array_equal(store.pick(picked).numpy(), values[picked])
    store._resident = found
    assert np.array_equal(store.pick(picked).numpy(), values[picked])
