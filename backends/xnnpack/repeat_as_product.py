"""Write the repetition of rows as a product that broadcasts, which XNNPACK takes and `repeat` it does not.

Given:    %r = repeat(%x, [8, 1, 1])                       : f32[8*rows, 5, 12]
Result:   tensor %b_mobizo_ones_8: f32[8, 1, 1, 1], every element 1
          %y = mul(reshape(%x, [1, rows, 5, 12]), %b_mobizo_ones_8)
          %r = reshape(%y, [8*rows, 5, 12])
Numbers: exact.

Inputs of a program stay outside of delegates anyway, and their repetition with them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
MOST_AXES = 6  # of a value in XNNPACK


@dataclasses.dataclass(frozen=True)
class RepeatAsProduct(Pass):
    """Replace float32 repetitions along the first axis of what the program computes."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """One constant serves all values with as many axes."""
        constants: dict[tuple[int, ...], fx.Node] = {}
        for node in edit.calls(aten.repeat.default):
            source, times = operand(node), node.args[1]
            value = source.meta["val"]
            assert isinstance(times, (list, tuple))
            first_axis = len(times) == value.dim() < MOST_AXES and all(t == 1 for t in times[1:])
            computed = source.op == "call_function" and value.dtype == torch.float32
            count = times[0]
            if not first_axis or not computed or not isinstance(count, int):
                continue
            shape = (count, *[1] * value.dim())
            if shape not in constants:
                name = f"mobizo_ones_{count}_{value.dim()}"
                constants[shape] = edit.add_constant(name, torch.ones(shape))
            with edit.graph.inserting_before(node):
                one = edit.call(aten.reshape.default, source, [1, *edit.sizes(source)])
                all_lanes = edit.call(aten.mul.Tensor, one, constants[shape])
                edit.replace(node, edit.call(aten.reshape.default, all_lanes, [-1, *edit.sizes(source)[1:]]))
