"""Write attention as two batched matrix products that stay in one delegate.

Given:    %k4 = reshape(clone(expand(unsqueeze(%k, 2), [N, KV, rep, S, D])), [N, H, S, D])      (also for %v)
          %o = scaled_dot_product_attention(%q, %k4, %v4, %mask, scale=0.125)  : f32[N, H, T, D]
Result:   %scores = bmm(reshape(mul(%q, 0.125), [N*KV, rep*T, D]), reshape(transpose(%k, 2, 3), [N*KV, D, S]))
          %p = softmax(add(reshape(%scores, [N, H, T, S]), %bias), -1)
          %o = mul(reshape(bmm(reshape(%p, [N*KV, rep*T, S]), reshape(%v, [N*KV, S, D])), [N, H, T, D]), %any)
Numbers: same up to rounding; query positions that may attend to nothing give 0, as in PyTorch.

ExecuTorch's own decomposition materialises the repeat of keys and values, expands the mask, and guards the softmax
with portable operators between delegates. Here the repeat becomes a longer query axis, and %bias and %any are made
once for each mask.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
_MASKED = -1e30  # finite, so that a row of nothing else does not become NaN; exp of it is 0 beside any score


@dataclasses.dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Replace every attention without dropout on four-dimensional inputs whose rows and heads are numbers."""

    needs = frozenset({facts.STATIC, facts.CANONICAL})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Visit every call; masks are shared by all layers of most models."""
        masks: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in edit.calls(aten.scaled_dot_product_attention.default):
            arguments: dict[str, Any] = dict(
                zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)
            )
            arguments |= node.kwargs
            shape = operand(node).meta["val"].shape
            if arguments.get("dropout_p", 0.0) != 0.0 or len(shape) != 4 or not isinstance(shape[0], int):
                continue
            with edit.graph.inserting_before(node):
                edit.replace(node, _attention(edit, arguments, masks))
        edit.refresh()  # the strides of the results are others now


def _attention(edit: Editor, arguments: dict[str, Any], masks: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> fx.Node:
    query = arguments["query"]
    key, value = (_before_repeat(arguments[name]) for name in ("key", "value"))
    rows, heads, targets, width = edit.sizes(query)
    _, key_heads, sources, _ = edit.sizes(key)
    if value.meta["val"].shape[1] != key_heads:
        key, value, key_heads = arguments["key"], arguments["value"], heads
    groups, repeat = rows * key_heads, heads // key_heads
    queries = repeat * targets if isinstance(targets, int) else -1
    scale = arguments.get("scale")
    scaled = edit.call(aten.mul.Tensor, query, 1 / math.sqrt(width) if scale is None else scale)
    scaled = edit.call(aten.reshape.default, scaled, [groups, queries, width])
    turned_sizes = [groups, width, sources if isinstance(sources, int) else -1]
    turned = edit.call(aten.reshape.default, edit.call(aten.transpose.int, key, 2, 3), turned_sizes)
    scores = edit.call(aten.bmm.default, scaled, turned)
    scores = edit.call(aten.reshape.default, scores, [rows, heads, targets, sources])
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        if isinstance(targets, int) and isinstance(sources, int):
            causal = torch.full((1, 1, targets, sources), _MASKED).triu(1)
            bias = edit.add_constant(f"mobizo_causal_{targets}_{sources}", causal)
        else:
            bias = edit.inline(_causal_bias, scores)
        scores = edit.call(aten.add.Tensor, scores, bias)
    elif mask is not None:
        if mask not in masks:
            masks[mask] = edit.inline(_bias_and_any, mask)
        scores = edit.call(aten.add.Tensor, scores, masks[mask][0])
    weights = edit.call(aten.softmax.int, scores, -1)
    weights = edit.call(aten.reshape.default, weights, [groups, queries, sources])
    flat_value = edit.call(aten.reshape.default, value, [groups, sources, value.meta["val"].shape[3]])
    result = edit.call(aten.bmm.default, weights, flat_value)
    result = edit.call(aten.reshape.default, result, [rows, heads, targets, value.meta["val"].shape[3]])
    return edit.call(aten.mul.Tensor, result, masks[mask][1]) if mask in masks else result


def _causal_bias(scores: Tensor) -> Tensor:
    """What is added to scores [..., targets, sources] of dynamic sizes, so that no query sees what comes after it."""
    targets, sources = (torch.arange(size) for size in scores.shape[-2:])
    return (sources[None, :] > targets[:, None]).to(torch.float32) * _MASKED


def _bias_and_any(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the scores, and 1 where a query may attend to anything, else 0."""
    if mask.dtype == torch.bool:
        allowed = mask.to(torch.float32)
        return (1.0 - allowed) * _MASKED, allowed.amax(dim=-1, keepdim=True)
    bias = mask.clamp(min=_MASKED)
    return bias, (bias.amax(dim=-1, keepdim=True) > _MASKED).to(torch.float32)


def _before_repeat(node: fx.Node) -> fx.Node:
    """Keys or values before each head of theirs was repeated for several query heads; else the node itself."""
    chain = [node]
    for targets in ((aten.reshape.default,), (aten.clone.default,), (aten.expand.default,), (aten.unsqueeze.default,)):
        inner = chain[-1]
        if inner.target in targets:
            chain.append(operand(inner))
        elif targets != (aten.clone.default,):
            return node
    source, expanded = chain[-1], chain[-3].meta["val"].shape
    shape = source.meta["val"].shape
    repeated = len(shape) == 4 and chain[-2].args[1] == 2 and tuple(expanded) == (*shape[:2], expanded[2], *shape[2:])
    return source if repeated and node.meta["val"].shape[1] == shape[1] * expanded[2] else node
