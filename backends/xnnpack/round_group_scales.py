"""Round the scales of groups of weights to bfloat16, which is what XNNPACK's 4-bit kernels hold.

Given:    %w = dequantize_affine(%q, [1, 32], %scale : f32[out, in/32], ...)
Result:   tensor %scale_bfloat16 : bf16[out, in/32]
          %w = dequantize_affine(%q, [1, 32], %scale_bfloat16, ...)
Numbers: changes, because scales are rounded; the delegate rounds them anyway, and now the graphs say so.

The recipes of `compile` make such scales from the start; models that came quantized need not have them.
"""

from __future__ import annotations

import dataclasses

import torch

from mobizo_compiler.backends.shared_passes.spell_out_quantization import scales_as
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass


@dataclasses.dataclass(frozen=True)
class RoundGroupScales(Pass):
    """Replace float32 scales of groups."""

    needs = frozenset({facts.STATIC})
    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        """A scale per channel stays: XNNPACK holds those in float32."""
        scales_as(edit, torch.bfloat16, lambda scale: scale.dtype == torch.float32 and scale.shape[-1] > 1)
