"""The loss and the spread of self-supervised training, against what their definitions say."""

import numpy as np
import pytest
import torch

from tlpipe.training.self_supervised import nt_xent, spread


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_that_of_the_paper(temperature: float) -> None:
    """Chen et al. (2020), equation 1, term by term, over all positive pairs in both orders."""
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 5, 3))
    views = [
        view / np.sqrt((view**2).sum()) for pair in zip(first, second, strict=True) for view in pair
    ]
    losses = []
    for i, view in enumerate(views):
        partner = i ^ 1  # pairs lie side by side here, as in the paper's algorithm 1
        others = sum(np.exp(view @ other / temperature) for k, other in enumerate(views) if k != i)
        losses.append(-np.log(np.exp(view @ views[partner] / temperature) / others))
    found = nt_xent(torch.from_numpy(first), torch.from_numpy(second), temperature)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-12)


def test_views_that_are_alike_cost_less_than_others() -> None:
    random = torch.Generator().manual_seed(0)
    images, others = torch.randn(2, 8, 16, generator=random).unbind()
    assert nt_xent(images, images, 0.5) < nt_xent(images, others, 0.5) < np.log(15) + 0.5


def test_the_spread_is_none_of_a_collapse_and_one_of_a_sphere() -> None:
    random = torch.Generator().manual_seed(0)
    assert float(spread(torch.ones(32, 64))) == pytest.approx(0, abs=1e-6)
    assert float(spread(torch.randn(4096, 64, generator=random))) == pytest.approx(1, abs=0.01)
