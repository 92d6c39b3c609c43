"""Write attention as matrix products and a softmax.

Given:    %o = scaled_dot_product_attention(%q, %k, %v, %mask, scale=0.125)  : f32[N, H, T, D]
Result:   %scores = add(matmul(mul(%q, 0.125), transpose(%k, -1, -2)), %bias)
          %o = mul(matmul(softmax(%scores, -1), %v), %any)
Numbers: same up to rounding; query positions that may attend to nothing give 0, as in PyTorch.

ExecuTorch decomposes attention with a guard of operators on truth values around the softmax. Those stay outside of the
delegate, and cut it in two for each layer. Here %bias and %any are float32, and made once for each mask.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.graph import Editor, Pass, facts

aten = torch.ops.aten
_MASKED = -1e30  # finite, so that a row of nothing else does not become NaN
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclasses.dataclass(frozen=True)
class AttentionAsProducts(Pass):
    """Replace attention without dropout and without shared heads; other attention is left to ExecuTorch."""

    needs = frozenset({facts.STATIC})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Visit every call."""
        masks: dict[fx.Node | None, list[fx.Node]] = {None: []}
        for node in edit.calls(aten.scaled_dot_product_attention.default):
            arguments = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
            if arguments.get("dropout_p") or arguments.get("enable_gqa"):
                continue
            with edit.graph.inserting_before(node):
                edit.replace(node, _attention(edit, arguments, masks))
        edit.refresh()  # the strides of the results are others now


def _attention(edit: Editor, arguments: dict[str, Any], masks: dict[fx.Node | None, list[fx.Node]]) -> fx.Node:
    query, key, value = (arguments[name] for name in _NAMES[:3])
    given = arguments.get("scale")
    scale = 1 / math.sqrt(query.meta["val"].shape[-1]) if given is None else given
    causal, mask = arguments.get("is_causal", False), arguments.get("attn_mask")
    if mask is not None and mask not in masks:
        masks[mask] = list(edit.inline(_bias_and_any, mask))

    def products(query: Tensor, key: Tensor, value: Tensor, *bias_and_any: Tensor) -> Tensor:
        scores = torch.matmul(query * scale, key.transpose(-1, -2))
        if causal:
            targets, sources = (torch.arange(size) for size in scores.shape[-2:])
            scores = scores + (sources[None, :] > targets[:, None]).to(torch.float32) * _MASKED
        if bias_and_any:
            scores = scores + bias_and_any[0]
        result = torch.matmul(torch.softmax(scores, -1), value)
        return result * bias_and_any[1] if bias_and_any else result

    replacement: fx.Node = edit.inline(products, query, key, value, *masks[mask])
    return replacement


def _bias_and_any(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the scores, and 1 where a query may attend to anything, else 0."""
    if mask.dtype == torch.bool:
        allowed = mask.to(torch.float32)
        return (1.0 - allowed) * _MASKED, allowed.amax(dim=-1, keepdim=True)
    bias = mask.clamp(min=_MASKED)
    return bias, (bias.amax(dim=-1, keepdim=True) > _MASKED).to(torch.float32)
