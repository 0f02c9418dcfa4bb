"""Run the pretrained network over images and augmented views of them: all that makes activations.

In ONNX Runtime, or in torch where there is a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tlpipe.backbones import augment, frozen
from tlpipe.backbones.augment import Augmentation
from tlpipe.backbones.backbone import Backbone, load_network
from tlpipe.backbones.weights import Weights
from tlpipe.data.images import Pixels, crop_middle
from tlpipe.data.pixels import Chunks
from tlpipe.errors import WeightsError
from tlpipe.progress import track
from tlpipe.runtime import generator, open_session

if TYPE_CHECKING:
    from torch import Tensor

# The code and the libraries that determine activations beside their inputs: part of the key of
# what is kept of them. What is only read or written by is left out, since it is checked by content.
CODE = (
    "tlpipe.data.pixels",
    "tlpipe.data.images",
    "tlpipe.backbones.augment",
    "tlpipe.backbones.backbone",
    "tlpipe.backbones.batchnorm",
    "tlpipe.backbones.forward",
    "tlpipe.backbones.frozen",
    "tlpipe.backbones.stages",
    "tlpipe.backbones.weights",
    "tlpipe.runtime",
)
PACKAGES = (*frozen.PACKAGES, "numpy", "onnxruntime", "onnxruntime-gpu")
_UNMAP_IMAGES = 1024
Results = list[npt.NDArray[np.float32]]
Half = npt.NDArray[np.float16]


def has_cuda() -> bool:
    """Return whether torch can use an NVIDIA GPU; it is imported only where one may be."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return False
    import torch

    return torch.cuda.is_available()


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


def compute_rows(
    forward: Forward,
    squares: Chunks,
    keys: Sequence[bytes | None],
    *,
    backbone: Backbone,
    views: int,
    augmentation: Augmentation,
) -> Iterator[tuple[Half, Half]]:
    """Yield the features (D,) and what is stored at the boundary (1 + ``views``, ...) of images.

    ``squares``: (N, S, S, 3) uint8 RGB; ``keys``: which image each of them is, by which its views
    are drawn, or None for one that is not asked for.

    Raises:
        WeightsError: activations are not finite, or beyond float16.
    """
    rows = [row for row, key in enumerate(keys) if key is not None]
    starts = range(0, len(rows), forward.batch)
    for start in track(starts, total=len(starts), description="embed"):
        batch = rows[start : start + forward.batch]
        images = squares[batch]
        plain = crop_middle(images, backbone.preprocessing.crop_px)
        features, *rest = _finite(forward, plain, backbone)
        seen = [(rest or [features])[0]]
        for view in range(views):
            named = [(keys[row] or b"").hex() for row in batch]
            shown = _augmented(images, named, view, augmentation, backbone.preprocessing.crop_px)
            seen.append(_finite(forward, shown, backbone)[-1])
        yield from zip(features, np.stack(seen, axis=1), strict=True)
        if start % _UNMAP_IMAGES < forward.batch:
            squares.unmap()  # what was read would count as memory


def _finite(forward: Forward, images: Pixels, backbone: Backbone) -> list[Half]:
    found = forward.compute(images)
    for array in found:
        if not (np.abs(array) < np.finfo(np.float16).max).all():
            raise WeightsError(
                f"{backbone.name} gives activations that are not finite or beyond float16; "
                f"check embed.weights."
            )
    return [array.astype(np.float16) for array in found]


def _augmented(
    images: Pixels, keys: Sequence[str], view: int, augmentation: Augmentation, crop_px: int
) -> Pixels:
    """Return a view of each image: the same for the same image, whatever stands beside it."""
    import torch

    uniforms = [generator(view, f"view {key}").random(augment.UNIFORMS) for key in keys]
    parameters = augment.sample(augmentation, np.stack(uniforms))
    seen = augment.apply(torch.from_numpy(images), torch.from_numpy(parameters), crop_px)
    pixels: Pixels = seen.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


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

    device = (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )
    return Forward(compute, batch=128, provider=f"torch, {device}, bfloat16")
