import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.conftest import Workspace
from tlpipe.data import pixels
from tlpipe.data.manifest import load_split
from tlpipe.export import export


@pytest.fixture(scope="module")
def graph(artifacts: Path) -> onnx.ModelProto:
    return onnx.load(artifacts / "export" / "bundle" / "model.onnx", load_external_data=False)


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_the_graph_is_what_servers_expect(graph: onnx.ModelProto) -> None:
    assert {entry.domain: entry.version >= 20 for entry in graph.opset_import} == {"": True}
    (images,) = graph.graph.input
    assert (images.name, shape(images)) == ("images", ["batch", 224, 224, 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert {value.name: shape(value) for value in graph.graph.output} == {
        "logits": ["batch", 10],
        "probabilities": ["batch", 10],
    }
    locations = {tensor.data_location for tensor in graph.graph.initializer}
    assert locations == {onnx.TensorProto.DEFAULT}


def test_the_graph_carries_labels_preprocessing_and_provenance(graph: onnx.ModelProto) -> None:
    metadata = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert metadata["tlpipe.labels"] == list("0123456789")
    assert metadata["tlpipe.preprocessing"] == {
        "short_side_px": 256,
        "interpolation": "bicubic",
        "crop_px": 224,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "value_range": None,
    }
    assert metadata["tlpipe.provenance"]["origin"]["backbone"] == "efficientnet_lite0"


def test_any_batch_gives_the_same_answers(artifacts: Path) -> None:
    session = onnxruntime.InferenceSession(artifacts / "export" / "bundle" / "model.onnx")
    images = np.ascontiguousarray(
        pixels.load(artifacts / "ingest" / "pixels").array[:7][:, 16:240, 16:240]
    )
    logits, probabilities = session.run(None, {"images": images})
    assert logits.shape == probabilities.shape == (7, 10)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    temperature = json.loads((artifacts / "export/parity.json").read_text())["temperature"]
    raised = np.exp(logits / temperature)
    assert np.allclose(raised / raised.sum(axis=1, keepdims=True), probabilities, atol=1e-6)
    for i in range(7):
        single = session.run(["logits"], {"images": images[i : i + 1]})[0]
        assert np.abs(single - logits[i]).max() < 1e-4


def test_the_graph_equals_an_independent_torch_twin_on_every_test_image(artifacts: Path) -> None:
    """The twin is timm's own network and preprocessing by hand, none of the exporter's code."""
    import timm
    from safetensors.torch import load_file

    from tlpipe.backbones.backbone import describe, load_network
    from tlpipe.backbones.weights import IMAGENET, find

    backbone = describe("efficientnet_lite0")
    trunk = load_network(backbone, find(backbone.name, backbone.pretrained, IMAGENET, None))
    twin = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    renamed = zip(list(twin.state_dict())[:-2], trunk.state_dict().values(), strict=True)
    head = load_file(artifacts / "train" / "model" / "model.safetensors")
    classifier = {f"classifier.{key.removeprefix('head.0.')}": head[key] for key in head}
    twin.load_state_dict(dict(renamed) | classifier)

    test = [
        i
        for i, row in enumerate(load_split(artifacts / "split" / "split.csv"))
        if row.split == "test"
    ]
    images = pixels.load(artifacts / "ingest" / "pixels").array[test][:, 16:240, 16:240]
    session = onnxruntime.InferenceSession(artifacts / "export" / "bundle" / "model.onnx")
    for start in range(0, len(test), 32):
        batch = np.ascontiguousarray(images[start : start + 32])
        normalised = (torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        with torch.inference_mode():
            expected = twin(normalised).numpy()
        logits = session.run(["logits"], {"images": batch})[0]
        assert np.abs(logits - expected).max() <= 1e-4
        assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_parity_was_measured_on_as_many_test_images_as_asked_for(artifacts: Path) -> None:
    measured = json.loads((artifacts / "export" / "parity.json").read_text())
    report = json.loads((artifacts / "evaluate" / "report.json").read_text())
    assert report["images"] > export.Params().parity_images
    assert measured["images"] == measured["same_top1"] == export.Params().parity_images
    assert 0 < measured["max_difference"] <= 1e-4
    assert measured["logit_spread"] > 1


@pytest.mark.fault("E05")
def test_export_writes_nothing_where_parity_fails(artifacts: Path, empty: Workspace) -> None:
    """No graph meets a tolerance of a billionth of a logit: rounding alone exceeds it."""
    empty.configure("export", parity_images=8, parity_tolerance=1e-9)
    empty.take(Workspace(artifacts.parent), "model", "pixels", "split")
    before = sorted(empty.path.rglob("*"))
    result = empty.call("export", code=7)
    assert "the exported graph differs from the trained model" in result.stderr
    assert sorted(empty.path.rglob("*")) == before
