"""Write reshapes to one dynamic size with numbers and a -1, which XNNPACK takes and computed sizes it does not.

Given:    %v = reshape(%x, [1, %tokens, -1, 8])    : f32[1, tokens, 4, 8]
          %u = unsqueeze(%m, 1)                    : f32[1, 1, tokens, 8]
Result:   %v = reshape(%x, [1, -1, 4, 8])          : f32[1, tokens, 4, 8]
          %u = reshape(%m, [1, 1, -1, 8])          : f32[1, 1, tokens, 8]
Numbers: exact.

A size that is an argument is a value to XNNPACK's partitioner, so that every head of attention would leave the delegate
to be reshaped. It also takes no axis that is put in before the last one, but as a reshape.
"""

from __future__ import annotations

import dataclasses

import torch

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class OneUnknownSize(Pass):
    """Rewrite what changes the shape of float32 values, where one size of the result is dynamic."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """Others stay as they are."""
        for node in edit.calls(aten.reshape.default, aten.view.default, aten.unsqueeze.default):
            value = node.meta["val"]
            dynamic = [size for size in value.shape if not isinstance(size, int)]
            if value.dtype != torch.float32 or len(dynamic) != 1:
                continue
            with edit.graph.inserting_before(node):
                sizes = [size if isinstance(size, int) else -1 for size in value.shape]
                source = operand(node)
                if not source.meta["val"].is_contiguous():  # else ExecuTorch copies it first, and computes the sizes
                    source = edit.call(aten.clone.default, source, memory_format=torch.contiguous_format)
                edit.replace(node, edit.call(aten.reshape.default, source, sizes))
