import math

import numpy as np
import pytest
import torch

from tlpipe.training.recipe import lr_factor, open_stages, opening_epoch


def test_rates_rise_and_then_fall_to_nothing() -> None:
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    assert (np.diff(factors[10:]) < 0).all()
    assert [lr_factor(0, 1, 0.0)] == [1]


def test_the_cosine_is_torch_s() -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=90)
    for step in range(10, 100):
        assert lr_factor(step, 100, 0.1) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        reference.step()


def test_what_opens_late_rises_under_the_cosine() -> None:
    late = [lr_factor(step, 100, 0.1, opened=40) for step in range(40, 100)]
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(40, 100)]
    rise = [0.1 * (i + 1) for i in range(10)] + [1] * 50
    assert late == pytest.approx([a * b for a, b in zip(rise, cosine, strict=True)])


def test_stages_open_from_the_last_one() -> None:
    assert [open_stages(epoch, 3, 2) for epoch in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [open_stages(epoch, 3, 0) for epoch in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("unfreeze_epochs", [0, 1, 3])
def test_a_part_is_open_from_its_opening_epoch_on(unfreeze_epochs: int) -> None:
    for depth in range(1, 5):
        opened = opening_epoch(depth, unfreeze_epochs)
        assert open_stages(opened, 4, unfreeze_epochs) >= depth
        assert opened == 0 or open_stages(opened - 1, 4, unfreeze_epochs) < depth
    assert opening_epoch(0, unfreeze_epochs) == 0
