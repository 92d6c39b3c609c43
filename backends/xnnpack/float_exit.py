"""End delegates in a float kernel, not in an integer product.

Given:    %y = linear(dequantize(quantize(%x)), dequantize(%q))      %p = _log_softmax(%y, -1)      : f32[16, 1, 50]
Result:   tensor %b_mobizo_one: f32[1], 1
          %z = mul(%y, %b_mobizo_one)      %p = _log_softmax(%z, -1)
Numbers: exact.

XNNPACK's integer products for AVX-512 seem to return without `vzeroupper`: what runs next outside of the delegate is
compiled for plain SSE, and pays for the upper halves of the registers at every instruction. A log-softmax of 16 rows of
49152 takes 130 ms instead of 4. XNNPACK's elementwise kernels clean up, on every thread that they run on.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler.backends.shared_passes.spell_out_quantization import rounded_input
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operator_name
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
ONE = "mobizo_one"
_VIEWS = frozenset(("alias", "permute", "reshape", "slice", "squeeze", "t", "transpose", "unsqueeze", "view"))
# What a delegate takes, so that something runs after the product.
_INSIDE = frozenset(("add", "clamp", "cos", "div", "exp", "gelu", "mul", "neg", "pow", "relu", "rsqrt", "sigmoid"))
_INSIDE |= frozenset(("silu", "sin", "softmax", "sqrt", "square", "sub", "tanh", "bmm", "linear", "matmul"))


@dataclasses.dataclass(frozen=True)
class FloatExit(Pass):
    """Multiply by one what integer products hand to other kernels."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """The output layer, as a rule."""
        for node in edit.calls(aten.linear.default):
            if rounded_input(node) is not None and _leaves(node):
                one = edit.shared_constant(ONE, torch.ones(1))
                with edit.graph.inserting_before(node.next):
                    product = edit.call(aten.mul.Tensor, node, one)
                edit.replace(node, product, keep=product)


def _leaves(node: fx.Node) -> bool:
    """Whether somebody outside of delegates reads a value, or a view of it."""
    for user in node.users:
        name = operator_name(user)
        if name in _VIEWS:
            if _leaves(user):
                return True
        elif name not in _INSIDE:
            return True
    return False
