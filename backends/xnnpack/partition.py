"""ExecuTorch's XNNPACK partitioner, with delegates that load in little memory and are lowered in little time.

A network in one delegate has all of its weights mapped while they are packed, so that loading needs twice the weights
for a moment. Delegates are cut into parts of some layers each, where the fewest bytes cross; then the weights of one
part at a time are there twice.

Where a program has other readers of its weights than layers, packed copies lie beside what these read in the file. If
memory is short, a layer of many rows reads its weight there too: a weight that is not of the delegate is an input of
it, and XNNPACK packs it anew in every call.

Inside every delegate upstream runs 17 passes, each of which interprets the whole graph again. Most of them are about
convolutions, batch norms, paddings, fused activations and constants; a delegate of linear layers, products and
elementwise operators comes out of them as it went in. The compile spec "dqlinear_partitioner", which upstream reads in
`XnnpackBackend.preprocess`, leaves one pass of them. It is the larger half of the time of lowering.
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.partitioner import Partition

from mobizo_compiler.analysis.costs import tensor_bytes

# Operators that none of the skipped passes looks at.
_PLAIN = frozenset(
    (
        "abs",
        "add",
        "bmm",
        "cos",
        "div",
        "exp",
        "gelu",
        "linear",
        "log",
        "maximum",
        "minimum",
        "mul",
        "neg",
        "permute_copy",
        "pow",
        "rsqrt",
        "sigmoid",
        "sin",
        "slice_copy",
        "_softmax",
        "sqrt",
        "square",
        "sub",
        "tanh",
        "unsqueeze_copy",
        "view_copy",
    )
)
# The pattern of a linear layer that rounds its input, for which upstream made the compile spec.
_QUANTIZED = frozenset(("choose_qparams_affine", "quantize_affine", "dequantize_affine", "getitem"))
_ONE_PASS = CompileSpec("dqlinear_partitioner", b"")


MOST_WEIGHT_BYTES = 48 << 20  # of a delegate, but for a layer that is larger by itself
FEWEST_BYTES_IN_PLACE = 1 << 16
FEWEST_ROWS_IN_PLACE = 128  # packing a weight takes the time of some 45 rows of its product (x86-64, AVX-512)


class FrugalXnnpackPartitioner(XnnpackPartitioner):  # type: ignore[misc]
    """As the one of ExecuTorch, with smaller delegates and fewer passes in them.

    Args:
        in_place: Layers of many rows read their weights in the file in every call, instead of a packed copy in memory.
    """

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """One delegate for all that can run at the same time, cut where its weights are large."""
        order = {node: position for position, node in enumerate(ep.graph.nodes)}
        matches = [match for match in self.get_matched_nodes_from_configs(ep) if not any(map(_shares_a_norm, match))]
        outside = _read_in_place(matches) if self.in_place else set()
        matches = [[node for node in match if node not in outside] for match in matches]
        together = [[node for node in match if node.op == "call_function"] for match in matches]
        members: dict[int, list[fx.Node]] = {}
        for node, stage in stages(list(ep.graph.nodes), together).items():
            members.setdefault(stage, []).append(node)
        constants = {node for match in matches for node in match if node.op != "call_function"}
        parts: list[list[fx.Node]] = []
        for stage in sorted(members):
            calls = sorted(members[stage], key=order.__getitem__)
            for part in _parts(calls, together, outside):
                used = {inner for node in part for inner in node.all_input_nodes}
                # A constant goes to its first user; ExecuTorch copies the node for users in other delegates.
                parts.append([*sorted(constants & used, key=order.__getitem__), *part])
                constants -= used
        return [Partition(id=number, nodes=part) for number, part in enumerate(parts)]

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Partition, and mark the delegates that one pass is enough for."""
        result = super().partition(exported_program)
        members: dict[str, list[fx.Node]] = {}
        for node in result.tagged_exported_program.graph.nodes:
            if node.op == "call_function" and "delegation_tag" in node.meta:
                members.setdefault(node.meta["delegation_tag"], []).append(node)
        result.partition_tags = {
            tag: DelegationSpec(spec.backend_id, [*spec.compile_specs, _ONE_PASS])
            if all(map(_is_plain, members.get(tag, [])))
            else spec
            for tag, spec in result.partition_tags.items()
        }
        return result


def _shares_a_norm(node: fx.Node) -> bool:
    """Whether a batch norm has weights that others read too, as its derivative does.

    Upstream makes a convolution of it and takes its weights away, and the delegate crashes when it runs (1.5.1).
    """
    norm = node.op == "call_function" and "batch_norm" in str(node.target)
    return norm and any(inner.op == "placeholder" and len(inner.users) > 1 for inner in node.all_input_nodes)


def _read_in_place(matches: list[list[fx.Node]]) -> set[fx.Node]:
    """The weights and biases of layers in float32 that compute for longer than XNNPACK packs their weights.

    XNNPACK reads both as they were given, or neither: what it has packed is freed. So a layer keeps its own where
    another reader in a delegate does.
    """
    delegated = {node for match in matches for node in match if node.op == "call_function"}
    layers = {node for node in delegated if _pays_in_place(node)}
    while True:
        left = {
            layer
            for layer in layers
            if all(delegated & inner.users.keys() <= layers for inner in layer.all_input_nodes[1:])
        }
        if left == layers:
            return {inner for layer in layers for inner in layer.all_input_nodes[1:]}
        layers = left


def _pays_in_place(node: fx.Node) -> bool:
    if _operator(node) != "linear":
        return False
    constants = node.all_input_nodes[1:]
    weight, (*rows, _) = constants[0], node.meta["val"].shape
    return (
        all(inner.op == "placeholder" and inner.meta["val"].dtype == torch.float32 for inner in constants)
        and tensor_bytes(weight) >= FEWEST_BYTES_IN_PLACE
        and all(isinstance(size, int) for size in rows)
        and math.prod(rows) >= FEWEST_ROWS_IN_PLACE
    )


def stages(nodes: list[fx.Node], together: list[list[fx.Node]]) -> dict[fx.Node, int]:
    """How many times the work has to leave delegates before a node can run in one.

    Nodes of one stage make one delegate: what they need of other stages is computed before any of them. Upstream merges
    nodes with their neighbours instead, which splits a network of patterns into two delegates a layer.

    Args:
        nodes: The graph, in order.
        together: The nodes that a delegate can run, in groups that must not be parted.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> a, b = graph.call_function(abs, (x,)), graph.call_function(round, (x,))
    >>> c = graph.call_function(min, (a, b))
    >>> d = graph.call_function(max, (graph.call_function(round, (c,)), a))
    >>> list(stages(list(graph.nodes), [[a], [c], [d]]).values())
    [0, 0, 1]
    """
    group = {node: number for number, members in enumerate(together) for node in members}
    of_group = [0] * len(together)
    outside: dict[fx.Node, int] = {}
    for _ in range(len(nodes)):
        before = list(of_group)
        for node in nodes:
            needs = [of_group[group[n]] + (node not in group) for n in node.all_input_nodes if n in group]
            needs += [outside[n] for n in node.all_input_nodes if n in outside]
            if node in group:
                of_group[group[node]] = max([of_group[group[node]], *needs])
            else:
                outside[node] = max(needs, default=0)
        if of_group == before:
            break
    _as_late_as_pays(nodes, together, group, of_group, outside)
    return {node: of_group[number] for node, number in group.items()}


def _as_late_as_pays(
    nodes: list[fx.Node],
    together: list[list[fx.Node]],
    group: dict[fx.Node, int],
    of_group: list[int],
    outside: dict[fx.Node, int],
) -> None:
    """Move what is read in later stages alone to the first of these, unless more bytes would wait for it than it makes.

    A view of a value that is kept anyway would be kept beside it, from one delegate to another.
    """

    def stage(node: fx.Node) -> int:
        if node in group:
            return of_group[group[node]]
        return outside[node] - 1  # it runs before the stage that could read it

    place = {node: index for index, node in enumerate(nodes)}
    readers = {node: [user for user in node.users if user.op != "output"] for node in nodes}
    returned = {inner for node in nodes if node.op == "output" for inner in node.all_input_nodes}
    own = [[node for node in members if group[node] == number] for number, members in enumerate(together)]
    last = [max((place[node] for node in members), default=0) for members in own]
    for number in sorted(range(len(together)), key=last.__getitem__, reverse=True):
        members = set(own[number])
        made = [node for node in own[number] if any(user not in members for user in node.users)]
        users = [user for node in made for user in readers[node] if user not in members]
        if not users or returned & members:
            continue
        later = min(map(stage, users))
        inputs = {inner for node in members for inner in node.all_input_nodes if inner not in members}
        wait = [
            inner
            for inner in inputs
            if inner.op == "call_function"
            and all(stage(user) < later for user in readers[inner] if user not in members)
        ]
        if later > of_group[number] and sum(map(tensor_bytes, wait)) <= sum(map(tensor_bytes, made)):
            of_group[number] = later


def _parts(nodes: list[fx.Node], together: list[list[fx.Node]], outside: set[fx.Node]) -> list[list[fx.Node]]:
    """Neighbouring nodes, in order, in groups of limited weights, with few bytes from one group to the next.

    Args:
        nodes: The nodes.
        together: Groups that must not be parted.
        outside: Weights that no delegate packs.
    """
    position = {node: index for index, node in enumerate(nodes)}
    inside: set[int] = set()  # cuts that would part what must stay together
    for members in together:
        places = [position[node] for node in members if node in position]
        inside.update(range(min(places, default=0) + 1, max(places, default=0) + 1))
    weights = [0]
    live = [0]
    seen = set(outside)
    end = {inner: index for index, node in enumerate(nodes) for inner in node.all_input_nodes}
    ending: dict[int, int] = {}
    for index, node in enumerate(nodes):
        new = [inner for inner in node.all_input_nodes if inner.op == "placeholder" and inner not in seen]
        seen.update(new)
        weights.append(weights[-1] + sum(map(tensor_bytes, new)))
        last = end.get(node, len(nodes))
        ending[last] = ending.get(last, 0) + tensor_bytes(node)
        live.append(live[-1] + tensor_bytes(node) - ending.get(index, 0))
    cuts = [0]
    while weights[-1] - weights[cuts[-1]] > MOST_WEIGHT_BYTES:
        spent = {p: total - weights[cuts[-1]] for p, total in enumerate(weights) if p > cuts[-1] and p not in inside}
        window = [p for p, s in spent.items() if MOST_WEIGHT_BYTES / 2 <= s <= MOST_WEIGHT_BYTES]
        first = next((p for p, s in spent.items() if s > MOST_WEIGHT_BYTES / 2), len(nodes))
        cuts.append(min(window, key=live.__getitem__) if window else first)
    return [nodes[start:stop] for start, stop in itertools.pairwise([*cuts, len(nodes)]) if start < stop]


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    if target is operator.getitem:
        return "getitem"
    name: str = target._op._schema.name
    return name.rpartition("::")[2]


def _is_plain(node: fx.Node) -> bool:
    """The node is left alone by every pass but the one that stays. What is constant would be computed by another."""
    name = _operator(node)
    if name in _QUANTIZED:
        return True
    short_cat = name == "cat" and len(node.all_input_nodes) <= 5
    # A placeholder without a tag stays outside of the delegate and is one of its inputs.
    varies = any(inner.op == "call_function" or "delegation_tag" not in inner.meta for inner in node.all_input_nodes)
    return (name in _PLAIN or short_cat) and varies
