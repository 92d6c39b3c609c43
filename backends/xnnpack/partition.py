"""ExecuTorch's XNNPACK partitioner, with delegates that load in little memory and are lowered in little time.

A network in one delegate has all of its weights mapped while they are packed, so that loading needs twice the weights
for a moment. Delegates are cut into parts of some layers each, where the fewest bytes cross; then the weights of one
part at a time are there twice.

Inside every delegate upstream runs 17 passes, each of which interprets the whole graph again. Most of them are about
convolutions, batch norms, paddings, fused activations and constants; a delegate of linear layers, products and
elementwise operators comes out of them as it went in. The compile spec "dqlinear_partitioner", which upstream reads in
`XnnpackBackend.preprocess`, leaves one pass of them. It is the larger half of the time of lowering.
"""

from __future__ import annotations

import itertools
from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.partitioner import Partition

from mobizo_compiler.costs import tensor_bytes

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
_ONE_PASS = CompileSpec("dqlinear_partitioner", b"")


MOST_WEIGHT_BYTES = 48 << 20  # of a delegate, but for a layer that is larger by itself


class FrugalXnnpackPartitioner(XnnpackPartitioner):  # type: ignore[misc]
    """As the one of ExecuTorch, with smaller delegates and fewer passes in them."""

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """Cut the partitions whose weights are large."""
        order = {node: position for position, node in enumerate(ep.graph.nodes)}
        parts: list[list[fx.Node]] = []
        for partition in super().generate_partitions(ep):
            nodes = sorted(partition.nodes, key=order.__getitem__)
            calls = [node for node in nodes if node.op == "call_function"]
            if not all(map(_may_stand_alone, calls)):
                parts.append(nodes)
                continue
            for part in _parts(calls):
                used = {inner for node in part for inner in node.all_input_nodes}
                # A constant goes to its first user; ExecuTorch copies the node for users in other delegates.
                constants = [node for node in nodes if node.op == "placeholder" and node in used]
                parts.append(constants + part)
                nodes = [node for node in nodes if node not in constants]
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


def _parts(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Neighbouring nodes, in order, in groups of limited weights, with few bytes from one group to the next."""
    weights = [0]
    live = [0]
    seen: set[fx.Node] = set()
    end = {inner: position for position, node in enumerate(nodes) for inner in node.all_input_nodes}
    ending: dict[int, int] = {}
    for position, node in enumerate(nodes):
        new = [inner for inner in node.all_input_nodes if inner.op == "placeholder" and inner not in seen]
        seen.update(new)
        weights.append(weights[-1] + sum(map(tensor_bytes, new)))
        last = end.get(node, len(nodes))
        ending[last] = ending.get(last, 0) + tensor_bytes(node)
        live.append(live[-1] + tensor_bytes(node) - ending.get(position, 0))
    cuts = [0]
    while weights[-1] - weights[cuts[-1]] > MOST_WEIGHT_BYTES:
        spent = [total - weights[cuts[-1]] for total in weights]
        window = [p for p, s in enumerate(spent) if p > cuts[-1] and MOST_WEIGHT_BYTES / 2 <= s <= MOST_WEIGHT_BYTES]
        first = next(p for p, s in enumerate(spent) if p > cuts[-1] and s > MOST_WEIGHT_BYTES / 2)
        cuts.append(min(window, key=live.__getitem__) if window else first)
    return [nodes[start:stop] for start, stop in itertools.pairwise([*cuts, len(nodes)]) if start < stop]


def _may_stand_alone(node: fx.Node) -> bool:
    """Whether a node is an operator of its own for the delegate, not part of a pattern of several nodes."""
    return _operator(node) in _PLAIN | {"cat"}


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    name: str = target._op._schema.name
    return name.rpartition("::")[2]


def _is_plain(node: fx.Node) -> bool:
    """The node is left alone by every pass but the one that stays. What is constant would be computed by another."""
    name = _operator(node)
    short_cat = name == "cat" and len(node.all_input_nodes) <= 5
    # A placeholder without a tag stays outside of the delegate and is one of its inputs.
    varies = any(inner.op == "call_function" or "delegation_tag" not in inner.meta for inner in node.all_input_nodes)
    return (name in _PLAIN or short_cat) and varies
