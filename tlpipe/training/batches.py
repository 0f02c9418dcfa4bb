"""What goes into a step: rows in a drawn order, as tensors on the device, augmented and mixed."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from tlpipe.backbones import augment
from tlpipe.backbones.augment import Augmentation
from tlpipe.data.images import Preprocessing
from tlpipe.data.pixels import Chunks
from tlpipe.runtime import generator
from tlpipe.training.model import Examples

# Mapped rows count as memory until they are unmapped, and the pages around them too.
_MAPPED_BYTES = 2**24
_SHARE_OF_GPU = 0.5


class Feed(Protocol):
    """Gives what the first open stage takes, (B, ...) float32."""

    def augmented(self, rows: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]) -> Tensor:
        """Return these images as they are seen in training.

        ``uniforms``: (B, ``augment.UNIFORMS``) uniform in [0, 1).
        """

    def plain(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return these images as they are."""


class _Store:
    """Rows of chunks as tensors on a device; all of them lie there where a GPU has the room."""

    def __init__(self, chunks: Chunks, device: torch.device) -> None:
        self._chunks, self._device = chunks, device
        self._row_bytes = int(np.prod(chunks.shape[1:])) * chunks.dtype.itemsize
        self._read = 0
        self._resident: Tensor | None = None
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if len(chunks) * self._row_bytes < _SHARE_OF_GPU * free:
                self._resident = self.load_all()

    def pick(self, rows: npt.NDArray[np.int64]) -> Tensor:
        if self._resident is not None:
            return self._resident[torch.from_numpy(rows).to(self._device)]
        return self._load(rows)

    def load_all(self) -> Tensor:
        """Copy all rows to the device, block by block into their final place."""
        first = self._load(range(1))
        rows = first.new_empty((len(self._chunks), *first.shape[1:]))
        for start in range(0, len(rows), 256):
            end = min(start + 256, len(rows))
            rows[start:end] = self._load(range(start, end))
        return rows

    def _load(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        picked = torch.from_numpy(self._chunks[rows])
        self._read += len(rows) * self._row_bytes
        if self._read > _MAPPED_BYTES:
            self._chunks.unmap()
            self._read = 0
        return picked.to(self._device)


class StoredActivations:
    """What ``embed`` has stored: (N, V, ...) with the plain image first, or (N, D) of it alone."""

    def __init__(self, chunks: Chunks, device: torch.device, *, has_views: bool) -> None:
        """Take the rows; ``has_views``: whether their second axis counts views."""
        self._store = _Store(chunks, device)
        self._has_views = has_views
        self._views = chunks.shape[1] if has_views else 1

    def augmented(self, rows: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]) -> Tensor:
        """Return one of the views of each image, where there are any."""
        if self._views == 1:
            return self.plain(rows)
        views = torch.from_numpy(1 + (uniforms[:, 0] * (self._views - 1)).astype(np.int64))
        picked = self._store.pick(rows)
        return _ready(picked[torch.arange(len(rows)), views])

    def plain(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return these images as they are."""
        picked = self._store.pick(rows)
        return _ready(picked[:, 0] if self._has_views else picked)


class Photos:
    """The stored pixels, (N, S, S, 3) uint8, augmented and normalised on the device."""

    def __init__(
        self,
        chunks: Chunks,
        device: torch.device,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
    ) -> None:
        """Take the rows, what the network sees of them, and how much they may vary."""
        self._store = _Store(chunks, device)
        self._crop_px = preprocessing.crop_px
        self._augmentation = augmentation
        self._mean = torch.tensor(preprocessing.mean, device=device).reshape(3, 1, 1) * 255
        self._std = torch.tensor(preprocessing.std, device=device).reshape(3, 1, 1) * 255

    def augmented(self, rows: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]) -> Tensor:
        """Return these images augmented."""
        squares = self._store.pick(rows)
        parameters = augment.sample(self._augmentation, uniforms)
        images = augment.apply(
            squares, torch.from_numpy(parameters).to(squares.device), self._crop_px
        )
        return _ready(images.sub_(self._mean).div_(self._std))

    def plain(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return the middle of these images."""
        squares = self._store.pick(rows)
        side = self._crop_px
        top = round((squares.shape[1] - side) / 2)
        middle = squares[:, top : top + side, top : top + side].permute(0, 3, 1, 2)
        return _ready((middle.float() - self._mean) / self._std)


def batches(
    examples: Examples, *, size: int, seed: int, epoch: int, weights: npt.NDArray[np.float64] | None
) -> list[npt.NDArray[np.int64]]:
    """Return the places in ``examples`` of each batch of an epoch.

    Batches are as few as ``size`` allows, and even: they differ by one image at most.
    ``weights``: (N,) the chance of each image to be drawn, with replacement; None: each once.
    """
    random = generator(seed, f"order {epoch}")
    count = len(examples)
    order = random.permutation(count) if weights is None else random.choice(count, count, p=weights)
    return np.array_split(order, -(-count // size))


def mixed(
    kind: Literal["none", "mixup", "cutmix"],
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    random: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix each input (B, ...) with another one of the batch, and their targets (B, C) alike.

    CutMix pastes a box of height and width, see ``spatial_axes``; the share of a target is the
    share of the area that is left. timm's ``Mixup`` draws from NumPy's global generator, from which
    a stopped training could not be resumed bit by bit, and knows images (B, C, H, W) only.

    Source: Zhang et al. (2018), mixup, eq. 1-2; Yun et al. (2019), CutMix, section 3.1.
    """
    if kind == "none":
        return inputs, targets
    share = float(random.beta(alpha, alpha))
    other = torch.from_numpy(random.permutation(len(inputs))).to(inputs.device)
    if kind == "mixup":
        inputs = torch.lerp(inputs[other], inputs, share)
    else:
        axes = spatial_axes(inputs.shape[1:])
        assert axes is not None, f"no height and width in {tuple(inputs.shape)}"
        height, width = (inputs.shape[axis] for axis in axes)
        side = np.sqrt(1 - share)
        middle = random.random(2) * (height, width)
        top, bottom = np.clip(middle[0] + np.array([-0.5, 0.5]) * side * height, 0, height).round()
        left, right = np.clip(middle[1] + np.array([-0.5, 0.5]) * side * width, 0, width).round()
        box = torch.zeros(height, width, dtype=torch.bool, device=inputs.device)
        box[int(top) : int(bottom), int(left) : int(right)] = True
        is_pasted = box if axes[1] == -1 else box.unsqueeze(-1)  # channels last
        inputs = torch.where(is_pasted, inputs[other], inputs)
        share = 1 - float((bottom - top) * (right - left)) / (height * width)
    return inputs, torch.lerp(targets[other], targets, share)


def spatial_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return which axes of one image's activations are height and width, counted from the end.

    Images are squares, so those are the two neighbours of equal length: (C, S, S) of convolutional
    networks, (S, S, C) of Swin and others that keep channels last. None where there are none, as
    in the tokens of a vision transformer.
    """
    if len(shape) != 3:
        return None
    if shape[1] == shape[2]:
        return (-2, -1)
    return (-3, -2) if shape[0] == shape[1] else None


def soft(labels: Tensor, classes: int) -> Tensor:
    """Return labels (B,) as targets (B, C) float32."""
    return functional.one_hot(labels, classes).to(torch.float32)


def _ready(inputs: Tensor) -> Tensor:
    """Return inputs in single precision, and in memory with the channels last where they are not.

    What is (B, S, S, C) already stays as it is: torch's format would take S for the channels.
    """
    is_channels_first = spatial_axes(inputs.shape[1:]) == (-2, -1)
    layout = torch.channels_last if is_channels_first else torch.contiguous_format
    return inputs.to(torch.float32, memory_format=layout)
