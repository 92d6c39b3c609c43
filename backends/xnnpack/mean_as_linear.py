"""Write the mean or the sum over the last axis as a product with a constant, which XNNPACK takes and these it does not.

Given:    %m = mean(%x, [-1], True)                : f32[..., 1]
Result:   tensor %b_mobizo_mean_576: f32[1, 576], every element 1/576
          %m = linear(%x, %b_mobizo_mean_576)      : f32[..., 1]
Numbers: same up to rounding.

Every RMSNorm has such a mean; left outside, it cuts the network into two delegates a norm. Derivatives of norms and of
softmax have such sums.
"""

from __future__ import annotations

import dataclasses

import torch

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class MeanAsLinear(Pass):
    """Replace float32 means and sums over the last axis that keep it."""

    needs = frozenset({facts.STATIC})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """One constant serves all means, or all sums, of a width."""
        for node in edit.calls(aten.mean.dim, aten.sum.dim_IntList):
            source = operand(node).meta["val"]
            last = str(node.args[1]) in ("[-1]", f"[{source.dim() - 1}]")
            if not last or node.args[2:] != (True,) or source.dtype != torch.float32 or source.dim() < 2:
                continue
            width = int(source.shape[-1])
            mean = node.target is aten.mean.dim
            name = f"mobizo_{'mean' if mean else 'sum'}_{width}"
            factor = edit.shared_constant(name, torch.full((1, width), 1.0 / width if mean else 1.0))
            with edit.graph.inserting_before(node):
                edit.replace(node, edit.call(aten.linear.default, operand(node), factor))
