"""The bundle: a folder with all that an answer needs, and the hashes of its files, written last.

::

    model.onnx           images (N, S, S, 3) uint8 RGB -> logits, probabilities (N, C) float32
    labels.json          the classes, in the order of the outputs
    preprocessing.json   how a file becomes images
    provenance.json      what the model was made of
    SHA256SUMS           the hash of each file above, in the format of sha256sum

Needs no torch: those who serve read bundles too.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlpipe import files
from tlpipe.data.images import Preprocessing
from tlpipe.errors import ArtifactError

IMAGES, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
MODEL, LABELS, PREPROCESSING, PROVENANCE = (
    "model.onnx",
    "labels.json",
    "preprocessing.json",
    "provenance.json",
)
_SEAL = "SHA256SUMS"
_CONTENT = (MODEL, LABELS, PREPROCESSING, PROVENANCE)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked. ``digest`` names its whole content: 64 hex digits."""

    folder: Path
    digest: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    model_sha256: str

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL


def metadata(
    labels: tuple[str, ...], preprocessing: Preprocessing, provenance: Mapping[str, Any]
) -> dict[str, str]:
    """Return what the ONNX file carries of the bundle, so that it can be used alone."""
    parts = {
        "tlpipe.labels": list(labels),
        "tlpipe.preprocessing": preprocessing.model_dump(),
        "tlpipe.provenance": provenance,
    }
    return {key: json.dumps(part, sort_keys=True) for key, part in parts.items()}


def save(
    folder: Path,
    *,
    model: bytes,
    labels: tuple[str, ...],
    preprocessing: Preprocessing,
    provenance: Mapping[str, Any],
) -> None:
    """Write a bundle whole or not at all."""
    contents = {
        MODEL: model,
        LABELS: files.json_bytes(list(labels)),
        PREPROCESSING: files.json_bytes(preprocessing.model_dump()),
        PROVENANCE: files.json_bytes(provenance),
    }
    with files.replacing_folder(folder) as target:
        for name, content in contents.items():
            (target / name).write_bytes(content)
        sums = [f"{hashlib.sha256(content).hexdigest()}  {n}\n" for n, content in contents.items()]
        (target / _SEAL).write_text("".join(sums))


def load(folder: Path) -> Bundle:
    """Check every hash of a bundle, and that there is nothing else in it, then read it.

    Raises:
        ArtifactError: a file is missing, altered or one too many.
    """
    hashes = _verify(folder)
    return Bundle(
        folder=folder,
        digest=files.sha256(folder / _SEAL),
        labels=tuple(json.loads((folder / LABELS).read_bytes())),
        preprocessing=Preprocessing(**files.read_json(folder / PREPROCESSING)),
        provenance=files.read_json(folder / PROVENANCE),
        model_sha256=hashes[MODEL],
    )


def _verify(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / _SEAL).read_text().splitlines()
    except OSError as error:
        raise ArtifactError(
            f"{folder} is no bundle: {_SEAL} cannot be read ({error.strerror}). "
            f"Expected a folder that 'tlpipe export' wrote."
        ) from None
    hashes = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = sorted(path.name for path in folder.iterdir() if path.name != _SEAL)
    if sorted(hashes) != sorted(_CONTENT) or present != sorted(_CONTENT):
        raise ArtifactError(
            f"the bundle {folder} holds {', '.join(present)}; expected "
            f"{', '.join(sorted(_CONTENT))}. Fetch or export it again."
        )
    for name, expected in hashes.items():
        if (found := files.sha256(folder / name)) != expected:
            raise ArtifactError(
                f"{folder / name} has the sha256 {found[:16]}...; {_SEAL} says {expected[:16]}.... "
                f"The file was altered or damaged: fetch or export the bundle again."
            )
    return hashes
