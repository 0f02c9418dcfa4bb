"""Put the ONNX graph of a classifier together: what was frozen, what was trained, the head."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from tlpipe.backbones import frozen
from tlpipe.backbones.backbone import Backbone
from tlpipe.backbones.weights import Weights
from tlpipe.export.bundle import IMAGES, LOGITS, PROBABILITIES
from tlpipe.training.classifier import restore
from tlpipe.training.model import Model

_OPEN = "open."
TEMPERATURE = "temperature"


def classifier(backbone: Backbone, weights: Weights, model: Model) -> onnx.ModelProto:
    """Return the whole graph, with a temperature of 1.

    Input ``images``: (N, S, S, 3) uint8 RGB. Outputs ``logits`` and ``probabilities``: (N, C)
    float32, the probabilities summing to 1: the softmax of logits over the temperature.
    """
    whole = _features(backbone, weights, model)
    features = whole.graph.output[0].name
    head = _head(model, whole.ir_version)
    whole = compose.merge_models(whole, head, [(features, head.graph.input[0].name)])
    del whole.opset_import[:]
    whole.opset_import.append(helper.make_opsetid("", frozen.OPSET))
    return whole


def finished(model: onnx.ModelProto, temperature: float, metadata: Mapping[str, str]) -> bytes:
    """Return a graph's bytes with its temperature and all that is to be known of it.

    Equal inputs give equal bytes.
    """
    (divisor,) = (tensor for tensor in model.graph.initializer if tensor.name == TEMPERATURE)
    divisor.CopyFrom(numpy_helper.from_array(np.float32(temperature), TEMPERATURE))
    model.graph.name = "tlpipe"
    model.producer_name, model.producer_version = "tlpipe", ""
    del model.metadata_props[:]
    helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def last_layer(model: onnx.ModelProto) -> onnx.NodeProto:
    """Return the linear layer that gives the logits: Gemm(features, weight (C, D), bias (C,))."""
    return next(node for node in model.graph.node if node.output[0] == LOGITS)


def last_layer_bytes(model: onnx.ModelProto) -> int:
    """Return how many bytes the weight and the bias of the last layer take."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return sum(tensors[name].ByteSize() for name in last_layer(model).input[1:3])


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
    tensors.append(numpy_helper.from_array(np.float32(1), TEMPERATURE))
    nodes += [
        helper.make_node("Div", [LOGITS, TEMPERATURE], ["head.scaled"], name="head.scaled"),
        helper.make_node("Softmax", ["head.scaled"], [PROBABILITIES], name="softmax", axis=-1),
    ]
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
