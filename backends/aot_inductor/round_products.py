"""Multiply with the frozen weights in bfloat16, and do everything else in float32.

Given:    %y = linear(%x, %p_weight, %p_bias)         %p_weight: f32[out, in]
          %e = embedding(%p_table, %ids)              %p_table: f32[words, width]
Result:   tensor %p_weight_bfloat16: bf16[out, in]
          %r = to(%x, bf16)    %m = linear(%r, %p_weight_bfloat16)    %y = add(to(%m, f32), %p_bias)
          %e = to(embedding(%p_table_bfloat16, %ids), f32)
Numbers: changes: weights, what is multiplied with them, and the products have 8 bits.

A GPU multiplies numbers of 16 bits 15 times as fast as those of 32 (H100), and reads half as many bytes. B of the
adapters, whose small changes are what a step measures, its products, the sums of the residual stream, norms, attention
and losses stay in float32. A is a weight like others where it is not trained, and reads the same rounded inputs. Tables
are rounded too, so that one that is also the head is in memory once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.passes.insert_mp_lora import OUTPUTS

aten = torch.ops.aten
# Products and lookups, and where their weight is among the arguments.
_WEIGHTS: dict[Any, int] = {
    aten.linear.default: 1,
    aten.mm.default: 1,
    aten.matmul.default: 1,
    aten.addmm.default: 2,
    aten.embedding.default: 0,
}


@dataclasses.dataclass(frozen=True)
class RoundProducts(Pass):
    """Round linear layers and embeddings whose weight is a float32 tensor of the model.

    Convolutions, and layers whose weights are decoded while the program runs, stay in float32.
    """

    needs = frozenset({facts.STATIC, facts.CANONICAL})
    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        """A of the adapters is a frozen weight as well; what puts adapted outputs in their places multiplies with B."""
        weights: dict[fx.Node, fx.Node] = {}
        inputs: dict[fx.Node, fx.Node] = {}
        for node in edit.calls(*_WEIGHTS):
            position = _WEIGHTS[node.target]
            weight = operand(node, position)
            tensor, name = edit.tensor(weight), edit.tensor_name(weight) or ""
            if tensor is None or tensor.dtype != torch.float32 or name.startswith(OUTPUTS) or node.kwargs:
                continue
            if weight not in weights:
                weights[weight] = edit.add_constant(f"{name}_bfloat16", _half(tensor))
            with edit.graph.inserting_before(node):
                edit.replace(node, _product(edit, node, weights[weight], inputs))


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.bfloat16)


def _product(edit: Editor, node: fx.Node, weight: fx.Node, inputs: dict[fx.Node, fx.Node]) -> fx.Node:
    """The same product, or lookup, with a rounded weight; a bias is added to its result."""
    target: Any = node.target
    if target is aten.embedding.default:
        return edit.call(aten.to.dtype, edit.call(target, weight, *node.args[1:]), torch.float32)
    bias: Any = None
    if target is aten.addmm.default:
        target, bias, source = aten.mm.default, node.args[0], operand(node, 1)
    else:
        source, bias = operand(node), node.args[2] if len(node.args) > 2 else None
    product = edit.call(target, _rounded(edit, source, inputs), weight)
    result = edit.call(aten.to.dtype, product, torch.float32)
    return result if bias is None else edit.call(aten.add.Tensor, result, bias)


def _rounded(edit: Editor, value: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The value in bfloat16, made once, right behind it, for all layers that read it."""
    if value not in known:
        for user in value.users:
            if user.target is aten.to.dtype and user.args[1] is torch.bfloat16:
                known[value] = user
                return user
        anchor = value.next
        while anchor.op == "placeholder":
            anchor = anchor.next
        with edit.graph.inserting_before(anchor):
            known[value] = edit.call(aten.to.dtype, value, torch.bfloat16)
    return known[value]
