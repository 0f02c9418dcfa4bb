"""The frozen part of a backbone as an ONNX graph: exported once, kept in the user's cache folder.

The graph takes images (N, crop, crop, 3) uint8 RGB, normalises them and runs every stage. Its part
up to the boundary is the first part of every classifier built on this backbone.
"""

import hashlib
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlpipe import files
from tlpipe.backbones.backbone import Backbone, load_network
from tlpipe.backbones.weights import Weights
from tlpipe.code_digest import of_modules, versions
from tlpipe.data.images import Preprocessing
from tlpipe.errors import ParityError
from tlpipe.runtime import generator, open_session

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

OPSET = 20
_PARITY_IMAGES = 4
_TOLERANCE = 1e-3  # of the standard deviation of what a stage gives
IMAGES = "images"
PACKAGES = ("onnx", "onnx-ir", "onnxscript", "timm", "torch", "torchvision")
_CODE = (
    *(
        f"tlpipe.backbones.{name}"
        for name in ("backbone", "batchnorm", "frozen", "stages", "weights")
    ),
    "tlpipe.runtime",
)
_log = logging.getLogger(__name__)


def whole_graph(backbone: Backbone, weights: Weights) -> Path:
    """Return the pretrained network's ONNX file, exporting it if the cache does not hold it intact.

    Every stage's result is an output of it, so that one export serves every boundary. It is kept
    after each of them has proven equal to torch's.

    Raises:
        ParityError: a stage gives something else than in torch.
    """
    name = backbone.name.replace("/", "--")
    path = files.cache_folder("tlpipe") / "frozen" / f"{name}-{graph_key(backbone, weights)}.onnx"
    seal = path.with_suffix(".sha256")
    if path.exists() and seal.exists() and seal.read_text() == files.sha256(path):
        return path
    _log.info("exporting %s to %s, once", backbone.name, path)
    network = from_pixels(load_network(backbone, weights), backbone.preprocessing)
    names = [output(stage.name) for stage in backbone.stages]
    model = export(_every_stage(network), IMAGES, names, images(backbone.preprocessing))
    content = model.SerializeToString(deterministic=True)
    _check_parity(backbone, network, content)
    with files.writing_cache(path.parent):
        files.write_bytes(path, content)
        files.write_bytes(seal, hashlib.sha256(content).hexdigest().encode())
    return path


def _check_parity(backbone: Backbone, network: "nn.Sequential", content: bytes) -> None:
    """Hold every stage of a graph against torch, on images of noise and on smooth ones."""
    import torch

    side = backbone.preprocessing.crop_px
    random = generator(0, "parity of the frozen part")
    shown = random.integers(0, 256, (_PARITY_IMAGES, side, side, 3), np.uint8)
    rising = np.linspace(0, 255, side, dtype=np.uint8)
    shown[::2, :, :, 0], shown[::2, :, :, 1] = rising, rising[:, np.newaxis]
    found = open_session(content, threads=1, device="cpu").run(None, {IMAGES: shown})
    normalise, *stages = network
    with torch.inference_mode():
        current = normalise(torch.from_numpy(shown))
        for stage, module, array in zip(backbone.stages, stages, found, strict=True):
            current = module(current)
            expected = current.numpy()
            allowed = _TOLERANCE * float(expected.std())
            apart = float(np.abs(expected - array).max())
            if not apart <= allowed:  # a NaN is an error, too
                raise ParityError(
                    f"the exported stage {stage.name} of {backbone.name} gives values up to "
                    f"{apart:.2g} from those in torch; expected {allowed:.2g} at most. Nothing was "
                    f"kept. Report it, or take another embed.backbone."
                )


def output(stage: str) -> str:
    """Return the name that a stage's result has in the graph."""
    return f"stage.{stage}"


def part(graph: Path, stages: Sequence[str]) -> "ModelProto":
    """Return what the results of these stages need of the graph."""
    import onnx
    from onnx.utils import Extractor

    return Extractor(onnx.load(graph)).extract_model([IMAGES], [output(name) for name in stages])


def from_pixels(stages: "nn.Sequential", preprocessing: Preprocessing) -> "nn.Sequential":
    """Return stages that take images (N, H, W, 3) uint8 RGB, in evaluation mode."""
    import torch
    from torch import nn

    class Normalise(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("mean", "std"):
                colours = torch.tensor(getattr(preprocessing, name)).reshape(3, 1, 1)
                self.register_buffer(name, colours * 255)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            # Turned first: bytes are few, and arithmetic along a last axis of three is slow.
            turned = images.permute(0, 3, 1, 2).to(torch.float32)
            return (turned - self.mean) / self.std

    named = dict(stages.named_children())
    return nn.Sequential(OrderedDict({"normalise": Normalise(), **named})).eval()


def export(
    module: "nn.Module", taken: str, given: Sequence[str], example: "Tensor"
) -> "ModelProto":
    """Export a module of one argument, whose first axis may have any length, without traces."""
    import torch

    from tlpipe.backbones.batchnorm import folded

    # The exporter takes apart what normalises, to put it together again, and turns what works in
    # place into what does not: each is half of its time.
    module = folded(module, _noise_like(example[:1]))
    for layer in module.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[taken],
            output_names=list(given),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    model: ModelProto = program.model_proto
    _strip(model)
    return model


def _noise_like(example: "Tensor") -> "Tensor":
    import torch

    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))
    return (noise * 255).to(example.dtype) if example.dtype is torch.uint8 else noise - 0.5


def graph_key(backbone: Backbone, weights: Weights) -> str:
    """Name all that the graph depends on."""
    parts = [
        backbone.name,
        weights.sha256,
        backbone.preprocessing.model_dump_json(),
        str(versions(*PACKAGES)),
        of_modules(*_CODE),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def images(preprocessing: Preprocessing) -> "Tensor":
    """Return two black images, to trace with."""
    import torch

    side = preprocessing.crop_px
    return torch.zeros(2, side, side, 3, dtype=torch.uint8)


def _every_stage(network: "nn.Sequential") -> "nn.Module":
    """Return a module that gives what each stage makes, in order."""
    import torch
    from torch import nn

    class EveryStage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            normalise, *stages = self.network
            results, current = [], normalise(images)
            for stage in stages:
                current = stage(current)
                results.append(current)
            return tuple(results)

    return EveryStage().eval()


def _strip(model: "ModelProto") -> None:
    """Strip what the exporter records of its own run: stack traces with paths, module names."""
    graph = model.graph
    noted = [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info]
    for part in [*noted, *graph.initializer]:
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    graph.doc_string = model.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and its notes on its own future."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
