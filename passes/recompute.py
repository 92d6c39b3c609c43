"""Compute values of the forward pass again where the backward pass reads them, so that fewer are kept until then.

Given:    %h = linear(%x, %p_w)   %s = sigmoid(%h)   %y = mul(%h, %s)   ...   %loss = ...
          %gh = ... of %gy, %h and %s
Result:   %h = linear(%x, %p_w)   %s = sigmoid(%h)   %y = mul(%h, %s)   ...   %loss = ...
          %h_1 = linear(%x, %p_w) %s_1 = sigmoid(%h_1)
          %gh = ... of %gy, %h_1 and %s_1
Numbers: exact.

What is kept is chosen by `mobizo_compiler.analysis.checkpoints`, with the least work that keeps the bound. An engine
that frees a value behind its last reader then has less to hold; what comes after this pass must not merge equal calls.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from mobizo_compiler.analysis.checkpoints import order, plan, value_of
from mobizo_compiler.analysis.costs import si, tensor_bytes
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors
from mobizo_compiler.graph.pipeline import Pass


@dataclasses.dataclass(frozen=True)
class Recompute(Pass):
    """Keep the live values of forward and backward pass below a bound.

    Args:
        most_bytes: The bound.

    Raises:
        ConfigError: There is no way to keep it; the message says how little there can be.
    """

    most_bytes: int
    needs = frozenset({facts.GRADIENT, facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """Copy the chosen calls to where they are read."""
        forward, backward = _passes(edit)
        position = {node: index for index, node in enumerate(forward)}
        place = {node: index for index, node in enumerate(backward)}
        values = [value_of(node, _among(node, position), any(user in place for user in node.users)) for node in forward]
        reads = [(tensor_bytes(node), _among(node, position), _among(node, place)) for node in backward]
        found = plan(values, reads, self.most_bytes)
        if found.peak > self.most_bytes:
            raise ConfigError(
                f"activation_memory_bytes is {si(self.most_bytes)}B; the exact gradient needs {si(found.peak)}B",
                hint="allow more, or give the step fewer rows or tokens, or adapt only the last blocks "
                "(LoraConfig.layers_to_transform)",
            )
        for index, again in order(reads, found.again).items():
            copies: dict[fx.Node, fx.Node] = {}
            with edit.graph.inserting_before(backward[index]):
                for number in again:
                    copy = edit.graph.node_copy(forward[number], lambda inner: copies.get(inner, inner))  # noqa: B023
                    copy.meta = dict(forward[number].meta)
                    copies[forward[number]] = copy
            for node, copy in copies.items():
                for user in [user for user in node.users if user in place]:
                    user.replace_input_with(node, copy)


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
