"""How much of a backbone keeps its pretrained weights, and where that part ends."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from tlpipe.errors import ParamsError

ALL, NONE, AUTO = "all", "none", "auto"
# Below so many images in the typical class only the head is trained, below so many the last stages.
_FEW, _MANY = 20, 1000
_LAST_STAGES = 2


def frozen_stages(freeze: str | int, stages: Sequence[str], labels: Iterable[str]) -> int:
    """Return how many of the first stages stay as they are.

    ``freeze``: ``all``, ``none``, a number of stages, the name of the last frozen one, or ``auto``:
    by the median number of images per class. ``labels``: one for each image.

    Raises:
        ParamsError: there are not so many stages, or none of that name.
    """
    if freeze == AUTO:
        images = median(Counter(labels).values())
        if images < _FEW:
            return len(stages)
        return max(len(stages) - _LAST_STAGES, 0) if images < _MANY else 0
    named = {NONE: 0, ALL: len(stages), **{name: i for i, name in enumerate(stages, start=1)}}
    count = freeze if isinstance(freeze, int) else named.get(freeze, -1)
    if not 0 <= count <= len(stages):
        raise ParamsError(
            f"embed.freeze is {freeze!r}; expected {ALL}, {NONE}, {AUTO}, a number of stages from "
            f"0 to {len(stages)}, or the last stage to freeze: {', '.join(stages)}. "
            f"Change it in params.yaml."
        )
    return count
