"""How images are stored for a backbone: as it was trained to see them.

What is auto in ``ingest`` is decided here, so the lock states it there. It stands apart from
``backbone``, whose code keys the frozen graphs: no line of this one makes them anew.
"""

from typing import TYPE_CHECKING

from tlpipe.backbones.backbone import describe
from tlpipe.data.images import Sampling
from tlpipe.errors import ParamsError

if TYPE_CHECKING:
    from tlpipe.data.ingest import Params

_RESIZING = ("short_side_px", "interpolation")  # the rest of a sampling is the images' own


def resolve(params: "Params", backbone: str) -> "Params":
    """Return the parameters of ``ingest`` with what the backbone was trained with for auto.

    Raises:
        ParamsError: another side or another interpolation is stated, or there is no such backbone.
    """
    trained_with = describe(backbone).preprocessing
    stated = {key: getattr(params, key) for key in _RESIZING}
    auto = {key: getattr(trained_with, key) for key in stated if stated[key] == "auto"}
    check(Sampling(**stated | auto), backbone)
    return params.model_copy(update=auto)


def check(found: Sampling, backbone: str) -> None:
    """Check that images are stored as the backbone was trained to see them.

    Raises:
        ParamsError: another side or another interpolation, or no such backbone.
    """
    expected = describe(backbone).preprocessing
    for key in _RESIZING:
        if (value := getattr(found, key)) != (wanted := getattr(expected, key)):
            raise ParamsError(
                f"ingest.{key} is {value}; the backbone {backbone} was trained with "
                f"{wanted}. Set ingest.{key}: auto in params.yaml, or take it out."
            )
