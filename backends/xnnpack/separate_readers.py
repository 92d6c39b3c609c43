"""Let products with computed values read a weight of their own, where a layer has it too.

Given:    tensor %p_w: f32[20, 28]
          %y = linear(%x, %p_w)       %u = unsqueeze(%p_w, 0)      %g = bmm(%gy, %u)
Result:   tensor %p_w: f32[20, 28]    tensor %b_w__read: f32[1, 20, 28], the same memory
          %y = linear(%x, %p_w)       %g = bmm(%gy, %b_w__read)
Numbers: exact.

XNNPACK packs the weight of a layer when it is loaded, and what it was packed from is gone then; a second reader in the
same delegate would read freed memory. As a constant of the program it is an input of the delegate, which is read where
it lies in the file. The file has it once: `backends/executorch/one_copy.py` sees that the two are equal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import DEQUANTIZE, operator_name
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
READ = "__read"  # after the name of a weight: the same numbers for other readers
# Which argument of a call is packed.
_PACKED: dict[Any, int] = {
    aten.linear.default: 1,
    aten.mm.default: 1,
    aten.addmm.default: 2,
    aten.convolution.default: 1,
}
_VIEWS = (aten.unsqueeze.default, aten.reshape.default)


@dataclasses.dataclass(frozen=True)
class SeparateReaders(Pass):
    """Add a constant for the readers of a packed weight that are no layers, in the shape in which they read it."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """Look-ups of rows stay: they are kernels outside of delegates."""
        for weight, tensor in edit.tensors.items():
            packed = {user for user in weight.users if _packs(user, weight)}
            others = [u for u in weight.users if u not in packed and u.target is not aten.embedding.default]
            if not packed:
                continue
            for reader in others:
                shape = reader.meta["val"].shape if reader.target in _VIEWS else weight.meta["val"].shape
                name = "_".join([f"{edit.tensor_name(weight)}{READ}", *map(str, shape)])
                twin = edit.shared_constant(name, tensor.detach().reshape(shape))
                if reader.target in _VIEWS:
                    edit.replace(reader, twin)
                else:
                    reader.replace_input_with(weight, twin)


def _packs(user: fx.Node, weight: fx.Node) -> bool:
    if operator_name(user) == DEQUANTIZE:  # of a layer that rounds its input; others are spelled out
        return True
    position = _PACKED.get(user.target)
    return position is not None and user.args[position] is weight
