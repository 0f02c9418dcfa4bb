"""Run the pretrained network over images: in ONNX Runtime, or in torch where there is a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tlpipe.data.images import Pixels
from tlpipe.features import frozen
from tlpipe.features.backbone import Backbone, load_network
from tlpipe.features.device import has_cuda
from tlpipe.features.weights import Weights
from tlpipe.runtime import open_session

if TYPE_CHECKING:
    from torch import Tensor

Results = list[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Forward:
    """``compute``: from images (B, H, W, 3) uint8 to one array for each stage that was asked for.

    ``batch``: how many images are best given at once; ``provider``: what computes.
    """

    compute: Callable[[Pixels], Results]
    batch: int
    provider: str


def open_forward(
    backbone: Backbone, weights: Weights, stages: list[str], *, threads: int
) -> Forward:
    """Prepare to compute what these stages give."""
    if has_cuda():
        return _on_cuda(backbone, weights, stages)
    graph = frozen.part(frozen.whole_graph(backbone, weights), stages).SerializeToString()
    session = open_session(graph, threads=threads)

    def compute(images: Pixels) -> Results:
        found: Results = session.run(None, {frozen.IMAGES: np.ascontiguousarray(images)})
        return found

    return Forward(compute, batch=8, provider=session.get_providers()[0])


def _on_cuda(backbone: Backbone, weights: Weights, stages: list[str]) -> Forward:
    import torch

    network = frozen.from_pixels(load_network(backbone, weights), backbone.preprocessing)
    network.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compute(images: Pixels) -> Results:
        current = torch.from_numpy(np.ascontiguousarray(images)).to("cuda", non_blocking=True)
        results: dict[str, Tensor] = {}
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            for name, stage in network.named_children():
                current = stage(current)
                if name in stages:
                    results[name] = current
        return [results[name].float().cpu().numpy() for name in stages]

    return Forward(compute, batch=128, provider="torch, CUDA, bfloat16")
