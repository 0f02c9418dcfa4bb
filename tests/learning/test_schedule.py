import numpy as np
import pytest

from tlpipe.learning.recipe import Recipe
from tlpipe.learning.schedule import open_stages, progress_factor


def test_rates_rise_and_then_fall_to_nothing() -> None:
    factors = [progress_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    assert (np.diff(factors[10:]) < 0).all()
    assert [progress_factor(0, 1, 0.0)] == [1]


def test_stages_open_from_the_last_one() -> None:
    assert [open_stages(epoch, 3, 2) for epoch in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [open_stages(epoch, 3, 0) for epoch in range(3)] == [3, 3, 3]


def test_rates_suit_the_family_and_what_was_set_counts() -> None:
    convolutions, attention = (Recipe().rates(n) for n in ("resnet50", "timm/vit_tiny_patch16"))
    assert attention.stages < convolutions.stages
    assert Recipe(stage_rate=0.5, stage_decay=0.9).rates("resnet50")[1:] == (0.5, 0.9)
    assert Recipe(optimiser="sgd").rates("resnet50").head > convolutions.head
