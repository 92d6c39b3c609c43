"""Write the sums of the update as additions, so that `replay` adds in the order of the step.

Given:    %p = mul(%noise, %g)                  : f32[5, P]
          %s = sum(%p, [0])                     : f32[P]
Result:   %h = add(slice(%p, 0, 0, 2), slice(%p, 0, 2, 4))
          %k = add(slice(%h, 0, 0, 1), slice(%h, 0, 1, 2))
          %s = reshape(add(%k, slice(%p, 0, 4, 5)), [P])
Numbers: same up to rounding.

Inductor makes a loop of a sum, and on a GPU it picks the tile of the loop, and so the order, by timing it; two methods
with the same sum then differ in the last bit. Additions stay in the order in which they are written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors, operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SumsInOrder(Pass):
    """Replace sums and means over one axis that come after the projected gradient and reach the state."""

    needs = frozenset({facts.STATIC})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Nothing to do in methods that keep the state."""
        for node in update_calls(edit):
            if node.target not in (aten.sum.dim_IntList, aten.mean.dim):
                continue
            axes: Any = node.args[1]
            source = operand(node)
            rank = source.meta["val"].dim()
            if len(axes) != 1 or not isinstance(source.meta["val"].shape[axes[0]], int):
                continue
            with edit.graph.inserting_before(node):
                total = _added(edit, source, axes[0] % rank)
                if node.target is aten.mean.dim:
                    total = edit.call(aten.mul.Tensor, total, 1.0 / source.meta["val"].shape[axes[0]])
                if total.meta["val"].shape != node.meta["val"].shape:
                    total = edit.call(aten.reshape.default, total, list(node.meta["val"].shape))
            edit.replace(node, total)


def update_calls(edit: Editor) -> list[fx.Node]:
    """The calls that make the new state out of the old one, the noise and the projected gradient, in order."""
    new = edit.new_state
    if new is None:
        return []
    gradient = edit.outputs.get("projected_gradient")
    before = ancestors([gradient]) if gradient is not None else set()
    wanted = ancestors([new]) - before
    return [node for node in edit.graph.nodes if node in wanted and node.op == "call_function"]


def _added(edit: Editor, source: fx.Node, axis: int) -> fx.Node:
    """The sum over an axis, which stays with size 1: halves are added until one entry is left, odd ones at the end."""
    count, left = int(source.meta["val"].shape[axis]), []
    value = source
    while count > 1:
        half = count // 2
        if count % 2:
            left.append(edit.call(aten.slice.Tensor, value, axis, count - 1, count))
        first = edit.call(aten.slice.Tensor, value, axis, 0, half)
        second = edit.call(aten.slice.Tensor, value, axis, half, 2 * half)
        value, count = edit.call(aten.add.Tensor, first, second), half
    for entry in left:
        value = edit.call(aten.add.Tensor, value, entry)
    return value
