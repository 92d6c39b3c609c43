"""Multiply in bfloat16, and do everything between products in float32.

Given:    %y = linear(%x, %p_weight, %p_bias)         %p_weight: f32[out, in]
          %e = embedding(%p_table, %ids)              %p_table: f32[words, width]
          %s = scaled_dot_product_attention(%q, %k, %v, %mask)
          %d = bmm(%h, reshape(slice(%lanes)))        %h: made of what is above
Result:   tensor %p_weight_bfloat16: bf16[out, in]
          %r = to(%x, bf16)    %m = linear(%r, %p_weight_bfloat16)    %y = add(to(%m, f32), %p_bias)
          %e = to(embedding(%p_table_bfloat16, %ids), f32)
          %s = to(scaled_dot_product_attention(to(%q, bf16), to(%k, bf16), to(%v, bf16), %mask), f32)
          %l = to(%lanes, bf16)    %d = to(bmm(%h', reshape(slice(%l))), f32)    %h': what %h was before it was widened
Numbers: changes: weights, what is multiplied, and the products have 8 bits.

A GPU multiplies numbers of 16 bits 15 times as fast as those of 32 (H100), and reads half as many bytes. The sums of
the residual stream, norms, losses, noise, update and state stay in float32: a step measures differences of losses.
Lanes are made in float32 and rounded once, as weights are in training of mixed precision. Tables are rounded too, so
that one that is also the head is in memory once. Products of what neither weights nor the state had a part in, as the
angles of rotary embeddings are, stay as they are: positions above 256 are not numbers of 8 bits.
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
from mobizo_compiler.graph.program import STATE
from mobizo_compiler.passes.insert_mp_lora import OUTPUTS
from mobizo_compiler.step.noise import NORMAL_TABLE

aten = torch.ops.aten
# Products and lookups, and where their weight is among the arguments.
_WEIGHTS: dict[Any, int] = {
    aten.linear.default: 1,
    aten.mm.default: 1,
    aten.matmul.default: 1,
    aten.addmm.default: 2,
    aten.embedding.default: 0,
}
# Products of computed values, and how many of their first arguments are factors.
_COMPUTED: dict[Any, int] = {
    aten.bmm.default: 2,
    aten.mm.default: 2,
    aten.matmul.default: 2,
    aten.scaled_dot_product_attention.default: 3,
}
# Calls that move numbers: what is rounded before them is rounded behind them.
_MOVES = (
    aten.clone.default,
    aten.expand.default,
    aten.permute.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
)


@dataclasses.dataclass(frozen=True)
class RoundProducts(Pass):
    """Round linear layers and embeddings whose weight is a float32 tensor of the model, attention, and adapters.

    Convolutions, and layers whose weights are decoded while the program runs, stay in float32.
    """

    needs = frozenset({facts.STATIC, facts.CANONICAL})
    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        """A of the adapters is a frozen weight as well; what puts adapted outputs in their places is exact."""
        half, learned = _Halves(edit), _learned(edit)
        for node in edit.calls(*_WEIGHTS, *_COMPUTED):
            weight = operand(node, _WEIGHTS[node.target]) if node.target in _WEIGHTS else None
            if weight is not None and _rounds(edit, weight) and not node.kwargs:
                with edit.graph.inserting_before(node):
                    product = _product(edit, node, half(weight), half)
            elif node.target in _COMPUTED:
                factors = [operand(node, position) for position in range(_COMPUTED[node.target])]
                if not all(factor in learned and factor.meta["val"].dtype == torch.float32 for factor in factors):
                    continue
                with edit.graph.inserting_before(node):
                    product = _computed(edit, node, factors, half)
            else:
                continue
            learned.add(product)
            edit.replace(node, product)


class _Halves:
    """Values in bfloat16: each is rounded once, behind it or behind what it is a view of, for all that read it.

    Weights are rounded in the file, also for the products of a gradient, which read them by a view.
    """

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._known: dict[fx.Node, fx.Node] = {}

    def __call__(self, value: fx.Node) -> fx.Node:
        """The value, rounded; without a call if it is a rounded one that was widened."""
        if value not in self._known:
            self._known[value] = self._made(value)
        return self._known[value]

    def _made(self, value: fx.Node) -> fx.Node:
        tensor = self._edit.tensor(value)
        if tensor is not None and _rounds(self._edit, value):
            return self._edit.add_constant(f"{self._edit.tensor_name(value)}_bfloat16", _half(tensor))
        source = operand(value) if value.target in (aten.to.dtype, *_MOVES) else None
        if source is not None and value.target is aten.to.dtype and source.meta["val"].dtype == torch.bfloat16:
            return source
        names = [name for name in ("lanes", "exact") if value is self._edit.values.get(name)]
        moved = self(source) if source is not None and value.target in _MOVES and not names else None
        anchor = value.next
        while anchor.op == "placeholder":
            anchor = anchor.next
        with self._edit.graph.inserting_before(anchor):
            if moved is not None:
                return self._edit.call(value.target, moved, *value.args[1:], **value.kwargs)
            rounded = self._edit.call(aten.to.dtype, value, torch.bfloat16)
        self._edit.values |= dict.fromkeys(names, rounded)
        return rounded


def _rounds(edit: Editor, weight: fx.Node) -> bool:
    """Whether it is a float32 weight: ones and zeros that move values are exact; state and noise are no weights."""
    tensor, name = edit.tensor(weight), edit.tensor_name(weight) or ""
    return tensor is not None and tensor.dtype == torch.float32 and not name.startswith((OUTPUTS, STATE, NORMAL_TABLE))


def _learned(edit: Editor) -> set[fx.Node]:
    """What weights or the state have a part in."""
    weights = {operand(node, _WEIGHTS[node.target]) for node in edit.calls(*_WEIGHTS)}
    found = {node for node in edit.tensors if node in weights or edit.tensor_name(node) == STATE}
    for node in edit.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _computed(edit: Editor, node: fx.Node, factors: list[fx.Node], half: _Halves) -> fx.Node:
    """A product of computed values, rounded."""
    rest = node.args[len(factors) :]
    if node.target is aten.scaled_dot_product_attention.default and rest:
        rest = _mask(edit, rest[0]), *rest[1:]
    target: Any = node.target
    product = edit.call(target, *(half(factor) for factor in factors), *rest, **node.kwargs)
    return edit.call(aten.to.dtype, product, torch.float32)


def _mask(edit: Editor, mask: Any) -> Any:
    """A mask that is added, in bfloat16; the least float32 number would become an infinity, and full rows of it NaN."""
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.float32:
        return mask
    finite = edit.call(aten.clamp.default, mask, torch.finfo(torch.bfloat16).min)
    return edit.call(aten.to.dtype, finite, torch.bfloat16)


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.bfloat16)


def _product(edit: Editor, node: fx.Node, weight: fx.Node, half: _Halves) -> fx.Node:
    """The same product, or lookup, with a rounded weight; a bias is added to its result."""
    target: Any = node.target
    if target is aten.embedding.default:
        return edit.call(aten.to.dtype, edit.call(target, weight, *node.args[1:]), torch.float32)
    bias: Any = None
    if target is aten.addmm.default:
        target, bias, source = aten.mm.default, node.args[0], operand(node, 1)
    else:
        source, bias = operand(node), node.args[2] if len(node.args) > 2 else None
    product = edit.call(target, half(source), weight)
    result = edit.call(aten.to.dtype, product, torch.float32)
    return result if bias is None else edit.call(aten.add.Tensor, result, bias)
