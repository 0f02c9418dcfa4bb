"""What is said where memory is short, by the errors that torch itself raises."""

import pytest
import torch

from tlpipe.errors import TrainingError
from tlpipe.training.recipe import Recipe
from tlpipe.training.signals import out_of_memory_explained


@pytest.mark.fault("T08")
@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        (Recipe(), r"Lower train\.batch_size, now 32, or freeze more in embed\.freeze\."),
        (
            Recipe(batch_size=7),
            r"Lower train\.batch_size, now 7, or freeze more in embed\.freeze\.",
        ),
        (Recipe(batch_size=1), r"kept\. Freeze more in embed\.freeze\."),
    ],
)
def test_short_memory_is_explained(recipe: Recipe, advice: str) -> None:
    said = r"^there is not enough memory to train \(.*can't allocate memory.*\); the last check.*"
    with pytest.raises(TrainingError, match=said + advice), out_of_memory_explained(recipe):
        torch.empty(2**50, dtype=torch.uint8)  # a pebibyte
    with pytest.raises(TrainingError, match=advice), out_of_memory_explained(recipe):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(TrainingError, match=advice), out_of_memory_explained(recipe):
        bytearray(2**60)


def test_other_errors_pass() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        out_of_memory_explained(Recipe()),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)
