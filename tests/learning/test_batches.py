import numpy as np
import torch

from tlpipe.learning.batches import batches, mixed, soft
from tlpipe.learning.dataset import Examples


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
    chances = np.where(given.labels == 0, 1 / 900, 1 / 100)
    found = batches(given, size=100, seed=0, epoch=0, weights=chances / chances.sum())
    rare = (given.labels[np.concatenate(found)] == 1).mean()
    assert 0.45 < rare < 0.55


def test_mixup_mixes_inputs_and_targets_alike() -> None:
    inputs = torch.arange(8.0).reshape(8, 1).repeat(1, 5)
    targets = soft(torch.arange(8), 8)
    new, labels = mixed("mixup", inputs, targets, 0.5, np.random.default_rng(0))
    assert torch.allclose(labels.sum(1), torch.ones(8))
    assert torch.allclose(new[:, 0], labels @ torch.arange(8.0), atol=1e-5)
    assert not torch.equal(new, inputs)


def test_cutmix_pastes_boxes_and_counts_their_area() -> None:
    inputs = torch.arange(6.0).reshape(6, 1, 1, 1).repeat(1, 2, 20, 30).contiguous()
    for seed in range(20):
        targets = soft(torch.arange(6), 6)
        new, labels = mixed("cutmix", inputs, targets, 1.0, np.random.default_rng(seed))
        assert torch.allclose(labels.sum(1), torch.ones(6))
        assert torch.allclose(new.mean((1, 2, 3)), labels @ torch.arange(6.0), atol=1e-4)
    assert torch.equal(inputs[3], torch.full((2, 20, 30), 3.0))
