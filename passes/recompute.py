"""Compute values of the forward pass again where the backward pass reads them, so that fewer are kept until then.

Given:    %h = linear(%x, %p_w)   %s = sigmoid(%h)   %y = mul(%h, %s)   ...   %loss = ...
          %gh = ... of %gy, %h and %s
Result:   %h = linear(%x, %p_w)   %s = sigmoid(%h)   %y = mul(%h, %s)   ...   %loss = ...
          %late = eq(one number of %gy, the same)     %x_1 = where(%late, %x, %x)
          %h_1 = linear(%x_1, %p_w) %s_1 = sigmoid(%h_1)
          %gh = ... of %gy, %h_1 and %s_1
Numbers: exact.

What is kept is chosen by `mobizo_compiler.analysis.checkpoints`, with the least work that keeps the bound. An engine
that frees a value behind its last reader then has less to hold. It might as well compute the copies at once, or find
that they are equal to what there is; so they start from values that seem to depend on the backward pass, as behind an
optimization barrier: whatever the condition is, both sides of the `where` are the value.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, fx

from mobizo_compiler.analysis.checkpoints import Backward, Plan, order, plan, value_of
from mobizo_compiler.analysis.costs import si, tensor_bytes
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram

aten = torch.ops.aten

# What an engine plans is larger than what is live in the graph: backends make views into copies, repeat heads and
# change layouts, and values lie beside each other with gaps. On XNNPACK it was up to 1.37 times as large.
PLANNED = 1.45


@dataclasses.dataclass(frozen=True)
class Recompute(Pass):
    """Keep the live values of forward and backward pass below a bound.

    Args:
        most_bytes: The bound of what the engine may plan for them.

    Raises:
        ConfigError: There is no way to keep it; the message says how little there can be.
    """

    most_bytes: int
    needs = frozenset({facts.GRADIENT, facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """Copy the chosen calls to where they are read."""
        position, place, reads, found = _planned(edit, self.most_bytes)
        forward, backward = list(position), list(place)
        if (fewest := _bytes(found)) > self.most_bytes:
            raise ConfigError(
                f"activation_memory_bytes is {si(self.most_bytes)}B; the exact gradient needs {si(fewest)}B",
                hint="allow more, or give the step fewer rows or tokens, or adapt only the last blocks "
                "(LoraConfig.layers_to_transform)",
            )
        for index, again in order(reads, found.again).items():
            arrived = (
                next((node for node in backward[index - 1 :: -1] if _depends(node, place)), None) if index else None
            )
            with edit.graph.inserting_before(backward[index]):
                copies = _copied(edit, [forward[number] for number in again], arrived, position)
            for node, copy in copies.items():
                for user in [user for user in node.users if user in place]:
                    user.replace_input_with(node, copy)


def fewest_bytes(program: GraphProgram, most_bytes: int) -> int:
    """What the engine plans with the least work that keeps a bound, or, where none keeps it, the fewest bytes."""
    return _bytes(_planned(Editor(program), most_bytes)[3])


def _planned(edit: Editor, most_bytes: int) -> tuple[dict[fx.Node, int], dict[fx.Node, int], Backward, Plan]:
    """The places of the calls in each pass, in order, what the backward pass reads, and what is computed again."""
    forward, backward = _passes(edit)
    position = {node: index for index, node in enumerate(forward)}
    place = {node: index for index, node in enumerate(backward)}
    values = [value_of(node, _among(node, position), any(user in place for user in node.users)) for node in forward]
    reads = [(tensor_bytes(node), _among(node, position), _among(node, place)) for node in backward]
    return position, place, reads, plan(values, reads, int(most_bytes / PLANNED))


def _bytes(found: Plan) -> int:
    return math.ceil(found.peak * PLANNED)


def _copied(
    edit: Editor, nodes: list[fx.Node], arrived: fx.Node | None, position: dict[fx.Node, int]
) -> dict[fx.Node, fx.Node]:
    """Copies of calls, which cannot run before a value of the backward pass is there, at the insertion point."""
    copies: dict[fx.Node, fx.Node] = {}
    late: dict[fx.Node, fx.Node] = {}
    if arrived is not None:
        is_there, inside = edit.inline(_equals_itself, arrived), set(nodes)
        for inner in dict.fromkeys(inner for node in nodes for inner in node.all_input_nodes):
            if inner in position and inner not in inside:
                late[inner] = edit.call(aten.where.self, is_there, inner, inner)
    for node in nodes:
        copies[node] = edit.graph.node_copy(node, lambda inner: copies.get(inner, late.get(inner, inner)))
        copies[node].meta = dict(node.meta)
    return copies


def _equals_itself(value: Tensor) -> Tensor:
    """Whether the first number of a value is one, bool [1]."""
    for axis in range(value.dim()):
        value = aten.slice.Tensor(value, axis, 0, 1)
    first_1 = value.reshape(1)
    return torch.eq(first_1, first_1)


def _depends(node: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether a call of the backward pass reads another one, and makes real numbers."""
    value = node.meta["val"]
    real = isinstance(value, Tensor) and value.dtype.is_floating_point and value.numel() > 0
    return real and any(inner in place for inner in node.all_input_nodes)


def _passes(edit: Editor) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls of both passes, in order, without those that are made of weights alone."""
    before = ancestors([edit.outputs["loss"]])
    behind = ancestors([edit.outputs["gradient"]]) - before
    tensors = set(edit.tensors) - {edit.state}
    calls = []
    constant = set(tensors)
    for node in edit.graph.nodes:
        if node.op == "call_function":
            if node.all_input_nodes and all(inner in constant for inner in node.all_input_nodes):
                constant.add(node)
            else:
                calls.append(node)
    return [node for node in calls if node in before], [node for node in calls if node in behind]


def _among(node: fx.Node, positions: dict[fx.Node, int]) -> tuple[int, ...]:
    return tuple(positions[inner] for inner in node.all_input_nodes if inner in positions)
