"""The graph in half precision, for GPUs: half the size, and what would overflow stays fp32.

On a CPU, ONNX Runtime computes fp16 graphs in fp32 and rounds little of what lies between, so an
overflow that a GPU would see stays hidden there. Hence it is excluded by how the graph is made.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from tlpipe.export.bundle import IMAGES, LOGITS
from tlpipe.export.parity import Sample
from tlpipe.runtime import open_session

_BATCH = 8
# fp16 ends at 65504. An eighth of that leaves room for images that are not in the sample.
_LARGEST = float(np.finfo(np.float16).max) / 8
# What squares, sums, divides or exponentiates: its terms exceed 65504 or vanish below 6e-8 though
# its results do neither. Decomposed, LayerNormalization is Sub, Pow, ReduceMean, Sqrt and Div.
_SENSITIVE = frozenset({
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    *("LpNormalization", "LpPool", "MeanVarianceNormalization", "LRN"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd"),
    *("ReduceLogSum", "ReduceLogSumExp", "GlobalAveragePool", "Softmax", "LogSoftmax"),
    *("Sub", "Div", "Pow", "Sqrt", "Reciprocal", "Exp", "Log"),
})  # fmt: skip
# What has inputs that must be fp32, or makes tensors of a type that stands in an attribute.
_FIXED = frozenset(
    {"Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "Range", "Resize"}
)
# These belong to a normalisation where all that they take comes from one.
_FOLLOWING = frozenset({"Add", "Mul", "Clip", "Max", "Min", "Neg", "Transpose", "Reshape"})


def to_fp16(model: onnx.ModelProto, sample: Sample, threads: int) -> onnx.ModelProto:
    """Return the graph with fp16 weights and activations; inputs and outputs are as they were.

    fp32 stay: normalisations, sums, quotients, exponentials, the last layer and what follows it;
    and every node that takes or gives values which, on ``sample``, exceed an eighth of fp16's
    range. Between two of those nothing is rounded.

    onnxruntime.transformers.float16 would round there (microsoft/onnxruntime#20346), and leaves a
    graph whose nodes are in no valid order.
    """
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    graph = inferred.graph
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    typed = [*graph.input, *graph.value_info, *graph.output]
    floats = {v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    large = _too_large(inferred, floats, sample, threads)
    large |= {name for name, tensor in weights.items() if _magnitude(tensor) > _LARGEST}
    exact = _exact(graph, large)

    halves: set[str] = set()
    made: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []

    def cast(name: str, to: int) -> str:
        if (name, to) not in made:
            result = made[name, to] = f"{name}.{TensorProto.DataType.Name(to).lower()}"
            if name in weights:
                half = numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(half, result))
            else:
                nodes.append(helper.make_node("Cast", [name], [result], name=result, to=to))
        return made[name, to]

    for number, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            if number in exact and name in halves:
                node.input[place] = cast(name, TensorProto.FLOAT)
            elif number not in exact and name not in halves and name in floats | weights.keys():
                node.input[place] = cast(name, TensorProto.FLOAT16)
        if number not in exact:
            halves |= floats & set(node.output)
        nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return inferred


def _exact(graph: onnx.GraphProto, large: set[str]) -> set[int]:
    """Return the places of the nodes that stay fp32; ``large``: tensors that do not fit fp16."""
    weights = {t.name for t in graph.initializer}
    exact: set[int] = set()
    behind: set[str] = set()  # what nodes that stay fp32 give
    is_last = False
    for number, node in enumerate(graph.node):
        is_last = is_last or LOGITS in node.output
        taken = [name for name in node.input if name and name not in weights]
        is_square = node.op_type == "Mul" and len(taken) == 2 and taken[0] == taken[1]
        follows = node.op_type in _FOLLOWING and taken and behind.issuperset(taken)
        is_large = not large.isdisjoint([*node.input, *node.output])
        is_kind = node.op_type in _SENSITIVE | _FIXED
        if is_last or is_square or follows or is_large or is_kind:
            exact.add(number)
            behind |= set(node.output)
    return exact


def _magnitude(tensor: onnx.TensorProto) -> float:
    """Return the largest magnitude in a tensor."""
    return float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))


def _too_large(model: onnx.ModelProto, floats: set[str], sample: Sample, threads: int) -> set[str]:
    """Return which results of nodes are, in fp32 and for a sample, too large for fp16."""
    names = [name for node in model.graph.node for name in node.output if name in floats]
    measuring = onnx.ModelProto()
    measuring.CopyFrom(model)
    for name in names:
        size, largest = f"{name}.size", f"{name}.largest"
        measuring.graph.node.extend((
            helper.make_node("Abs", [name], [size]),
            helper.make_node("ReduceMax", [size], [largest], keepdims=0),
        ))  # fmt: skip
        measuring.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    session = open_session(measuring.SerializeToString(), threads=threads, device="cpu")
    asked = [f"{name}.largest" for name in names]
    found = [session.run(asked, {IMAGES: images}) for images in sample.batches(_BATCH)]
    # Written so that a NaN is too large.
    fits = (np.array(found).reshape(-1, len(names)) <= _LARGEST).all(axis=0)
    return {names[i] for i in np.flatnonzero(~fits)}
