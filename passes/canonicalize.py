"""Remove calls that do nothing, so that later passes see one form.

Given:    %a = alias(%x)   %v = view(%a, [2, 3]) of a [2, 3]   %l = linear(%v, %w)
Result:   %l = linear(%x, %w)
Numbers: exact.

Removed: aliases, clones of contiguous values, conversions to the type a value has, views, expansions and repetitions to
the shape a value has, slices of everything, multiplications by 1 and additions of 0 that change no type, metadata
assertions, dropout. Views become `reshape`: strides are a matter of the engine, and a rewrite above may change them.
Conversions that leave the device as it is become `to.dtype`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop calls whose result equals their first argument."""

    needs = frozenset({facts.FUNCTIONAL})
    gives = frozenset({facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """Visit calls in order, so that chains of such calls collapse."""
        for node in list(edit.graph.nodes):
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
            if node.target in (aten.to.device, aten.to.dtype_layout) and _same_device(node):
                node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
            rule = _RULES.get(node.target)
            if rule and rule(node):
                edit.replace(node, operand(node))


def _same_type(node: fx.Node) -> bool:
    """The result has the shape, dtype and strides of the first argument."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], Tensor):
        return False
    before, after = source.meta["val"], node.meta["val"]
    # Text, because comparing symbols would add guards; equal expressions print equally.
    return all(str(a) == str(b) for a, b in ((before.dtype, after.dtype), (before.shape, after.shape))) and (
        str(before.stride()) == str(after.stride())
    )


def _same_device(node: fx.Node) -> bool:
    return bool(operand(node).meta["val"].device == node.meta["val"].device)


def _always(node: fx.Node) -> bool:
    return True


def _neutral(number: float) -> Callable[[fx.Node], bool]:
    def rule(node: fx.Node) -> bool:
        neutral = isinstance(node.args[1], (int, float)) and node.args[1] == number
        return bool(neutral and node.kwargs.get("alpha", 1) == 1 and _same_type(node))

    return rule


_RULES: dict[Any, Callable[[fx.Node], bool]] = {
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten._assert_tensor_metadata.default: _always,
    aten.clone.default: _same_type,
    aten._to_copy.default: _same_type,
    aten.to.dtype: _same_type,
    aten.contiguous.default: _same_type,
    aten.reshape.default: _same_type,
    aten.expand.default: _same_type,
    aten.repeat.default: lambda node: node.meta["val"].shape == operand(node).meta["val"].shape,
    aten.slice.Tensor: _same_type,
    aten.mul.Tensor: _neutral(1),
    aten.add.Tensor: _neutral(0),
    aten.dropout.default: lambda node: node.args[2] is False,
}
