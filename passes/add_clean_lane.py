"""Add a lane that is never perturbed, apart from the others, with numbers of its own behind a point.

Given:    %lanes = view(%state, [1, P])     %b0 = slice(%lanes, 1, 0, 160)    %b1 = slice(%lanes, 1, 160, 320)
          ...                               return row_loss = %loss           return row_weight = %weight
Result:   the same, and behind it
          %clean = view(%state, [1, P])     %exact = view(%state, [1, P])
          %b0_1 = slice(%clean, 1, 0, 160)  %b1_1 = slice(%exact, 1, 160, 320)
          ...                               return clean_row_loss = %loss_1   return clean_row_weight = %weight_1
Numbers: exact.

The loss of that lane has a gradient with respect to %exact alone: what the sites before the point compute does not
depend on it. The lanes are repeated and perturbed later; this one stays as it is, and what both compute of the inputs
alone is made one by `tidy.py`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand, slice_bounds
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.passes.duplicate_lanes import CLEAN
from mobizo_compiler.step.estimators import get_estimator

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class AddCleanLane(Pass):
    """Copy every call behind the others, and name what is to be differentiated by `exact`."""

    zo: ZOConfig
    needs = frozenset({facts.LOSS, facts.SITES})
    gives = frozenset({facts.CLEAN_LANE})
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Raise `ConfigError` if there are sites on one side alone."""
        first = get_estimator(self.zo.estimator).measured(edit.sites)
        exact_sites = edit.sites[first:]
        places = [(site.offset, site.offset + site.size) for site in exact_sites]
        places += [
            (site.a_offset, site.a_offset + site.r * site.in_features)
            for site in exact_sites
            if site.a_offset is not None
        ]
        lanes, trained = edit.values["lanes"], edit.values["trained"]
        calls = [node for node in edit.graph.nodes if node.op == "call_function" and node not in (lanes, trained)]
        with edit.graph.inserting_before(edit.graph.output_node()):
            clean, exact = (edit.call(aten.reshape.default, trained, list(lanes.meta["val"].shape)) for _ in range(2))
            copies: dict[fx.Node, fx.Node] = {}
            for node in calls:
                of_lanes = exact if _reads(node, lanes, places) else clean
                copies[node] = edit.graph.node_copy(
                    node,
                    lambda inner: of_lanes if inner is lanes else copies.get(inner, inner),  # noqa: B023
                )
                copies[node].meta = dict(node.meta)
        edit.values["exact"] = exact
        outputs = {name: edit.outputs[name] for name in ("row_loss", "row_weight")}
        edit.set_outputs({**outputs, **{f"{CLEAN}{name}": copies[node] for name, node in outputs.items()}})


def _reads(node: fx.Node, lanes: fx.Node, places: list[tuple[int, int]]) -> bool:
    """Whether a call reads the numbers of one of these places of the lanes."""
    if node.target is not aten.slice.Tensor or operand(node) is not lanes:
        return False
    bounds = slice_bounds(node)
    assert bounds is not None and bounds[0] == 1, node
    return any(start <= bounds[1] < stop for start, stop in places)
