"""Repeat the rows of the inputs once per lane, and let every lane have its own copy of B (MobiZO, section 3.2).

Given:    input %ids: i64[rows, 5]        %lanes = view(%state, [1, P])
Result:   input %ids: i64[rows, 5]        %repeat = repeat(%ids, [G, 1]) : i64[G*rows, 5]
          %lanes = view(%state, [1, P])   %expand = expand(%lanes, [G, P])
Numbers: exact; every lane computes what the program computed before.

Rows are lane-major: rows 0..b-1 belong to lane 0, and so on. Lanes are +1..+q, then -1..-q; that they differ is the
work of the next pass. This is outer-loop and inner-loop parallelism: one forward computes all G = 2q losses.
"""

from __future__ import annotations

import dataclasses

import torch

from mobizo_compiler import facts
from mobizo_compiler.editor import Editor
from mobizo_compiler.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class DuplicateLanes(Pass):
    """Repeat the rows `lanes` times."""

    lanes: int
    needs = frozenset({facts.ANY_ROWS, facts.SITES})
    gives = frozenset({facts.LANES})

    def rewrite(self, edit: Editor) -> None:
        """Insert the repeats at the inputs and recompute all shapes."""
        first_call = next(node for node in edit.graph.nodes if node.op != "placeholder")
        with edit.graph.inserting_before(first_call):
            for name, axis in edit.rows.items():
                node = edit.inputs[name]
                sizes = [self.lanes if a == axis else 1 for a in range(node.meta["val"].dim())]
                repeated = edit.call(aten.repeat.default, node, sizes)
                edit.replace(node, repeated, keep=repeated)
        single = edit.values["lanes"]
        with edit.graph.inserting_after(single):
            expanded = edit.call(aten.expand.default, single, [self.lanes, single.meta["val"].shape[1]])
        edit.replace(single, expanded, keep=expanded)
        edit.refresh()
