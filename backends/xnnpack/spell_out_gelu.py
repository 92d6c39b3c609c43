"""Write the tanh form of GELU as the operators it is made of.

Given:    %y = gelu(%x, approximate=tanh)
Result:   %u = mul(add(mul(mul(mul(%x, %x), %x), 0.0447), %x), 0.7979)
          %y = mul(mul(%x, 0.5), add(tanh(%u), 1.0))
Numbers: same up to rounding.

ExecuTorch's XNNPACK delegate has one GELU, the one with erf, and takes this operator for it without looking at the
argument: activations are then off by up to 5e-4. All operators of the long form are taken by the delegate.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass


@dataclasses.dataclass(frozen=True)
class SpellOutGelu(Pass):
    """Replace `gelu(approximate="tanh")`; the form with erf stays."""

    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Every call on its own."""
        for node in edit.calls(torch.ops.aten.gelu.default):
            if node.kwargs.get("approximate", "none") == "tanh":
                with edit.graph.inserting_before(node):
                    edit.replace(node, edit.inline(_gelu, operand(node)))


def _gelu(x: Tensor) -> Tensor:
    inner = (x * x * x * 0.044715 + x) * math.sqrt(2.0 / math.pi)
    return x * 0.5 * (torch.tanh(inner) + 1.0)
