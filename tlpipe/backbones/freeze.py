"""How much of a backbone keeps its pretrained weights, and where that part ends."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from tlpipe.backbones.backbone import Stage
from tlpipe.errors import ParamsError

ALL, NONE, AUTO = "all", "none", "auto"
# Below so many images in the typical class only the head is trained, below so many the last stages.
_FEW, _MANY = 20, 1000
# Stages differ: layer4 holds 64 % of a ResNet-50, one of twelve blocks 8 % of a ViT.
_LAST_SHARE = 0.25


def frozen_stages(freeze: str | int, stages: Sequence[Stage], labels: Iterable[str]) -> int:
    """Return how many of the first stages stay as they are.

    ``freeze``: ``all``, ``none``, a number of stages, the name of the last frozen one, or ``auto``:
    by the median number of images per class, below 20 all, below 1,000 all but the fewest last
    stages that hold a quarter of the parameters, else none. ``labels``: one for each image.

    Raises:
        ParamsError: there are not so many stages, or none of that name.
    """
    if freeze == AUTO:
        images = median(Counter(labels).values())
        if images < _FEW:
            return len(stages)
        return _before_last_share(stages) if images < _MANY else 0
    names = [stage.name for stage in stages]
    named = {NONE: 0, ALL: len(stages), **{name: i for i, name in enumerate(names, start=1)}}
    count = freeze if isinstance(freeze, int) else named.get(freeze, -1)
    if not 0 <= count <= len(stages):
        raise ParamsError(
            f"embed.freeze is {freeze!r}; expected {ALL}, {NONE}, {AUTO}, a number of stages from "
            f"0 to {len(stages)}, or the last stage to freeze: {', '.join(names)}. "
            f"Change it in params.yaml."
        )
    return count


def _before_last_share(stages: Sequence[Stage]) -> int:
    """Return how many stages stand before the fewest last ones that hold ``_LAST_SHARE``."""
    wanted = _LAST_SHARE * sum(stage.parameters for stage in stages)
    count, held = len(stages), 0
    while held < wanted:
        count -= 1
        held += stages[count].parameters
    return count
