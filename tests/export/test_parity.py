"""Which differences between two arrays of logits are an error."""

import numpy as np
import pytest

from tlpipe.errors import ParityError
from tlpipe.export import graph


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)


@pytest.mark.fault("E05")
def test_a_graph_that_differs_is_an_error(logits: np.ndarray) -> None:
    graph.check_parity(graph.measure_parity(logits, logits), 1e-4)
    near = logits.copy()
    near[3, 2] += 1e-3
    with pytest.raises(ParityError, match=r"by up to 0.001, the top label on 0 of 20 images"):
        graph.check_parity(graph.measure_parity(logits, near), 1e-4)
    nan = logits.copy()
    nan[0, 0] = np.nan
    with pytest.raises(ParityError, match="by up to nan"):
        graph.check_parity(graph.measure_parity(logits, nan), 1e-4)
    other = logits.copy()
    other[3] = np.roll(other[3], 1)
    with pytest.raises(ParityError, match=r"the any-size graph .*the top label on 1 of 20"):
        graph.check_parity(graph.measure_parity(logits, other), 10, "the any-size graph")


@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_large_logits_may_differ_by_more_and_small_ones_by_no_less(
    logits: np.ndarray, scale: float
) -> None:
    """fp32 errs by a share of what it computes; below a spread of 1 the tolerance is absolute."""
    trained = (scale * logits / logits.std()).astype(np.float32)
    allowed = 1e-4 * max(scale, 1)
    for share, is_allowed in ((0.9, True), (1.2, False)):
        exported = trained.copy()
        least = exported[7].argmin()  # no top label changes
        exported[7, least] -= np.float32(share * allowed)
        measured = graph.measure_parity(trained, exported)
        assert measured.logit_spread == pytest.approx(scale, rel=1e-3)
        if is_allowed:
            graph.check_parity(measured, 1e-4)
        else:
            with pytest.raises(ParityError, match=f"expected at most {allowed:.2g} and 0"):
                graph.check_parity(measured, 1e-4)


def test_a_tie_has_no_top_label_to_keep(logits: np.ndarray) -> None:
    """Two classes that are equally good: which one comes first is the last bit's choice."""
    trained = logits.copy()
    trained[5, :2] = trained[5].max() + 1
    trained[5, 1] -= np.float32(2e-5)
    exported = trained.copy()
    exported[5, 0] -= np.float32(5e-5)
    exported[5, 1] += np.float32(5e-5)
    assert exported[5].argmax() != trained[5].argmax()
    measured = graph.measure_parity(trained, exported)
    assert measured.same_top1 == 20
    graph.check_parity(measured, 1e-4)
    trained[5, 0] += np.float32(0.01)  # now the first is better, by more than rounding
    assert graph.measure_parity(trained, exported).same_top1 == 19
