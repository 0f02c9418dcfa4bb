"""Give a registered model away: a folder that can be published as it is.

It is laid out as the Hugging Face hub expects a model. timm or torchvision, whichever the backbone
is from, loads its weights in five lines, without tlpipe.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from tlpipe import bundle as bundles
from tlpipe import files
from tlpipe.backbones.backbone import (
    in_timm,
    is_of_timm,
    torchvision_network,
    torchvision_options,
)
from tlpipe.bundle import Bundle, describe
from tlpipe.errors import ParamsError, WeightsError
from tlpipe.registry import Registered, card, moves, tracking, versions
from tlpipe.runtime import generator
from tlpipe.training import model as models

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tlpipe.training.model import Model

_WEIGHTS, _PARITY_IMAGES, _TOLERANCE = "model.safetensors", 4, 1e-4
_METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
# The hub refuses other names (its documentation, Licenses); those are "other" there, with a name.
_KNOWN = frozenset((
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
    *("bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
    *("cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0"),
    *("epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl"),
    *("gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "intel-research"),
    *("h-research", "lppl-1.3c", "ms-pl", "apple-ascl", "mpl-2.0", "odc-by", "odbl"),
    *("openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl"),
))  # fmt: skip
_NO_LICENSE = frozenset(("", "-", "?", "n/a", "none", "null", "unknown", "unlicensed"))


@dataclass(frozen=True)
class Licenses:
    """Under which licenses it is given away, by their names on the hub, such as ``cc-by-4.0``.

    ``model``: of what is shared; ``data``: of the images it was trained on; ``weights``: of the
    pretrained weights it began with.
    """

    model: str
    data: str
    weights: str


@dataclass(frozen=True)
class _Network:
    """A network with its classifier as others know it: its library, its name, how it is built.

    ``classifier``: the path of its last linear layer; ``options``: what it is built with beside the
    number of classes; ``config``: what timm keeps beside the weights.
    """

    library: str
    architecture: str
    classifier: str
    options: dict[str, Any]
    config: dict[str, Any]


def share(workspace: Path, model: Registered, folder: Path, licenses: Licenses) -> Bundle:
    """Write a registered model into a new folder, ready to publish; return its bundle.

    ``README.md`` is a model card with the hub's metadata, numbers with intervals among them;
    ``model.safetensors`` and ``config.json`` are the network in timm's or torchvision's names;
    ``bundle/`` holds the ONNX graphs, labels, preprocessing and provenance, ``bundle.sig`` its
    signature, where it has one. The weights are held against the bundle before. No image is among
    it, and of the source its last name alone.

    Raises:
        ArtifactError: the bundle is damaged, the registered report is of another one, or something
            is at the folder's place.
        ParamsError: a license is missing, or it is an ensemble.
        ParityError: the registered weights give other answers than the bundle.
        RegistryError: there is no such version, some of its artifacts are gone, or what is called
            champion is not what was promoted.
        WeightsError: the pretrained weights of what was frozen are not here, or the library has no
            such network with one classifier.
    """
    from safetensors.torch import save

    _check(licenses)
    versions.check_is_free(folder)
    with TemporaryDirectory() as temporary:
        with tracking.connection(workspace) as client:
            version = tracking.find_version(client, model.name, model.which)
            if model.which == moves.CHAMPION:
                tracking.check_promoted(client, version)
            content, shipped, lineage = versions.fetch(client, version, Path(temporary))
        if "ensemble" in shipped.provenance:
            raise ParamsError(
                f"{model} is an {describe(shipped.provenance)}, and neither timm nor torchvision "
                f"has a network of such weights; expected a version that was trained. Share its "
                f"members, or its bundle: 'tlpipe download'."
            )
        trained = models.load(content.model)
        network = _network(shipped)
        tensors = _tensors(trained, network)
        _check_parity(shipped, trained, network, tensors)
        known = content.known_of(shipped)
        text = card.write(model.name, shipped, known, lineage, _use(network, trained))
        terms_of = {of: card.plain(named) for of, named in asdict(licenses).items()}
        terms = f"## Licenses\n\n{card.table(['', 'license'], terms_of.items())}"
        metadata = _metadata(model.name, network, known, licenses)
        with versions.new_folder(folder) as target:
            files.write_bytes(target / _WEIGHTS, save(tensors, {"format": "pt"}))
            files.write_json(target / "config.json", network.config)
            files.copy_folder(shipped.folder, target / "bundle")
            if (signature := Path(temporary, bundles.SIGNATURE)).is_file():
                beside = bundles.signature_beside(target / "bundle")
                files.write_bytes(beside, signature.read_bytes())
            files.write_bytes(target / "README.md", f"{metadata}\n{text}\n\n{terms}\n".encode())
    return shipped


def _check(licenses: Licenses) -> None:
    """Check that every license is named.

    Raises:
        ParamsError: one is not.
    """
    options = {"model": "--license", "data": "--data-license", "weights": "--weights-license"}
    if missing := [
        options[of]
        for of, named in asdict(licenses).items()
        if named.strip().lower() in _NO_LICENSE
    ]:
        raise ParamsError(
            f"{' and '.join(missing)} not given; nothing was written, since nobody may use what "
            f"has no license. Name those of the model, of the images it was trained on and of its "
            f"pretrained weights, such as cc-by-4.0 or apache-2.0."
        )


def _network(shipped: Bundle) -> _Network:
    """Find what a bundle's network is called elsewhere."""
    name = shipped.provenance["origin"]["backbone"]
    if is_of_timm(name):
        return _of_timm(in_timm(name), shipped)
    options = torchvision_options(name)
    if "init_weights" in options:  # these have auxiliary outputs, too, which are not kept
        options |= {"aux_logits": False, "init_weights": False}
    _, classifier = torchvision_network(name)
    config = {
        "architecture": name,
        "library": "torchvision",
        "num_classes": len(shipped.labels),
        "label_names": list(shipped.labels),
        "preprocessing": shipped.preprocessing.model_dump(),
    }
    return _Network("torchvision", name, classifier, options, config)


def _of_timm(known: str, shipped: Bundle) -> _Network:
    """Describe a network of timm in the words of its own ``config.json``.

    Raises:
        WeightsError: it has no classifier of its own, or several.
    """
    import timm

    sees = shipped.preprocessing
    stated = timm.create_model(known, num_classes=0)
    classifier = stated.pretrained_cfg["classifier"]
    if not isinstance(classifier, str):
        raise WeightsError(
            f"{known} has {len(classifier or ())} classifiers in timm, and this model has one: its "
            f"weights cannot be loaded there. Nothing was written; share its bundle: 'tlpipe "
            f"download'."
        )
    kept = ("pool_size", "first_conv", "fixed_input_size")
    config = {
        "architecture": known.partition(".")[0],
        "num_classes": len(shipped.labels),
        "num_features": stated.num_features,
        "label_names": list(shipped.labels),
        "pretrained_cfg": {
            **{key: stated.pretrained_cfg[key] for key in kept if key in stated.pretrained_cfg},
            "input_size": [3, sees.crop_px, sees.crop_px],
            "crop_pct": sees.crop_px / sees.short_side_px,
            "crop_mode": "center",
            "interpolation": sees.interpolation,
            "mean": list(sees.mean),
            "std": list(sees.std),
            "num_classes": len(shipped.labels),
            "classifier": classifier,
        },
    }
    return _Network("timm", config["architecture"], classifier, {}, config)


def _tensors(trained: "Model", network: _Network) -> "dict[str, Tensor]":
    """Return all tensors by the names that they have in the library, the head's among them."""
    import torch

    tensors = models.network_tensors(trained)
    for number, layer in enumerate(trained.head):
        # Hidden units, with ReLUs between, make a sequence of the classifier.
        inner = f".{2 * number}" if len(trained.head) > 1 else ""
        for kind, array in zip(("weight", "bias"), layer, strict=True):
            tensors[f"{network.classifier}{inner}.{kind}"] = torch.from_numpy(array).contiguous()
    return tensors


def _check_parity(
    shipped: Bundle, trained: "Model", network: _Network, tensors: "dict[str, Tensor]"
) -> None:
    """Load the tensors as others will, and hold the network against the bundle's exact graph.

    Raises:
        ParityError: it gives other logits.
        WeightsError: they do not fit the network.
    """
    import torch

    from tlpipe.export import graph

    built = _built(network, trained)
    try:
        built.load_state_dict(tensors)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"the weights do not fit {network.architecture} as {network.library} builds it: "
            f"{line}. Nothing was written; share the bundle: 'tlpipe download'."
        ) from None
    sees = shipped.preprocessing
    size = (_PARITY_IMAGES, sees.crop_px, sees.crop_px, 3)
    images = generator(0, "parity of what is shared").integers(0, 256, size, np.uint8)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (sees.mean, sees.std))
    with torch.inference_mode():
        found = built.eval()((scaled - mean) / std).numpy()
    exact = graph.in_onnx(shipped.graphs["fp32"].read_bytes(), threads=1)
    parity = graph.measure_parity(exact(images), found)
    graph.check_parity(parity, _TOLERANCE, "what would be shared")


def _built(network: _Network, trained: "Model") -> "nn.Module":
    """Build the network with random weights, as the card says."""
    from torch import nn

    classes = trained.head[-1][0].shape[0]
    built: nn.Module
    if network.library == "timm":
        import timm

        built = timm.create_model(network.architecture, num_classes=classes)
    else:
        import torchvision

        built = torchvision.models.get_model(
            network.architecture, weights=None, num_classes=classes, **network.options
        )
    if len(trained.head) > 1:
        parts: list[nn.Module] = []
        for weight, _ in trained.head:
            parts += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
        built.set_submodule(network.classifier, nn.Sequential(*parts[:-1]))
    return built


def _use(network: _Network, trained: "Model") -> str:
    """Say how to load it, in code that a test of tlpipe runs."""
    classes = trained.head[-1][0].shape[0]
    maker = "timm.create_model" if network.library == "timm" else "torchvision.models.get_model"
    options = {"num_classes": classes, **network.options}
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    imports = [f"import {network.library}", "from safetensors.torch import load_file"]
    lines = [f'model = {maker}("{network.architecture}"{given})']
    if len(trained.head) > 1:
        imports.append("from torch import nn")
        layers = (f"nn.Linear{weight.shape[::-1]}" for weight, _ in trained.head)
        lines += [
            f"head = nn.Sequential({', nn.ReLU(), '.join(layers)})",
            f'model.set_submodule("{network.classifier}", head)',
        ]
    lines += [f'model.load_state_dict(load_file("{_WEIGHTS}"))', "model.eval()"]
    code = "\n".join([*imports, "", *lines])
    return (
        f"```python\n{code}\n```\n\n"
        f"`config.json` has the labels in the order of the logits, and how images are resized, "
        f"cropped and normalised. `bundle/` holds the same network for ONNX Runtime, from bytes of "
        f"RGB images to probabilities: `tlpipe predict --model bundle IMAGE`."
    )


def _metadata(name: str, network: _Network, known: card.Known, licenses: Licenses) -> str:
    """Return the hub's metadata as the head of a README, between lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    exact = known["report"]["precisions"]["fp32"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="custom",
            dataset_name=known["data_report"]["source"] or "images",
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')} ({found['confidence']:.0%} interval "
            f"{found['low']:.3f} to {found['high']:.3f})",
            metric_value=found["value"],
        )
        for metric in _METRICS
        if (found := exact.get(metric))
    ]
    given = licenses.model.strip()
    is_known = given.lower() in _KNOWN
    data = ModelCardData(
        license=given.lower() if is_known else "other",
        license_name=None if is_known else given,
        library_name=network.library,
        pipeline_tag="image-classification",
        tags=["image-classification", network.library, "onnx", "transfer-learning", "tlpipe"],
        model_name=name,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n"
