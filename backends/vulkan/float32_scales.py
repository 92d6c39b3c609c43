"""Store the scales of quantized weights in float32, the only form that Vulkan's kernels take.

Given:    tensor %s: bf16[64, 2]       %d = dequantize_affine(%codes, [1, 32], %s, %zero, int8, -8, 7)
Result:   tensor %t: f32[64, 2]        %d = dequantize_affine(%codes, [1, 32], %t, %zero, int8, -8, 7)
Numbers: exact.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler import facts
from mobizo_compiler.backends.vulkan.operators import name_of
from mobizo_compiler.editor import Editor
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import operand


@dataclasses.dataclass(frozen=True)
class Float32Scales(Pass):
    """Convert the constants; what computes scales from activations makes float32 anyway."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """One new constant for each old one."""
        converted: dict[fx.Node, fx.Node] = {}
        for node in list(edit.graph.nodes):
            if node.op != "call_function" or name_of(node) != "dequantize_affine":
                continue
            scale = operand(node, 2)
            tensor = edit.tensor(scale)
            if tensor is None or tensor.dtype == torch.float32:
                continue
            if scale not in converted:
                name = f"{edit.tensor_name(scale)}_float32".replace(".", "_")
                converted[scale] = edit.add_constant(name, tensor.detach().to(torch.float32))
            node.args = (*node.args[:2], converted[scale], *node.args[3:])
