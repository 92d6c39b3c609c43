"""Store the scales of quantized weights in float32, the only form that Vulkan's kernels take.

Given:    tensor %s: bf16[64, 2]       %d = dequantize_affine(%codes, [1, 32], %s, %zero, int8, -8, 7)
Result:   tensor %t: f32[64, 2]        %d = dequantize_affine(%codes, [1, 32], %t, %zero, int8, -8, 7)
Numbers: exact.
"""

from __future__ import annotations

import dataclasses

import torch

from mobizo_compiler.backends.shared_passes.spell_out_quantization import scales_as
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass


@dataclasses.dataclass(frozen=True)
class Float32Scales(Pass):
    """Convert the constants; what computes scales from activations makes float32 anyway."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """One new constant for each old one."""
        scales_as(edit, torch.float32, lambda weight, scale: scale.dtype != torch.float32)
