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

Needs no torch and no ``onnx``: those who serve read bundles too. A graph may name any path for its
weights, also outside its folder, and ONNX Runtime would open it; so this is asked before, of the
structure alone, field by field, as Protocol Buffers lay it out (onnx.proto of ONNX, and "Encoding"
of Protocol Buffers).

A bundle is signed with OpenSSF's model-signing, by a key pair, offline. The signature is a file
beside it, so that its own files stay as they were exported.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlpipe import files
from tlpipe.data.images import Preprocessing
from tlpipe.errors import ArtifactError, ParamsError

_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
# Which fields of a message hold further messages that may hold tensors.
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def has_external_data(path: Path) -> bool:
    """Return whether a tensor of an ONNX file lies in another file.

    Raises:
        ValueError: it is no ONNX file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        waiting = [("model", 0, len(content))]
        while waiting:  # not by recursion: graphs hold graphs, as deep as their author likes
            kind, start, end = waiting.pop()
            for number, value, stop in _fields(content, start, end):
                if kind == "tensor":
                    # data_location is 0 for data that stand in the tensor itself.
                    if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                        return True
                elif stop and (inside := _INSIDE[kind].get(number)):
                    waiting.append((inside, value, stop))
    return False


def _fields(content: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, value and 0 of each field; of those with bytes, begin and end of these."""
    while place < end:
        tag, place = _varint(content, place, end)
        number, kind = tag >> 3, tag & 7
        if tag >> 32:  # others would read it as the tag of its lower bits
            raise ValueError("a field's number has more than 32 bits")
        value, stop = place, 0
        if kind == _VARINT:
            value, place = _varint(content, place, end)
        elif kind == _BYTES:
            size, value = _varint(content, place, end)
            place = stop = value + size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if place > end:
            raise ValueError("it ends in the middle of a field")
        yield number, value, stop


def _varint(content: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 64:
        byte = content[place]
        place, value = place + 1, value | (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("it ends in the middle of a number")


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
                f"the bundle {self.digest[:16]} has no graph of the precision {precision}; it has "
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


def members(provenance: Mapping[str, Any]) -> list[str]:
    """Return the versions that an ensemble was made of, with their weights; none of others.

    ``provenance``: of a bundle. Where weights were averaged (a soup), the names alone.
    """
    mixed = [f"{one['model']} ({one['weight']:.3f})" for one in provenance.get("ensemble", ())]
    return mixed or list(provenance.get("soup", ()))


def describe(provenance: Mapping[str, Any]) -> str:
    """Return what a bundle is built on: its backbone and what was frozen, or its members."""
    origin, named = provenance["origin"], " and ".join(members(provenance))
    if "ensemble" in provenance:
        return f"ensemble of {named}"
    soup = f", weights averaged of {named}" if named else ""
    return f"{origin['backbone']}, frozen: {origin['freeze']}{soup}"


SIGNATURE = "bundle.sig"  # beside the bundle of a registered version


def signature_beside(bundle: Path) -> Path:
    """Return where the signature of a bundle lies by default."""
    return bundle.with_name(f"{bundle.name}.sig")


def sign(bundle: Path, key: Path, signature: Path) -> None:
    """Sign every file of a bundle with a private key (PEM, elliptic curve).

    Raises:
        ParamsError: the key cannot be used, or the package is missing.
    """
    _need_package()
    from model_signing import signing

    if not key.is_file():
        raise ParamsError(f"the private key {key} does not exist; expected a PEM file.")
    temporary = signature.with_name(f".{signature.name}.tmp")
    try:
        config = signing.Config()  # type: ignore[no-untyped-call]
        config.use_elliptic_key_signer(private_key=key).sign(bundle, temporary)
        temporary.replace(signature)
    except (ValueError, TypeError) as error:
        raise ParamsError(
            f"{key} is no private key to sign with: {_one_line(error)}. Expected an elliptic "
            f"curve's, as PEM: openssl ecparam -name prime256v1 -genkey -noout"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_signature(bundle: Path, key: Path, signature: Path) -> None:
    """Check that a bundle is what the owner of a key has signed: no file more, less or other.

    Raises:
        ArtifactError: it is not, or there is no signature.
        ParamsError: the key cannot be used, or the package is missing.
    """
    _need_package()
    from model_signing import verifying

    if not key.is_file():
        raise ParamsError(f"the public key {key} does not exist; expected a PEM file.")
    if not signature.is_file():
        raise ArtifactError(
            f"{bundle} is not signed: {signature} does not exist. Sign it with 'tlpipe sign', or "
            f"fetch it from where signed ones are."
        )
    try:
        config = verifying.Config()  # type: ignore[no-untyped-call]
        verifier = config.use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError) as error:
        raise ParamsError(f"{key} is no public key: {_one_line(error)}. Expected PEM.") from None
    try:
        verifier.verify(bundle, signature)
    except Exception as error:  # the package raises what its parts raise
        raise ArtifactError(
            f"the signature {signature} is not of {bundle} by the owner of {key}: "
            f"{_one_line(error)}. Do not use it."
        ) from None


def _need_package() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError:
        raise ParamsError(
            "signatures need the package model-signing, which is not installed: "
            "pip install 'tlpipe[signing]'"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
