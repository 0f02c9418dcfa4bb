"""Pretrained weights: found or fetched, their hash checked before anything parses them.

A file of weights is read as tensors and nothing else: safetensors, or a pickle of which only the
tensors are taken.
"""

import base64
import importlib.util
import json
import logging
import os
import re
import urllib.error
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from tlpipe import files
from tlpipe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
IMAGENET, NONE, REGISTERED = "imagenet", "none", "models:/"
# In the header of a .safetensors file that tlpipe has made. One key: of several, safetensors writes
# another order each time.
_HEADER, _PRETRAINED_ON, _IMAGES = "tlpipe", "pretrained_on", "images"
_IMAGES_SUFFIX = ".images"


class Pretrained(BaseModel):
    """Where the weights that a network is known for come from: a pip package, an address, a hub.

    ``package`` and ``file``: the file inside of an installed package; ``url``: what torchvision
    fetches; ``repository`` and ``file``: a file on the Hugging Face hub. ``sha256``: what the bytes
    must hash to, or how that begins; empty where nobody says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    package: str = ""
    url: str = ""
    repository: str = ""
    file: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Weights:
    """A file of weights with the hash that it has; no file where they are drawn at random."""

    path: Path | None
    sha256: str


def find(name: str, pretrained: Pretrained | None, source: str, sha256: str | None) -> Weights:
    """Return the weights of the network ``name``, fetched where they were asked for by name.

    ``source`` is ``imagenet``, ``none``, or the path of a file, or ``models:/NAME@ALIAS`` in the
    registry, which must have been fetched; of the last two the ``sha256`` must be given. Where
    nobody states the hash of pretrained weights, the one found is logged and returned.

    Raises:
        WeightsError: they are missing, cannot be fetched, or are not the pinned ones.
    """
    if source == NONE:
        return Weights(None, "")
    if source == IMAGENET:
        path = fetch(name, pretrained)
        expected = sha256 or (pretrained.sha256 if pretrained else "") or _stated_by_hub(path)
    elif sha256 is not None and source.startswith(REGISTERED):
        path, expected = registered_file(sha256), sha256
    else:
        path, expected = Path(source), sha256 or ""
    try:
        found = files.sha256(path)
    except OSError as error:
        if source.startswith(REGISTERED):
            raise WeightsError(
                f"the weights of {source}, sha256 {sha256}, are not in this machine's cache any "
                f"more. 'tlpipe embed' fetches them again, and changes nothing else."
            ) from None
        raise WeightsError(
            f"embed.weights is {source}, which cannot be read: {error.strerror}; expected "
            f"{IMAGENET}, {NONE} or a file. Change embed.weights."
        ) from None
    if sha256 is None and source != IMAGENET:
        raise WeightsError(
            f"embed.weights is the file {source}, and embed.weights_sha256 is not set; a file of "
            f"weights is read only with its hash pinned. It is {found}: set embed.weights_sha256 "
            f"to that, if it is what whoever published the file states."
        )
    if not found.startswith(expected):
        raise WeightsError(
            f"the weights {path} have the sha256 {found}; expected {expected}. "
            f"The file is another one or was altered: install or fetch it again."
        )
    if pretrained is not None and pretrained.repository and sha256 is None:
        commit = path.parent.name
        _log.info("weights: %s at commit %s, sha256 %s", pretrained.repository, commit, found)
    if not expected:
        _log.warning(
            "nobody states the sha256 of the weights %s, so they were not checked. It is %s: set "
            "embed.weights_sha256 to it to have it checked from now on",
            path,
            found,
        )
    return Weights(path, found)


def at_hand(pretrained: Pretrained | None) -> Path | None:
    """Return the file of the pretrained weights, if it lies on this machine."""
    if pretrained is None:
        return None
    if pretrained.package:
        spec = importlib.util.find_spec(pretrained.package)
        path = Path(spec.origin).parent / pretrained.file if spec and spec.origin else None
    elif pretrained.url:
        path = _fetched_by_torch(pretrained.url)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(pretrained.repository, pretrained.file)
        path = Path(cached) if isinstance(cached, str) else None
    return path if path is not None and path.is_file() else None


def address(pretrained: Pretrained | None) -> str:
    """Return from where the weights can be fetched; nothing where they cannot."""
    return (pretrained.url or pretrained.repository) if pretrained else ""


def fetch(name: str, pretrained: Pretrained | None) -> Path:
    """Return the file of the pretrained weights, downloaded once where it is not there yet.

    Raises:
        WeightsError: nobody offers any, the package is not installed, or the download fails.
    """
    if (path := at_hand(pretrained)) is not None:
        return path
    if pretrained is None:
        raise WeightsError(
            f"nobody offers pretrained weights of {name}; expected a file in embed.weights, or "
            f"'none' to begin from random ones. Change embed.weights in params.yaml."
        )
    if pretrained.package:
        raise WeightsError(
            f"the ImageNet weights of {name} are not installed; expected the package "
            f"{pretrained.package.replace('_', '-')}. Install it with pip."
        )
    try:
        if pretrained.url:
            import torch

            path = _fetched_by_torch(pretrained.url)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(pretrained.url, str(path), pretrained.sha256 or None)
            return path
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(pretrained.repository, pretrained.file))
    except (OSError, RuntimeError, ValueError, urllib.error.URLError) as error:
        line = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"the weights of {name} are not here and could not be fetched from "
            f"{address(pretrained)}: {line}. Connect to the network once, or "
            f"name a file in embed.weights."
        ) from None


def read_tensors(path: Path) -> Mapping[str, "Tensor"]:
    """Read a file of tensors by their names; nothing else in it is run.

    Raises:
        WeightsError: it holds something else.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"the weights {path} are no safetensors file: {error}.") from None
        return tensors
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol; what matters is an error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        line = " ".join(str(error).split())[:120]
        raise WeightsError(
            f"the weights {path} hold more than tensors, or are damaged ({line}); nothing in them "
            f"was run. Expected a state_dict; save the tensors alone, best as .safetensors."
        ) from None
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise WeightsError(f"the weights {path} are no state_dict; save the tensors alone.")
    return content


def pretrained_on(path: Path | None) -> str:
    """Return what a file of weights says it was trained on; nothing where it does not."""
    return "" if path is None else _stated(path).get(_PRETRAINED_ON, "")


def images_of(path: Path | None) -> npt.NDArray[np.uint64] | None:
    """Return which files of images weights were trained on, as ``image_key`` names them, sorted.

    None where nothing says it: of weights of others, and of registered ones whose run does not.

    Raises:
        WeightsError: what says it is damaged.
    """
    if path is None:
        return None
    beside = path.with_suffix(_IMAGES_SUFFIX)
    try:
        if path.parent == registered_file("").parent and beside.is_file():
            found = beside.read_bytes()
        elif (stated := _stated(path).get(_IMAGES)) is not None:
            found = base64.b64decode(stated)
        else:
            return None
        return np.frombuffer(found, ">u8").astype(np.uint64)
    except ValueError as error:
        raise _damaged(path, error) from None


def stating(said: str, images: npt.NDArray[np.uint64] | None = None) -> dict[str, str]:
    """Return the header of weights: what they were trained on, in words, and which images."""
    stated = {_PRETRAINED_ON: said}
    if images is not None:
        stated[_IMAGES] = base64.b64encode(_bytes(images)).decode()
    return {_HEADER: json.dumps(stated)}


def keep_images_of(path: Path, images: npt.NDArray[np.uint64]) -> None:
    """Write beside a file of weights, whose hash is to stay, which images it was trained on."""
    files.write_bytes(path.with_suffix(_IMAGES_SUFFIX), _bytes(images))


def _bytes(images: npt.NDArray[np.uint64]) -> bytes:
    return np.unique(images).astype(">u8").tobytes()


def _stated(path: Path) -> dict[str, str]:
    """Return what the header of a file of weights states."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        header = (file.metadata() or {}).get(_HEADER, "{}")
    try:
        stated: dict[str, str] = json.loads(header)
    except ValueError as error:
        raise _damaged(path, error) from None
    return stated


def _damaged(path: Path, error: ValueError) -> WeightsError:
    return WeightsError(
        f"what the weights {path} say of the images they were trained on is damaged: {error}. "
        f"Fetch or make them again."
    )


def registered_file(sha256: str) -> Path:
    """Return where the weights of a registered model lie, once they were fetched."""
    return files.cache_folder("tlpipe") / "registered" / f"{sha256}.safetensors"


def _stated_by_hub(path: Path) -> str:
    """Return the hash that the Hugging Face hub stated for a file in its cache, or nothing.

    The cache keeps large files under the names that the hub gives them: their sha256.
    """
    name = path.resolve().name if path.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{64}", name) else ""


def _fetched_by_torch(url: str) -> Path:
    """Return where torch keeps what it has fetched, without importing it."""
    home = Path(os.environ.get("TORCH_HOME") or files.cache_folder("torch")).expanduser()
    return home / "hub" / "checkpoints" / url.rpartition("/")[2]
