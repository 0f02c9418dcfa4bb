"""Cut a network into ordered, named stages that run one after the other.

The network is traced once, by its modules: what repeats, such as a residual block, stays whole.
Wherever one tensor is all that goes on, it can be cut; neighbouring parts are then put together as
the network's own module names group them, or by resolution where the names are one long list.
Every stage has weights to train: what only pools, reshapes or normalises belongs to its neighbour.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from inspect import signature
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, fx, nn

from tlpipe.errors import WeightsError

STEM, FEATURES = "stem", "features"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# More single modules than this in a row are a list of layers, not a list of stages.
_MOST_SINGLE = 8
_LEAST_RESOLUTIONS = 3
# What torchvision's own training (references/classification) spares, in networks that say nothing.
_NO_WEIGHT_DECAY = ("*class_token", "*pos_embedding", "*relative_position_bias_table")


def cut(network: nn.Module, side_px: int) -> nn.Sequential:
    """Return a network as a sequence of named stages, in evaluation mode.

    ``network``: from (B, 3, H, W) float32 to features (B, D); ``side_px``: H and W that it takes.
    Modules and parameters stay the network's own, under their own names. What its code decides
    outside of modules is decided once, as in evaluation: an auxiliary output is left out.
    Each stage has ``no_weight_decay``, the names of its parameters that should not decay beside
    biases and vectors: those that the network names itself, as timm's do.

    Raises:
        WeightsError: its code cannot be traced or run, has no blocks, or ends in something else.
    """
    try:
        return _cut(network.eval(), side_px)
    except WeightsError:
        raise
    except Exception as error:  # tracing runs any code of the network
        line = str(error).strip().partition("\n")[0][:160]
        raise WeightsError(
            f"{type(network).__name__} cannot be cut into stages ({type(error).__name__}: {line}); "
            f"expected a network of blocks, for images of {side_px} px, whose steps do not depend "
            f"on the image. Choose another backbone."
        ) from error


def _cut(network: nn.Module, side_px: int) -> nn.Sequential:
    traced = _trace(network)
    parts = _parts(traced)
    shapes = _shapes(traced, side_px)
    if len(last := shapes[parts[-1].nodes[-1]]) != 2:
        raise WeightsError(
            f"{type(network).__name__} ends in {last}; expected one row of features per image. "
            f"Choose another backbone."
        )
    named = zip(_names(parts, shapes, network), parts, strict=True)
    groups = [
        (name, [node for _, part in group for node in part.nodes])
        for name, group in groupby(named, key=lambda pair: pair[0])
    ]
    incoming = next(node for node in traced.graph.nodes if node.op == "placeholder")
    spared = list(getattr(network, "no_weight_decay", lambda: _NO_WEIGHT_DECAY)())
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for name, nodes in _with_weights(groups, traced):
        stages[name] = stage = _stage(traced, incoming, nodes)
        stage.no_weight_decay = _matching(stage, spared)  # type: ignore[assignment]
        incoming = nodes[-1]
    return nn.Sequential(stages).eval()


def _with_weights(
    groups: Sequence[tuple[str, list[fx.Node]]], traced: fx.GraphModule
) -> list[tuple[str, list[fx.Node]]]:
    """Put operations without weights, and mere normalisation, to the stage before them.

    At the start they go to the stage behind them. What is trained "from the last stage on" would
    otherwise be a pooling in a ResNet, and the 1,536 numbers of a LayerNorm in a ConvNeXt.
    """
    stages: list[tuple[str, list[fx.Node]]] = []
    pending: list[fx.Node] = []
    for name, nodes in groups:
        if any(_has_weights(node, traced) for node in nodes):
            stages.append((name, [*pending, *nodes]))
            pending = []
        elif stages:
            stages[-1][1].extend(nodes)
        else:
            pending.extend(nodes)
    return stages


def _has_weights(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Return whether an operation has a parameter of more than one dimension."""
    if node.op == "call_module":
        return _layers(traced, str(node.target)) > 0
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        found = getattr(traced.get_submodule(path), name)
        return isinstance(found, nn.Parameter) and found.dim() > 1
    return False


@dataclass(frozen=True)
class _Part:
    """Neighbouring operations, of one tensor into one."""

    nodes: tuple[fx.Node, ...]

    @property
    def paths(self) -> list[str]:
        """The names of its modules."""
        return [str(node.target) for node in self.nodes if node.op == "call_module"]

    @property
    def path(self) -> tuple[str, ...]:
        """The name of its first module in parts, or nothing."""
        return tuple(self.paths[0].split(".")) if self.paths else ()


class _Tracer(fx.Tracer):
    """Keeps whole what torch brings, what has nothing inside, and what the network repeats."""

    def __init__(self, repeated: set[type[nn.Module]]) -> None:
        super().__init__(param_shapes_constant=True)
        self._repeated = repeated

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        if type(m) in _CONTAINERS:
            return False
        from_torch = m.__module__.startswith("torch.nn")
        return from_torch or type(m) in self._repeated or not any(m.children())


def _repeated(network: nn.Module) -> set[type[nn.Module]]:
    counts = Counter(type(module) for module in network.modules())
    return {kind for kind, count in counts.items() if count > 1 and kind not in _CONTAINERS}


def _trace(network: nn.Module) -> fx.GraphModule:
    _, *others = signature(network.forward).parameters.values()
    defaults = {p.name: p.default for p in others if p.default is not p.empty}
    tracer = _Tracer(_repeated(network))
    graph = tracer.trace(network, concrete_args=defaults)
    traced = fx.GraphModule(network, graph)
    # fx checks at each call that what was fixed has its default: no stage needs that.
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return traced


def _parts(traced: fx.GraphModule) -> list[_Part]:
    """Cut after every operation behind which a single tensor is still needed."""
    position = {node: i for i, node in enumerate(traced.graph.nodes)}
    last_use = {n: max((position[user] for user in n.users), default=0) for n in position}
    parts: list[_Part] = []
    current: list[fx.Node] = []
    needed: set[fx.Node] = set()
    for node, here in position.items():
        # A parameter that was fetched and not yet used counts too: it must stay with its use.
        needed = {n for n in (*needed, node) if last_use[n] > here}
        if node.op in ("placeholder", "output"):
            continue
        current.append(node)
        is_end = node.next.op == "output"
        if is_end or (needed == {node} and node.op != "get_attr"):
            parts.append(_Part(tuple(current)))
            current = []
    return parts


def _stage(traced: fx.GraphModule, incoming: fx.Node, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {incoming: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(traced, graph)


def _matching(stage: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Return the names of the stage's parameters that match one of the patterns."""
    names = (name for name, _ in stage.named_parameters())
    return frozenset(n for n in names if any(fnmatch(n, pattern) for pattern in patterns))


def _shapes(traced: fx.GraphModule, side_px: int) -> dict[fx.Node, tuple[int, ...]]:
    """Return the shape of every operation's result for one image, by running it once."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n] = tuple(result.shape)
            return result

    device = next(traced.parameters()).device
    with torch.inference_mode():
        Noting(traced).run(torch.zeros(1, 3, side_px, side_px, device=device))
    return shapes


def _names(
    parts: Sequence[_Part], shapes: Mapping[fx.Node, tuple[int, ...]], network: nn.Module
) -> list[str]:
    """Return the name of the stage that each part belongs to."""
    made = [shapes[part.nodes[-1]] for part in parts]
    spatial = [i for i, shape in enumerate(made) if len(shape) > 2]
    repeated = _repeated(network)
    blocks = [i for i in spatial if _has_block(parts[i], network, repeated)]
    is_list = not blocks  # of plain convolutions
    if is_list:
        blocks = [i for i in spatial if any(_layers(network, path) for path in parts[i].paths)]
    if not blocks:
        raise WeightsError(
            f"{type(network).__name__} has no layer that gives a map or tokens of the image; "
            f"expected a network of such blocks. Choose another backbone."
        )
    opened = _opened([parts[i].path for i in blocks])
    paths = [_key(part.path, opened) for part in parts]
    first = blocks[0]
    beside = paths[first][:-1]
    # Blocks that the network does not repeat, and which therefore were not kept whole.
    others = [
        i
        for i in spatial
        if i < first and paths[i] and paths[i][:-1] == beside and _layers(network, *paths[i]) > 1
    ]
    blocks = others + blocks
    keys = [paths[i] for i in blocks]
    if is_list or len(set(keys)) > _MOST_SINGLE:
        keys = _by_resolution(keys, [made[i] for i in blocks])
    plain = [_name(key) for key in keys]
    names = plain if len({*plain}) == len({*keys}) else ["_".join(key) for key in keys]
    # What stands between two blocks, such as a reduction, belongs to the later one.
    by_block = dict(zip(blocks, names, strict=True))
    between = [by_block[min(b for b in blocks if b >= i)] for i in range(blocks[0], blocks[-1] + 1)]
    return [STEM] * blocks[0] + between + [FEATURES] * (len(parts) - 1 - blocks[-1])


def _opened(paths: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return the modules that hold nearly all blocks, so that what is in them makes the stages."""
    opened: set[tuple[str, ...]] = set()
    while True:
        counts = Counter(_key(path, opened) for path in paths)
        (largest, count), *others = counts.most_common()
        if others and (len(others) > 2 or count < 0.6 * len(paths)):
            return opened
        if all(path == largest for path in paths):
            return opened
        opened.add(largest)


def _key(path: tuple[str, ...], opened: set[tuple[str, ...]]) -> tuple[str, ...]:
    depth = 1
    while path[:depth] in opened:
        depth += 1
    return path[:depth]


def _has_block(part: _Part, network: nn.Module, repeated: set[type[nn.Module]]) -> bool:
    """Return whether it has a module of several layers that the network repeats."""
    return any(
        type(network.get_submodule(path)) in repeated and _layers(network, path) > 1
        for path in part.paths
    )


def _layers(network: nn.Module, *path: str) -> int:
    """Return how many layers with weights a module has."""
    module = network.get_submodule(".".join(path))
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _by_resolution(
    keys: Sequence[tuple[str, ...]], made: Sequence[tuple[int, ...]]
) -> list[tuple[str, ...]]:
    """Put blocks of one resolution together, under the name of the last; or leave all as they are.

    ``made``: the shapes of their results, images as (1, C, H, W).
    """
    sides = [shape[-1] if len(shape) == 4 else 0 for shape in made]
    groups = [len(list(group)) for _, group in groupby(sides)]
    if len(groups) < _LEAST_RESOLUTIONS:
        return list(keys)
    ends = list(accumulate(groups))
    return [keys[end - 1] for end, count in zip(ends, groups, strict=True) for _ in range(count)]


def _name(key: Sequence[str]) -> str:
    """Return ``layer1`` of ``layer1``, and ``blocks0`` of ``encoder.blocks.0``."""
    return key[-1] if not key[-1].isdigit() else "".join(key[-2:])
