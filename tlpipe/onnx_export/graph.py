"""Put the ONNX graph of a classifier together: the frozen part, the head, the probabilities."""

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from tlpipe.features.frozen import FEATURES, OPSET
from tlpipe.learning.model import Model
from tlpipe.onnx_export.bundle import LOGITS, PROBABILITIES


def classifier(frozen: Path, model: Model, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of the whole graph; equal inputs give equal bytes.

    Input ``images``: (N, S, S, 3) uint8 RGB. Outputs ``logits`` and ``probabilities``: (N, C)
    float32, the probabilities summing to 1.
    """
    trunk = onnx.load(frozen)
    whole = compose.merge_models(trunk, _head(model, trunk.ir_version), [(FEATURES, "head_input")])
    whole.graph.name = "tlpipe"
    whole.producer_name, whole.producer_version = "tlpipe", ""
    del whole.metadata_props[:]
    helper.set_model_props(whole, dict(sorted(metadata.items())))
    onnx.checker.check_model(whole, full_check=True)
    return bytes(whole.SerializeToString(deterministic=True))


def _head(model: Model, ir_version: int) -> onnx.ModelProto:
    classes, width = model.weight.shape
    nodes = [
        helper.make_node(
            "Gemm", ["head_input", "head.weight", "head.bias"], [LOGITS], name="head", transB=1
        ),
        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name="softmax", axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("head_input", TensorProto.FLOAT, ["batch", width])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
            for name in (LOGITS, PROBABILITIES)
        ],
        [
            numpy_helper.from_array(model.weight, "head.weight"),
            numpy_helper.from_array(model.bias, "head.bias"),
        ],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=ir_version)
