"""Pictures of a data set: what their axes say."""

import math
from pathlib import Path

import pytest
from PIL import Image

from tlpipe.data import charts
from tlpipe.data.manifest import Entry


@pytest.mark.parametrize("least", [1, 28, 100, 4000])
@pytest.mark.parametrize("ratio", [1.0, 1.02, 1.5, 7.0, 900.0])
def test_axes_have_numbers_whatever_the_range(least: int, ratio: float, tmp_path: Path) -> None:
    most = round(least * ratio)
    ticks = charts.size_ticks(least, most)
    assert 1 <= len(ticks) <= 6
    assert len(ticks) > 1 or most == least
    assert ticks == sorted(set(ticks)) and ticks[0] > 0
    # Two digits are exact to a twentieth; what is closer together has all of its digits.
    assert math.isclose(ticks[0], least, rel_tol=0.05)
    assert math.isclose(ticks[-1], most, rel_tol=0.05)
    entries = [
        Entry(**dict.fromkeys(Entry._fields, ""))._replace(
            width=side, height=side, format="PNG", mode="L"
        )
        for side in (least, most)
    ]
    charts.sizes(tmp_path / "sizes.png", entries)
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.size[0] > 500
