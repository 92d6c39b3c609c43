"""Write SiLU as a product with the sigmoid, for engines that have no SiLU.

Given:    %y = silu(%x)
Result:   %s = sigmoid(%x)     %y = mul(%x, %s)
Numbers: same up to rounding.
"""

from __future__ import annotations

import dataclasses

import torch

from mobizo_compiler.graph import Editor, Insertion, Pass, facts, operand

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SpellOutSilu(Pass):
    """Replace every SiLU."""

    needs = frozenset({facts.FUNCTIONAL})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Two calls in the place of one."""
        for node in edit.calls(aten.silu.default):
            with edit.graph.inserting_before(node):
                sigmoid = edit.call(aten.sigmoid.default, operand(node))
                product = edit.call(aten.mul.Tensor, operand(node), sigmoid)
            edit.replace(node, product)


insertion = Insertion(SpellOutSilu(), after="specialize")
