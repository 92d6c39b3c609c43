"""Multiply by weights that are decoded while the program runs as a product of two inputs of the delegate.

Given:    %w = mul(to(%q, float32), %scale)     %y = linear(%x, %w, %bias)     %x : f32[2, 5, 64]
Result:   %y = bmm(reshape(%x, [1, 10, 64]), reshape(permute(%w, [1, 0]), [1, 64, out])) + %bias, in the shape of %y
Numbers: same up to rounding.

ExecuTorch's partitioner takes linear layers with constant weights only; others would fall to a kernel that is ten times
slower. It drops the scale of weight-only layers of torchao, so these never reach it as such.
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
_INPUT_AT: dict[Any, int] = {aten.linear.default: 0, aten.mm.default: 0, aten.addmm.default: 1}


@dataclasses.dataclass(frozen=True)
class DecodedWeights(Pass):
    """Turn linear layers with computed weights into batched products."""

    needs = frozenset({facts.STATIC})
    breaks = frozenset({facts.CANONICAL})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Leave weights that are tensors of the program, and the pattern of a layer that rounds its input."""
        for node in edit.calls(*_INPUT_AT):
            if is_decoded(edit, node):
                with edit.graph.inserting_before(node):
                    edit.replace(node, _product(edit, node))


def is_decoded(edit: Editor, product: fx.Node) -> bool:
    """Whether the weight is computed from tensors of the program that are not float32."""
    weight = operand(product, _INPUT_AT[product.target] + 1)
    made_of = ancestors([weight])
    tensors = [edit.tensor(node) for node in made_of if node.op == "placeholder"]
    if any(tensor is None for tensor in tensors) or any("torchao" in str(node.target) for node in made_of):
        return False
    return any(tensor is not None and tensor.dtype != torch.float32 for tensor in tensors)


def _product(edit: Editor, node: fx.Node) -> fx.Node:
    position = _INPUT_AT[node.target]
    x, weight = operand(node, position), operand(node, position + 1)
    if node.target is aten.linear.default:
        weight = edit.call(aten.permute.default, weight, [1, 0])
    width, out_features = weight.meta["val"].shape
    sizes = edit.sizes(x)
    product = edit.call(
        aten.bmm.default,
        edit.call(aten.reshape.default, x, [1, -1, width]),
        edit.call(aten.unsqueeze.default, weight, 0),
    )
    result = edit.call(aten.reshape.default, product, [*sizes[:-1], out_features])
    if node.target is aten.addmm.default:
        return edit.call(aten.add.Tensor, result, operand(node))
    if node.target is aten.linear.default and len(node.args) > 2 and isinstance(node.args[2], fx.Node):
        return edit.call(aten.add.Tensor, result, operand(node, 2))
    return result
