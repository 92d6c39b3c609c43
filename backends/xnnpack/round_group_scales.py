"""Round the scales of groups of weights to bfloat16, which is what XNNPACK's 4-bit kernels hold.

Given:    %w = dequantize_affine(%q, [1, 32], %scale : f32[out, in/32], ...)    %y = linear(rounded(%x), %w)
Result:   tensor %scale_bfloat16 : bf16[out, in/32]
          %w = dequantize_affine(%q, [1, 32], %scale_bfloat16, ...)
Numbers: changes, because scales are rounded; the delegate rounds them anyway, and now the graphs say so.

Layers that do not round their input are decoded into float32, and keep their scales. The recipes of `compile` make
bfloat16 scales from the start; models that came quantized need not have them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from mobizo_compiler.backends.shared_passes.spell_out_quantization import rounded_input, scales_as
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class RoundGroupScales(Pass):
    """Replace float32 scales of groups."""

    needs = frozenset({facts.STATIC})
    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        """A scale per channel stays: XNNPACK holds those in float32."""
        scales_as(edit, torch.bfloat16, _is_rounded)


def _is_rounded(weight: fx.Node, scale: Tensor) -> bool:
    """Whether the delegate holds scales of groups: layers that do not round their input are decoded to float32."""
    in_kernel = any(user.target is aten.linear.default and rounded_input(user) for user in weight.users)
    return in_kernel and scale.dtype == torch.float32 and scale.shape[-1] > 1
