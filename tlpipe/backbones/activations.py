"""The activations of every image at the freeze boundary: a folder of chunks and an index.

``frozen_stages`` says how much of a backbone keeps its pretrained weights, and so where that
boundary is. The index is written last::

    features/    (N, D) float16: what the whole pretrained network gives
    boundary/    (N, 1 + K, ...) float16: what the last frozen stage gives, for the image as it is
                 and for K augmented views; only where that is not the same as features
    keys.npy     (N,) uint64: which image a row is of
    seen.npy     (N,) bool: whether the weights were pretrained on that file; only where they say so
    index.json   the shapes, the origin, and the digest of every file
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tlpipe import files
from tlpipe.backbones.augment import Augmentation
from tlpipe.backbones.backbone import Stage
from tlpipe.data import pixels
from tlpipe.data.images import Preprocessing
from tlpipe.errors import ArtifactError, ParamsError

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


class Advice(BaseModel):
    """What ``tlpipe advise`` recommends for ``embed.freeze``, and what it was measured on.

    ``data_sha256`` is of the manifest, ``weights_sha256`` empty where weights are random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    freeze: str
    backbone: str
    weights_sha256: str
    data_sha256: str


def check_advice_may_lie(path: Path) -> None:
    """Check that advice would overwrite nothing but advice.

    Raises:
        ArtifactError: the file is something else.
    """
    if path.exists() and _read_advice(path) is None:
        raise ArtifactError(
            f"{path} is not what 'tlpipe advise' writes, and would be overwritten. Nothing was "
            f"written; move it away, or name another file in embed.advice."
        )


def _read_advice(path: Path) -> Advice | None:
    """Return what a file recommends, None where it is not what ``save_advice`` writes."""
    try:
        return Advice(**files.read_json(path))
    except (ArtifactError, ValidationError):
        return None


def save_advice(path: Path, advice: Advice) -> None:
    """Write the file that ``embed.advice`` names."""
    files.write_json(path, advice.model_dump())


def load_advice(path: Path, backbone: str, weights_sha256: str, data_sha256: str) -> Advice:
    """Read the file that ``embed.advice`` names, for this network and these images.

    Raises:
        ArtifactError: it is missing or damaged, or was measured on something else.
    """
    anew = "Take embed.advice out of params.yaml, and run 'tlpipe run', then 'tlpipe advise' again."
    if (advice := _read_advice(path)) is None:
        raise ArtifactError(
            f"{path}, which embed.advice names, is missing or damaged; expected what 'tlpipe "
            f"advise' writes. {anew}"
        )
    found = {"backbone": backbone, "weights_sha256": weights_sha256, "data_sha256": data_sha256}
    if differ := [name for name, value in found.items() if getattr(advice, name) != value]:
        raise ArtifactError(
            f"{path} was measured with another {' and another '.join(differ)} than embed has now; "
            f"expected the same. {anew}"
        )
    return advice


_OF_DATA = {"freeze", "weights", "data_sha256", "data_version", "pretrained_on"}
_INDEX, _KEYS, _SEEN = "index.json", "keys.npy", "seen.npy"
_FEATURES, _BOUNDARY = "features", "boundary"


class Origin(BaseModel):
    """What the activations were computed from; every later artifact carries it on.

    ``boundary`` is the last frozen stage, or empty; ``graph`` names all that the frozen part
    depends on. ``decoder`` names what turned files into pixels, ``code`` is the digest of the code
    that computed, ``packages`` are the versions of the libraries that did; models from before these
    were recorded have none. ``provider`` is the device. ``data_sha256`` is of the manifest,
    ``data_version`` DVC's hash of all that ``ingest`` reads; ``threads`` is the number that tlpipe,
    here and in every later stage, computes with, since another number may round differently.
    ``pretrained_on`` says what weights of one's own were trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str
    weights: str
    weights_sha256: str
    graph: str
    freeze: str | int
    boundary: str
    views: int
    augmentation: Augmentation
    preprocessing: Preprocessing
    data_sha256: str
    data_version: str
    provider: str
    threads: int
    decoder: str = ""
    code: str = ""
    packages: dict[str, str] = {}
    pretrained_on: str = Field(default="", exclude_if=lambda text: not text)

    @property
    def computation(self) -> dict[str, object]:
        """Everything that determines an image's row beside the bytes of the image."""
        return self.model_dump(exclude=_OF_DATA)


@dataclass(frozen=True)
class Activations:
    """``boundary``: None where nothing is frozen, or where features are all that there is.

    ``seen``: (N,) on which images the weights were pretrained, None where they do not say.
    """

    features: pixels.Chunks
    boundary: pixels.Chunks | None
    keys: npt.NDArray[np.uint64]
    origin: Origin
    seen: npt.NDArray[np.bool_] | None = None

    def intact(self) -> npt.NDArray[np.bool_]:
        """Return (N,) which rows are as they were written; reads every byte."""
        found = self.features.intact()
        return found if self.boundary is None else found & self.boundary.intact()


class Writer:
    """Appends images to a folder; memory does not grow with their number."""

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        *,
        width: int,
        boundary: tuple[int, ...] | None,
        known: Activations | None,
    ) -> None:
        """Write rows of ``width`` features, and of the shape ``boundary`` where that is given.

        ``known``: activations whose intact rows may be taken over.
        """
        self._folder, self._origin = folder, origin
        self._keys: list[bytes] = []
        self._parts: dict[str, tuple[pixels.ChunkWriter, tuple[int, ...]]] = {}
        rows = {_FEATURES: (width,), _BOUNDARY: boundary}
        for name, row in rows.items():
            if row is not None:
                (folder / name).mkdir()
                old = getattr(known, name) if known else None
                self._parts[name] = (pixels.ChunkWriter(folder / name, row, "<f2", old), row)

    def append(
        self,
        key: bytes,
        features: npt.NDArray[np.float16] | int,
        boundary: npt.NDArray[np.float16] | int,
    ) -> None:
        """Write one image: its rows, or the number that it has among the known ones."""
        self._keys.append(key)
        self._parts[_FEATURES][0].append(key, features)
        if _BOUNDARY in self._parts:
            self._parts[_BOUNDARY][0].append(key, boundary)

    def finish(self, seen: npt.NDArray[np.bool_] | None = None) -> None:
        """Complete the files and write the index, which says that the folder is complete."""
        index: dict[str, object] = {"origin": self._origin.model_dump(), _KEYS: self._save_keys()}
        if seen is not None:
            np.save(self._folder / _SEEN, seen)
            index[_SEEN] = files.sha256(self._folder / _SEEN)
        for name, (writer, row) in self._parts.items():
            writer.close()
            index[name] = {"chunks": writer.names, "row": row}
        files.write_json(self._folder / _INDEX, index)

    def _save_keys(self) -> str:
        """Write which image each row is of; return the file's digest."""
        path = self._folder / _KEYS
        np.save(path, np.frombuffer(b"".join(self._keys), ">u8").astype("<u8"))
        return files.sha256(path)


def load(folder: Path) -> Activations:
    """Map activations into memory.

    Raises:
        ArtifactError: the folder is missing or incomplete.
    """
    files.finish_folder(folder)
    index = files.read_json(folder / _INDEX)

    def part(name: str) -> pixels.Chunks | None:
        if name not in index:
            return None
        names = tuple((str(chunk), int(count)) for chunk, count in index[name]["chunks"])
        return pixels.Chunks(folder / name, names, tuple(index[name]["row"]), "<f2")

    features = part(_FEATURES)
    assert features is not None
    keys: npt.NDArray[np.uint64] = pixels.load_mapped(folder / _KEYS)
    seen = np.load(folder / _SEEN) if _SEEN in index else None
    return Activations(features, part(_BOUNDARY), keys, Origin(**index["origin"]), seen)


def load_kept(folder: Path, origin: Origin) -> tuple[Activations, npt.NDArray[np.bool_]] | None:
    """Return what ``keep`` left, if computed in the same way, and (N,) which rows are intact.

    Nothing else watches over this folder: what is taken from it is checked byte by byte.
    """
    try:
        kept = load(folder)
        keys_sha256 = files.read_json(folder / _INDEX)[_KEYS]
    except (ArtifactError, ValueError, KeyError):
        return None
    if kept.origin.computation != origin.computation:
        return None
    if files.sha256(folder / _KEYS) != keys_sha256:
        return None
    return kept, kept.intact()


def digest(folder: Path) -> str:
    """Return a hash of the whole content: the index names every file by a digest of its bytes."""
    return files.sha256(folder / _INDEX)


def keep(folder: Path, target: Path) -> None:
    """Keep a folder's files a second time, without copying where links can be made."""
    files.flush_folder(folder)
    with files.replacing_folder(target) as copy:
        files.copy_folder(folder, copy, files.link_or_copy)
