import numpy as np
import pytest
from scipy.special import softmax

from tlpipe.export import temperature


def drawn(factor: float, images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a classifier that is too sure by a factor, and labels drawn as it should be."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (images, 5))
    probabilities = softmax(logits, axis=1)
    labels = np.array([random.choice(5, p=row) for row in probabilities])
    return (factor * logits).astype(np.float32), labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_it_finds_by_how_much_logits_are_too_sure(factor: float) -> None:
    assert temperature.fit(*drawn(factor)) == pytest.approx(factor, rel=0.05)


def test_few_images_that_are_all_right_do_not_make_certainty() -> None:
    found = temperature.fit(np.array([[3.0, 0], [0, 3.0]], np.float32), np.array([0, 1]))
    assert 0.2 < found < 1
