"""Keep a product with 4-bit weights apart from reshapes.

Given:    %m = reshape(%heads, [N*T, H*D])
          %y = linear(%m, dequantize_affine(...))         %v = reshape(%y, [N, T, H, D])
Result:   %m = reshape(%heads, [N*T, H*D])                %x = mul(%m, 1.0)
          %y = linear(%x, dequantize_affine(...))         %v = reshape(mul(%y, 1.0), [N, T, H, D])
Numbers: exact.

The Vulkan delegate looks through a reshape in front of such a product and reads the value behind it, whose last axis
need not be the width of the layer; the result of attention is such a value. Where activations are quantized it also
takes a reshape behind the product for a part of it, and loses it; keys and values without an adapter are reshaped so.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler.backends.vulkan.operators import name_of
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SeparateViews(Pass):
    """Put a product with 1 between reshapes and linear layers whose weights are quantized."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """Run after everything that drops products with 1."""
        copies: dict[fx.Node, fx.Node] = {}
        for node in edit.calls(aten.linear.default):
            source = operand(node)
            if name_of(operand(node, 1)) != "dequantize_affine":
                continue
            if source.target is aten.reshape.default:
                if source not in copies:
                    with edit.graph.inserting_before(node):
                        copies[source] = edit.call(aten.mul.Tensor, source, 1.0)
                node.args = (copies[source], *node.args[1:])
            if any(user.target is aten.reshape.default for user in node.users):
                with edit.graph.inserting_after(node):
                    copy = edit.call(aten.mul.Tensor, node, 1.0)
                edit.replace(node, copy, keep=copy)
