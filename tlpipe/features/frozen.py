"""The frozen part of a backbone as an ONNX graph: exported once, kept in the user's cache folder.

The graph takes images (N, crop, crop, 3) uint8 RGB, normalises them, runs every frozen stage and
returns features (N, D) float32. It is the first part of every classifier built on this backbone.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipe import files
from tlpipe.data.images import Preprocessing
from tlpipe.features.backbone import Backbone, cache_folder, load_network
from tlpipe.features.weights import Weights

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

OPSET = 20
IMAGES, FEATURES = "images", "features"
_MODULES = ("backbone", "stages", "frozen")
_log = logging.getLogger(__name__)


def frozen_graph(backbone: Backbone, weights: Weights) -> Path:
    """Return the frozen part's ONNX file, exporting it if the cache does not hold it intact."""
    name = backbone.name.replace("/", "--")
    path = cache_folder("frozen") / f"{name}-{_key(backbone, weights)}.onnx"
    seal = path.with_suffix(".sha256")
    if path.exists() and seal.exists() and seal.read_text() == files.sha256(path):
        return path
    _log.info("exporting the frozen part of %s to %s, once", backbone.name, path)
    model = _export(load_network(backbone, weights), backbone.preprocessing)
    content = model.SerializeToString(deterministic=True)
    files.write_bytes(path, content)
    files.write_bytes(seal, hashlib.sha256(content).hexdigest().encode())
    return path


def with_normalisation(network: "nn.Module", preprocessing: Preprocessing) -> "nn.Module":
    """Return a module from images (N, H, W, 3) uint8 RGB to what ``network`` makes of them."""
    import torch
    from torch import nn

    class FromPixels(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor(preprocessing.mean) * 255)
            self.register_buffer("std", torch.tensor(preprocessing.std) * 255)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            normalised = (images.to(torch.float32) - self.mean) / self.std
            features: torch.Tensor = self.network(normalised.permute(0, 3, 1, 2))
            return features

    return FromPixels().eval()


def _export(network: "nn.Module", preprocessing: Preprocessing) -> "ModelProto":
    import torch

    side = preprocessing.crop_px
    module = with_normalisation(network, preprocessing)
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[IMAGES],
            output_names=[FEATURES],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    assert program is not None
    model: ModelProto = program.model_proto
    _strip(model)
    return model


def _strip(model: "ModelProto") -> None:
    """Take out what the exporter notes of its own run: stack traces with paths, module names."""
    graph = model.graph
    noted = [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info]
    for part in [*noted, *graph.initializer]:
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    graph.doc_string = model.doc_string = ""


def _key(backbone: Backbone, weights: Weights) -> str:
    """Name all that the graph depends on."""
    parts = [
        weights.sha256,
        backbone.preprocessing.model_dump_json(),
        backbone.stages[-1].name,
        str(OPSET),
        *(version(package) for package in ("torch", "torchvision", "timm", "onnx", "onnxscript")),
        *(files.sha256(Path(__file__).with_name(f"{name}.py")) for name in _MODULES),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and its notes on its own future."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
