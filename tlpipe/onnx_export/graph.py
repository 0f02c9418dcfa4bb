"""Put the ONNX graph of a classifier together: what was frozen, what was trained, the head."""

from collections.abc import Mapping

import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from tlpipe.features import frozen
from tlpipe.features.backbone import Backbone
from tlpipe.features.weights import Weights
from tlpipe.learning.classifier import restore
from tlpipe.learning.model import Model
from tlpipe.onnx_export.bundle import IMAGES, LOGITS, PROBABILITIES

_OPEN = "open."


def classifier(
    backbone: Backbone, weights: Weights, model: Model, metadata: Mapping[str, str]
) -> bytes:
    """Return the bytes of the whole graph; equal inputs give equal bytes.

    Input ``images``: (N, S, S, 3) uint8 RGB. Outputs ``logits`` and ``probabilities``: (N, C)
    float32, the probabilities summing to 1.
    """
    whole = _features(backbone, weights, model)
    features = whole.graph.output[0].name
    head = _head(model, whole.ir_version)
    whole = compose.merge_models(whole, head, [(features, head.graph.input[0].name)])
    whole.graph.name = "tlpipe"
    whole.producer_name, whole.producer_version = "tlpipe", ""
    del whole.metadata_props[:]
    helper.set_model_props(whole, dict(sorted(metadata.items())))
    onnx.checker.check_model(whole, full_check=True)
    return bytes(whole.SerializeToString(deterministic=True))


def _features(backbone: Backbone, weights: Weights, model: Model) -> onnx.ModelProto:
    """Return the graph from images to features: what was frozen, and behind it what was trained."""
    boundary = model.card.origin.boundary
    position = backbone.position(boundary)
    trunk = frozen.part(frozen.whole_graph(backbone, weights), [boundary]) if boundary else None
    if position == len(backbone.stages):
        return trunk
    import torch

    stages = restore(backbone, weights, model).stages
    if trunk is None:
        network = frozen.from_pixels(stages, backbone.preprocessing)
        return frozen.export(network, IMAGES, ["features"], frozen.images(backbone.preprocessing))
    example = torch.zeros(2, *backbone.stages[position - 1].shape)
    opened = compose.add_prefix(frozen.export(stages, "activations", ["features"], example), _OPEN)
    taken = opened.graph.input[0].name
    return compose.merge_models(trunk, opened, [(frozen.output(boundary), taken)])


def _head(model: Model, ir_version: int) -> onnx.ModelProto:
    """Return the graph of the head: linear layers with ReLUs between, then the probabilities."""
    width, classes = model.head[0][0].shape[1], model.head[-1][0].shape[0]
    nodes, tensors, current = [], [], "head.input"
    last = len(model.head) - 1
    for number, (weight, bias) in enumerate(model.head):
        names = [f"head.{number}.weight", f"head.{number}.bias"]
        result = LOGITS if number == last else f"head.{number}.sum"
        name = f"head.{number}"
        nodes.append(helper.make_node("Gemm", [current, *names], [result], name=name, transB=1))
        tensors += [
            numpy_helper.from_array(array, tensor_name)
            for array, tensor_name in zip((weight, bias), names, strict=True)
        ]
        if number != last:
            current = f"head.{number}.relu"
            nodes.append(helper.make_node("Relu", [result], [current], name=current))
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name="softmax", axis=-1))
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("head.input", TensorProto.FLOAT, ["batch", width])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
            for name in (LOGITS, PROBABILITIES)
        ],
        tensors,
    )
    opset = helper.make_opsetid("", frozen.OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=ir_version)
