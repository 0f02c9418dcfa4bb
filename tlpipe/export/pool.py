"""A linear opinion pool: several classifiers as one ONNX graph, and the weights that mix them.

``p(class | image) = sum_m w_m p_m(class | image)``, with ``w_m >= 0`` and ``sum_m w_m = 1``, where
``p_m`` is what a member answers, by its own temperature. Members that were trained on smaller
images get them resized inside the graph, on uint8 with antialiasing, as ``data.images.square``
resizes.

Source: Stone (1961), The opinion pool, Annals of Mathematical Statistics 32; of classifiers, with
weights fitted on held-out answers: Smyth and Wolpert (1999), Linearly combining density estimators
via stacking, Machine Learning 36.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, helper, numpy_helper, parser
from onnx.utils import Extractor
from PIL import Image

from tlpipe.backbones.frozen import OPSET
from tlpipe.bundle import IMAGES, LOGITS, PROBABILITIES
from tlpipe.data.images import Pixels, Preprocessing, Sampling, crop_middle, square
from tlpipe.errors import ArtifactError, ParamsError
from tlpipe.export.graph import (
    TEMPERATURE,
    Logits,
    Parity,
    Sample,
    check_levels,
    check_parity,
    in_onnx,
    last_layer,
    measure_parity,
)
from tlpipe.export.precisions import out_of_fold_logits
from tlpipe.held_out import HeldOut
from tlpipe.progress import track
from tlpipe.resampling import deal
from tlpipe.runtime import open_session

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
FOLDS = 4
_MOST_BYTES = 2**31 - 2**20  # of Protocol Buffers, less the head of the file
_BATCH = 4
_DIGITS = 3  # of a weight: the file should not differ where the last bits of a logit do


def log_softmax(logits: npt.NDArray[np.floating], temperature: float) -> Floats:
    """Return log probabilities (N, C) of logits (N, C), divided by a temperature."""
    from scipy.special import log_softmax

    found: Floats = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return found


def mix(answers: Floats, weights: Floats) -> Floats:
    """Return the log probabilities (N, C) of the pool of members' (M, N, C)."""
    from scipy.special import logsumexp

    found: Floats = logsumexp(answers, axis=0, b=weights[:, np.newaxis, np.newaxis])
    return found


def solve_weights(answers: Floats, truth: Labels) -> Floats:
    """Return the weights (M,) of the pool under which the labels are likeliest.

    They minimise the log loss, which is convex in them. Where they need only be non-negative, and
    their sum is added to the loss, they sum to 1 at the minimum: the gradient is ``1 - mean(p_m /
    p)``, it is 0 or the weight is, so ``sum_m w_m = mean(sum_m w_m p_m / p) = 1``.

    Args:
        answers: (M, N, C) log probabilities for images that no member has trained on.
        truth: (N,) class numbers.

    Source: Cover (1984), An algorithm for maximizing expected log investment return, IEEE
    Transactions on Information Theory 30, for these conditions.
    """
    from scipy.optimize import minimize

    of_truth = answers[:, np.arange(len(truth)), truth]
    # Only ratios within an image count: none is 0 where every member is sure of something else.
    likelihoods = np.exp(of_truth - of_truth.max(axis=0)).T

    def objective(weights: Floats) -> tuple[float, Floats]:
        pooled = np.maximum(likelihoods @ weights, np.finfo(np.float64).tiny)
        gradient = 1 - (likelihoods / pooled[:, np.newaxis]).mean(axis=0)
        return float(weights.sum() - np.log(pooled).mean()), gradient

    start = np.full(len(answers), 1 / len(answers))
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    found = minimize(
        objective,
        start,
        jac=True,
        bounds=[(0, None)] * len(start),
        method="L-BFGS-B",
        options=options,
    )
    weights: Floats = found.x / found.x.sum()
    return weights


def rounded(weights: Floats) -> Floats:
    """Return weights of three decimals that sum to 1: the largest remainders are rounded up."""
    unit = 10**_DIGITS
    parts = np.floor(weights * unit + 1e-9)
    missing = round(unit - parts.sum())
    parts[np.argsort(parts - weights * unit, kind="stable")[:missing]] += 1
    found: Floats = parts / unit
    return found


def cross_fit(answers: Floats, truth: Labels, groups: Sequence[str]) -> Floats:
    """Return the pool's log probabilities (N, C), each image's with weights fitted without it.

    With weights fitted on the same images, a loss would be too low.

    ``groups``: (N,) names; images of one group are in one fold, one without a name is alone.
    """
    names = [group or f"\n{number}" for number, group in enumerate(groups)]
    classes: dict[str, set[str]] = defaultdict(set)
    for label, name in zip(truth.tolist(), names, strict=True):
        classes[str(label)].add(name)
    dealt = deal(classes, FOLDS, seed=0, placed={}, of_equal_size=True)
    folds = np.array([dealt[name] for name in names])
    pooled = np.empty(answers.shape[1:])
    for fold in np.unique(folds).tolist():
        inside = folds == fold
        weights = solve_weights(answers[:, ~inside], truth[~inside])
        pooled[inside] = mix(answers[:, inside], weights)
    return pooled


def log_loss(answers: Floats, truth: Labels) -> float:
    """Return the mean log loss, in nats, of log probabilities (N, C)."""
    return float(-answers[np.arange(len(truth)), truth].mean())


@dataclass(frozen=True)
class Member:
    """A classifier of the pool: its exact graph, its temperature, how it wants images."""

    graph: onnx.ModelProto
    temperature: float
    preprocessing: Preprocessing

    @property
    def view(self) -> tuple[int, int, str]:
        """What it makes of a stored square: side, crop, interpolation."""
        sees = self.preprocessing
        return sees.short_side_px, sees.crop_px, sees.interpolation


def common_preprocessing(members: Sequence[Preprocessing], stored: Sampling) -> Preprocessing:
    """Return how the pool wants images that are stored in squares at least as large as theirs.

    Where all members want the same crop of such squares, the pool does. Else it takes whole ones.
    Each member's graph normalises by itself, so there is nothing left to subtract or to divide by.
    """
    side = stored.short_side_px
    views = {(sees.short_side_px, sees.crop_px) for sees in members}
    crop = members[0].crop_px if views == {(side, members[0].crop_px)} else side
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Preprocessing(**stored.model_dump(), crop_px=crop, mean=mean, std=std)


# As in the graph for images of any size: all four sizes for Resize; -0.5: Pillow's kernel.
_VIEW = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
view (uint8[batch, {side}, {side}, 3] images) => (uint8[batch, {crop}, {crop}, 3] {name}_images)
<int64[3] {name}_sizes = {{3, {short}, {short}}}, int64[2] {name}_start = {{{start}, {start}}},
 int64[2] {name}_end = {{{end}, {end}}}, int64[2] {name}_axes = {{2, 3}}>
{{
  {name}_planes = Transpose <perm = [0, 3, 1, 2]> (images)
  {name}_count = Shape <start = 0, end = 1> (images)
  {name}_shape = Concat <axis = 0> ({name}_count, {name}_sizes)
  {name}_resized = Resize
    <mode = "{mode}", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1>
    ({name}_planes, , , {name}_shape)
  {name}_kept = Slice ({name}_resized, {name}_start, {name}_end, {name}_axes)
  {name}_images = Transpose <perm = [0, 2, 3, 1]> ({name}_kept)
}}
"""


def merged(
    members: Sequence[Member],
    weights: Floats,
    common: Preprocessing,
    *,
    is_joined: bool = True,
) -> onnx.ModelProto:
    """Return the pool's graph, with a temperature of 1.

    Input ``images``: (N, S, S, 3) uint8 RGB as ``common`` crops them. Outputs as those of
    ``graph.classifier``: ``logits`` are the log probabilities of the pool. Member k's tensors have
    ``mk_`` before their names. What equal views and equal weights give is computed once, as by
    members on one frozen backbone; not ``is_joined`` keeps all that each member computes.

    Raises:
        ArtifactError: a member was exported for another opset.
        ParamsError: all together are more than a file can hold.
    """
    nodes, tensors, logs = list[onnx.NodeProto](), list[onnx.TensorProto](), list[str]()
    for number, (member, weight) in enumerate(zip(members, weights.tolist(), strict=True)):
        name = f"m{number}"
        opsets = {one.domain: one.version for one in member.graph.opset_import}
        if opsets.get("") != OPSET:
            raise ArtifactError(
                f"member {number + 1} has a graph of opset {opsets.get('')}; expected {OPSET}. It "
                f"was exported by another version of tlpipe: export and register it anew."
            )
        part = Extractor(member.graph).extract_model([IMAGES], [LOGITS])
        part = compose.add_prefix(part, f"{name}_")
        view = _view_of(members, number, common)
        if view == f"view{number}":
            before = parser.parse_model(_view_text(member, view, common, part.ir_version))
            nodes += before.graph.node
            tensors += before.graph.initializer
        taken = f"{view}_{IMAGES}" if view else IMAGES
        for node in part.graph.node:
            node.input[:] = [taken if one == f"{name}_{IMAGES}" else one for one in node.input]
        nodes += part.graph.node
        tensors += part.graph.initializer
        tensors += [
            numpy_helper.from_array(np.float32(member.temperature), f"pool.{name}.{TEMPERATURE}"),
            numpy_helper.from_array(np.float32(np.log(weight)), f"pool.{name}.log_weight"),
        ]
        steps = ("scaled", "log_softmax", "weighted", "log")
        scaled, softmax, weighted, log = (f"pool.{name}.{step}" for step in steps)
        given = [f"{name}_{LOGITS}", f"pool.{name}.{TEMPERATURE}"]
        nodes += [
            helper.make_node("Div", given, [scaled], name=scaled),
            helper.make_node("LogSoftmax", [scaled], [softmax], name=softmax, axis=-1),
            helper.make_node(
                "Add", [softmax, f"pool.{name}.log_weight"], [weighted], name=weighted
            ),
            helper.make_node("Unsqueeze", [weighted, "pool.axis"], [log], name=log),
        ]
        logs.append(log)
    nodes += [
        helper.make_node("Concat", logs, ["pool.logs"], name="pool.logs", axis=0),
        helper.make_node(
            "ReduceLogSumExp", ["pool.logs", "pool.axis"], [LOGITS], name="pool", keepdims=0
        ),
        helper.make_node("Div", [LOGITS, TEMPERATURE], ["pool.scaled"], name="pool.scaled"),
        helper.make_node("Softmax", ["pool.scaled"], [PROBABILITIES], name="softmax", axis=-1),
    ]
    tensors += [
        numpy_helper.from_array(np.array([0], np.int64), "pool.axis"),
        numpy_helper.from_array(np.float32(1), TEMPERATURE),
    ]
    tensors = _shared(nodes, tensors)
    if is_joined:
        nodes = _joined(nodes)
    classes = members[0].graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    side = common.crop_px
    graph = helper.make_graph(
        nodes,
        "pool",
        [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["batch", side, side, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
            for name in (LOGITS, PROBABILITIES)
        ],
        tensors,
    )
    if (size := graph.ByteSize()) > _MOST_BYTES:
        raise ParamsError(
            f"the members take {size / 1e9:.1f} GB together, and an ONNX file holds "
            f"{_MOST_BYTES / 1e9:.1f} at most; expected smaller ones. Name fewer."
        )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=max(member.graph.ir_version for member in members),
    )


def _view_of(members: Sequence[Member], number: int, common: Preprocessing) -> str:
    """Return the name of the first member with the same view; empty where it takes the input."""
    member = members[number]
    if (common.short_side_px, common.crop_px) == member.view[:2]:
        return ""
    first = next(other for other, one in enumerate(members) if one.view == member.view)
    return f"view{first}"


def _view_text(member: Member, name: str, common: Preprocessing, ir_version: int) -> str:
    short, crop, interpolation = member.view
    start = round((short - crop) / 2)  # as in crop_middle
    return _VIEW.format(
        ir_version=ir_version,
        opset=OPSET,
        name=name,
        side=common.crop_px,
        short=short,
        crop=crop,
        start=start,
        end=start + crop,
        mode={"bicubic": "cubic", "bilinear": "linear"}[interpolation],
    )


def _shared(
    nodes: Sequence[onnx.NodeProto], tensors: Sequence[onnx.TensorProto]
) -> list[onnx.TensorProto]:
    """Let nodes use one of several equal tensors; return those that are left."""
    kept: dict[bytes, onnx.TensorProto] = {}
    names: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name == TEMPERATURE:  # it is set later
            kept[b""] = tensor
            continue
        nameless = onnx.TensorProto()
        nameless.CopyFrom(tensor)
        nameless.ClearField("name")
        content = hashlib.sha256(nameless.SerializeToString(deterministic=True)).digest()
        names[tensor.name] = kept.setdefault(content, tensor).name
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
    return list(kept.values())


def _joined(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes without those that do what an earlier one does to the same inputs.

    ONNX Runtime joins equal nodes too, but folds BatchNorm into each convolution before, whose
    weights are then no longer the same ones.
    """
    names: dict[str, str] = {}
    seen: dict[tuple[str, str, tuple[str, ...], tuple[bytes, ...]], onnx.NodeProto] = {}
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        attributes = sorted(one.SerializeToString(deterministic=True) for one in node.attribute)
        key = (node.domain, node.op_type, tuple(node.input), tuple(attributes))
        if (first := seen.setdefault(key, node)) is not node:
            names.update(zip(node.output, first.output, strict=True))
    return list(seen.values())


def last_inputs(
    members: Sequence[Member], common: Preprocessing, sample: Sample, threads: int
) -> list[Logits]:
    """Return what each member's last layer takes for a sample as the pool shows it to it, (N, D).

    ``sample``: cropped as ``common`` says.
    """
    equal = np.full(len(members), 1 / len(members))
    graph = merged(members, equal, common, is_joined=False)
    names = [f"m{number}_{last_layer(one.graph).input[0]}" for number, one in enumerate(members)]
    session = open_session(_showing(graph, names, TensorProto.FLOAT), threads=threads, device="cpu")
    shown = track(
        sample.batches(_BATCH),
        total=-(-len(sample.rows) // _BATCH),
        description="images held out, as the ensemble shows them",
    )
    found = [session.run(names, {IMAGES: images}) for images in shown]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def held_out_logits(member: Member, held: HeldOut, taken: Logits) -> Logits:
    """Return a member's logits (N, C) for images held out, of what its last layer takes (N, D).

    A linear probe answers by the heads of the folds that held the images out.
    """
    if held.heads:
        return out_of_fold_logits(held, taken, None)
    tensors = {tensor.name: tensor for tensor in member.graph.graph.initializer}
    weight, bias = (
        numpy_helper.to_array(tensors[name]) for name in last_layer(member.graph).input[1:3]
    )
    logits: Logits = taken @ weight.T + bias
    return logits


def _showing(graph: onnx.ModelProto, names: Sequence[str], kind: int) -> bytes:
    """Return a graph's bytes with further outputs."""
    showing = onnx.ModelProto()
    showing.CopyFrom(graph)
    known = {output.name for output in graph.graph.output}
    showing.graph.output.extend(
        helper.make_tensor_value_info(name, kind, None) for name in names if name not in known
    )
    return bytes(showing.SerializeToString())


def check_pool(
    content: bytes,
    members: Sequence[Member],
    weights: Floats,
    common: Preprocessing,
    sample: Sample,
    tolerance: float,
    threads: int,
) -> Parity:
    """Hold a pool's graph against its members, each asked alone; return how far they are apart.

    First what it shows each member against ``data.images``, in grey levels; then its logits against
    the pool of what the members' own graphs answer for the very pixels that came out, in float64.

    Raises:
        ParityError: one of them differs.
    """
    graph = onnx.load_from_string(content)
    views = [_view_of(members, number, common) for number in range(len(members))]
    shown = [f"{view}_{IMAGES}" for view in sorted({view for view in views if view})]
    session = open_session(_showing(graph, shown, TensorProto.UINT8), threads=threads, device="cpu")
    given = list(sample.batches(_BATCH))
    each = track(given, total=len(given), description="parity: the ensemble")
    results = [session.run([LOGITS, *shown], {IMAGES: images}) for images in each]
    logits, *squares = (np.concatenate(parts) for parts in zip(*results, strict=True))
    seen = dict(zip(shown, squares, strict=True)) | {IMAGES: np.concatenate(given)}
    answers = []
    for member, view in zip(members, views, strict=True):
        pixels = seen[f"{view}_{IMAGES}" if view else IMAGES]
        if view:
            _check_view(pixels, seen[IMAGES], member)
        compute = in_onnx(member.graph.SerializeToString(), threads)
        starts = range(0, len(pixels), _BATCH)
        shown_starts = track(starts, total=len(starts), description="parity: a member alone")
        alone = np.concatenate([compute(pixels[i : i + _BATCH]) for i in shown_starts])
        answers.append(log_softmax(alone, member.temperature))
    expected = mix(np.stack(answers), weights).astype(np.float32)
    parity = measure_parity(expected, logits)
    check_parity(parity, tolerance, "the ensemble's graph", "its members")
    return parity


def _check_view(shown: Pixels, stored: Pixels, member: Member) -> None:
    """Check that what a member sees is what training would have made of the stored squares."""
    sees = member.preprocessing
    ours = [np.asarray(square(Image.fromarray(one), sees)) for one in stored]
    wanted = crop_middle(np.stack(ours), sees.crop_px)
    check_levels(shown, wanted, "the ensemble's graph")
