"""Repeat the rows once per lane, as late as pays, and let every lane have its own copy of B (MobiZO, section 3.2).

Given:    %h = embedding(%w, %ids) : f32[rows, 5, 12]        %lanes = view(%state, [1, P])
          %y = linear(%h, %w2)                               %h1 = linear(%h, %a), and so on to B
Result:   %h = embedding(%w, %ids) : f32[rows, 5, 12]        %lanes = view(%state, [1, P])
          %repeat = repeat(%h, [G, 1, 1]) : f32[G*rows, 5, 12]     %expand = expand(%lanes, [G, P])
          %y = linear(%repeat, %w2)                          %h1 = linear(%repeat, %a), and so on to B
Numbers: same up to rounding; every lane computes what the program computed before, as one of more rows.

Rows are lane-major: rows 0..b-1 belong to lane 0, and so on. Lanes are +1..+q, then -1..-q; that they differ is the
work of the next pass. This is outer-loop and inner-loop parallelism: one forward computes all G = 2q losses.

What no adapter comes before is the same in all lanes: masks, embeddings, and with `layers_to_transform` every layer
before the first adapted one. It is computed once, on the rows of one lane. Where to repeat is a minimum cut, see
`mobizo_compiler/analysis/lane_cut.py`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler.analysis.axes import row_axes
from mobizo_compiler.analysis.lane_cut import duplication_points, perturbed_by
from mobizo_compiler.errors import PassContractError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors, numbered_shapes
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram

aten = torch.ops.aten
REPEATED = "repeated_"  # names of the values that are repeated rows
CLEAN = "clean_"  # before the names of outputs of a lane that is not among them


@dataclasses.dataclass(frozen=True)
class DuplicateLanes(Pass):
    """Repeat the rows `lanes` times.

    Args:
        lanes: How many lanes there are.
        late: Whether to repeat as late as pays, and not the inputs, whatever that costs.
        cut_for: The number of lanes for which where to repeat is chosen; if None, `lanes`. One lane that begins where
            the lanes of another program do takes the same prefix.
    """

    lanes: int
    late: bool = True
    cut_for: int | None = None
    needs = frozenset({facts.ANY_ROWS, facts.SITES})
    gives = frozenset({facts.LANES})
    outputs = "changed"
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Repeat the inputs, then replace the values at the cut by repeated copies, and recompute all shapes."""
        apart = _apart(edit)
        points = self._points(edit, apart) if self.late or self.lanes == 1 else {}
        if self.lanes == 1:
            return self._mark(edit, points)
        first_call = next(node for node in edit.graph.nodes if node.op != "placeholder")
        originals: dict[fx.Node, fx.Node] = {}
        with edit.graph.inserting_before(first_call):
            for name, axis in edit.rows.items():
                node = edit.inputs[name]
                repeated = self._repeat(edit, node, axis)
                edit.replace(node, repeated, keep=repeated)
                originals[repeated] = node
                for user in [user for user in repeated.users if user in apart]:
                    user.replace_input_with(repeated, node)
        copies = _copy_of_one_lane(edit, points, originals)
        for node, axis in points.items():
            if node.op == "call_function":
                with edit.graph.inserting_after(copies[node]):
                    edit.replace(node, self._repeat(edit, copies[node], axis))
        single = edit.values["lanes"]
        with edit.graph.inserting_after(single):
            expanded = edit.call(aten.expand.default, single, [self.lanes, single.meta["val"].shape[1]])
        edit.replace(single, expanded, keep=expanded)
        edit.refresh()

    def ensures(self, before: GraphProgram, after: GraphProgram) -> None:
        """Raise `PassContractError` unless one axis of every output is `lanes` times as long, and nothing else is."""
        old, new = before.output_nodes, after.output_nodes
        if list(old) != list(new):
            raise PassContractError(f"duplicate_lanes made the outputs {list(new)} of {list(old)}")
        shapes = numbered_shapes([node.meta["val"].shape for node in (*old.values(), *new.values())])
        for name, was, now in zip(old, shapes, shapes[len(old) :], strict=False):
            if name.startswith(CLEAN):
                continue
            grown = [axis for axis in range(len(was)) if was[axis] != now[axis]] if len(was) == len(now) else []
            if self.lanes == 1 and len(was) == len(now) and not grown:
                continue
            if len(grown) != 1 or now[grown[0]] != self.lanes * was[grown[0]]:
                raise PassContractError(
                    f"duplicate_lanes made output {name!r} {list(new[name].meta['val'].shape)} of "
                    f"{list(old[name].meta['val'].shape)} for {self.lanes} lanes"
                )

    def _mark(self, edit: Editor, points: dict[fx.Node, int]) -> None:
        """One lane is what there is; that it could begin at these values is written down, for a step that does."""
        for node, axis in points.items():
            if node.op == "call_function":
                with edit.graph.inserting_after(node):
                    copy = self._repeat(edit, node, axis)
                edit.replace(node, copy, keep=copy)

    def _points(self, edit: Editor, apart: set[fx.Node]) -> dict[fx.Node, int]:
        perturbed = perturbed_by(edit.values["lanes"])
        axes = row_axes(edit.graph, edit.rows, edit.before.fixed_rows, edit.tensors, leave_out=perturbed | apart)
        return duplication_points(axes, perturbed, self.cut_for or self.lanes)

    def _repeat(self, edit: Editor, node: fx.Node, axis: int) -> fx.Node:
        sizes = [self.lanes if a == axis else 1 for a in range(node.meta["val"].dim())]
        repeated = edit.call(aten.repeat.default, node, sizes)
        edit.values[f"{REPEATED}{len(edit.values)}_axis_{axis}"] = repeated
        return repeated


def _apart(edit: Editor) -> set[fx.Node]:
    """The calls of a lane that is not among the others."""
    clean = ancestors(node for name, node in edit.outputs.items() if name.startswith(CLEAN))
    others = ancestors(node for name, node in edit.outputs.items() if not name.startswith(CLEAN)) if clean else set()
    return {node for node in clean - others if node.op == "call_function"}


def _copy_of_one_lane(
    edit: Editor, points: dict[fx.Node, int], originals: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Copies of the values at the cut, and of what they are made of, that start from the inputs as they were given."""
    needed = ancestors(points)
    copies = dict(originals)
    for node in list(edit.graph.nodes):
        if node in needed and node.op == "call_function" and node not in originals:
            if not any(inner in copies for inner in node.all_input_nodes):
                continue  # nothing of the rows is in it
            with edit.graph.inserting_before(node):
                copies[node] = edit.graph.node_copy(node, lambda inner: copies.get(inner, inner))
                copies[node].meta = dict(node.meta)
    return copies
