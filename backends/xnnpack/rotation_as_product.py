"""Write the rotation of halves in a rotary embedding as a product with zeros and ones, where tokens are dynamic.

Given:    %a = slice(%x, 3, 0, 4)      %b = slice(%x, 3, 4, end)        : %x f32[1, 2, tokens, 8]
          %c = cat([neg(%b), %a], -1)
Result:   tensor %b_mobizo_rotation_8: f32[8, 8], of 0, 1 and -1
          %c = linear(%x, %b_mobizo_rotation_8)
Numbers: exact.

XNNPACK slices no value with a dynamic size, so that each layer would leave the delegate four times. The product costs
as much as a projection to one more head.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand, slice_bounds
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
_TO_THE_END = torch.iinfo(torch.int64).max


@dataclasses.dataclass(frozen=True)
class RotationAsProduct(Pass):
    """Replace every such chain of float32 values."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """One constant serves all heads of a width."""
        for node in edit.calls(aten.cat.default):
            source = _rotated(node)
            if source is None:
                continue
            width = int(source.meta["val"].shape[-1])
            rotation = edit.shared_constant(f"mobizo_rotation_{width}", _rotation(width))
            with edit.graph.inserting_before(node):
                edit.replace(node, edit.call(aten.linear.default, source, rotation))


def _rotated(node: fx.Node) -> fx.Node | None:
    """The value of which a call joins the negative second half and the first half along the last axis, or None."""
    parts = node.args[0]
    value = node.meta["val"]
    axis = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or axis not in (-1, value.dim() - 1):
        return None
    negative, first = parts
    if not isinstance(negative, fx.Node) or not isinstance(first, fx.Node) or negative.target is not aten.neg.default:
        return None
    second = operand(negative)
    if not all(part.target is aten.slice.Tensor for part in (first, second)) or operand(first) is not operand(second):
        return None
    width, last = value.shape[-1], value.dim() - 1
    if value.dtype != torch.float32 or not isinstance(width, int) or all(isinstance(s, int) for s in value.shape):
        return None
    bounds = slice_bounds(first), slice_bounds(second)
    ends = {(last, width // 2, end) for end in (None, width, _TO_THE_END)}
    return operand(first) if bounds[0] == (last, 0, width // 2) and bounds[1] in ends else None


def _rotation(width: int) -> Tensor:
    half = torch.eye(width // 2)
    nothing = torch.zeros_like(half)
    return torch.cat([torch.cat([nothing, -half], 1), torch.cat([half, nothing], 1)], 0)
