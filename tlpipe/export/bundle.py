"""The bundle: a folder with all that an answer needs, and the hashes of its files, written last.

::

    model.onnx           images (N, S, S, 3) uint8 RGB -> logits, probabilities (N, C) float32
    model.int8.onnx      the same in eight bits, where that is nearly as right
    model.fp16.onnx      the same in half precision, for GPUs, where it was asked for
    model.any-size.onnx  images (N, H, W, 3) of any size -> the same
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
from tlpipe.errors import ArtifactError, ParamsError
from tlpipe.export.external import has_external_data

IMAGES, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
LABELS, PREPROCESSING, PROVENANCE = "labels.json", "preprocessing.json", "provenance.json"
ANY_SIZE = "any-size"
GRAPHS = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "int8": "model.int8.onnx",
    ANY_SIZE: "model.any-size.onnx",
}
_SEAL = "SHA256SUMS"
_REQUIRED = frozenset({GRAPHS["fp32"], LABELS, PREPROCESSING, PROVENANCE})
_ALLOWED = _REQUIRED | frozenset(GRAPHS.values())


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked. ``digest`` names its whole content: 64 hex digits.

    ``graphs``: what it has of ``GRAPHS``; ``hashes``: the sha256 of every file.
    """

    folder: Path
    digest: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    hashes: dict[str, str]

    @property
    def graphs(self) -> dict[str, Path]:
        """The ONNX files, by what they are."""
        return {name: self.folder / file for name, file in GRAPHS.items() if file in self.hashes}

    def graph(self, precision: str) -> Path:
        """Return the ONNX file of a precision.

        Raises:
            ParamsError: the bundle has no such one.
        """
        names = [name for name in self.graphs if name != ANY_SIZE]
        if precision not in names:
            raise ParamsError(
                f"the bundle {self.folder} has no graph of the precision {precision}; it has "
                f"{', '.join(names)}. Name one of these. export leaves out what "
                f"export.precisions does not name, and what does not pass its check: its log and "
                f"parity.json say why."
            )
        return self.graphs[precision]

    @property
    def model(self) -> Path:
        """The exact ONNX file."""
        return self.folder / GRAPHS["fp32"]

    @property
    def model_sha256(self) -> str:
        """The hash of the exact ONNX file."""
        return self.hashes[GRAPHS["fp32"]]


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
    graphs: Mapping[str, bytes],
    labels: tuple[str, ...],
    preprocessing: Preprocessing,
    provenance: Mapping[str, Any],
) -> None:
    """Write a bundle atomically; ``graphs``: ONNX files by their names in ``GRAPHS``."""
    contents = {
        **{GRAPHS[name]: content for name, content in graphs.items()},
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
    """Check every hash of a bundle, and that it needs nothing from outside, then read it.

    Raises:
        ArtifactError: a file is missing, altered or one too many, or wants data of others.
    """
    seal = _seal(folder)
    hashes = _verify(folder, seal)
    for name in sorted(hashes.keys() & GRAPHS.values()):
        _check_alone(folder / name)
    return Bundle(
        folder=folder,
        digest=hashlib.sha256(seal).hexdigest(),
        labels=tuple(json.loads((folder / LABELS).read_bytes())),
        preprocessing=Preprocessing(**files.read_json(folder / PREPROCESSING)),
        provenance=files.read_json(folder / PROVENANCE),
        hashes=hashes,
    )


def digest(folder: Path) -> str:
    """Return the digest that names the whole content of a bundle, if every hash in it is right.

    Raises:
        ArtifactError: it is no bundle.
    """
    return hashlib.sha256(_seal(folder)).hexdigest()


def _seal(folder: Path) -> bytes:
    try:
        return (folder / _SEAL).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{folder} is no bundle: {_SEAL} cannot be read ({error.strerror}). "
            f"Expected a folder that 'tlpipe export' wrote."
        ) from None


def _verify(folder: Path, seal: bytes) -> dict[str, str]:
    # Line by line as sha256sum reads: other characters that end lines elsewhere are damage.
    *lines, end = seal.decode(errors="replace").split("\n")
    hashes = {name: found for found, _, name in (line.partition("  ") for line in lines)}
    present = sorted(path.name for path in folder.iterdir() if path.name != _SEAL)
    is_known = not end and _REQUIRED <= hashes.keys() <= _ALLOWED
    if sorted(hashes) != present or not is_known:
        wanted = sorted(hashes if is_known else _REQUIRED)
        raise ArtifactError(
            f"the bundle {folder} holds {', '.join(present)}; expected {', '.join(wanted)}. "
            f"Fetch or export it again."
        )
    for name, expected in hashes.items():
        if (found := files.sha256(folder / name)) != expected:
            raise ArtifactError(
                f"{folder / name} has the sha256 {found[:16]}...; {_SEAL} says {expected[:16]}.... "
                f"The file was altered or damaged: fetch or export the bundle again."
            )
    return hashes


def _check_alone(graph: Path) -> None:
    """Check that a graph has all of its weights itself, as every exported one does."""
    try:
        is_alone, found = not has_external_data(graph), "wants weights from other files"
    except ValueError as error:
        is_alone, found = False, f"is no ONNX file: {error}"
    if not is_alone:
        raise ArtifactError(
            f"{graph} {found}; expected a graph that holds all of its weights. It was not made by "
            f"tlpipe: do not use it."
        )
