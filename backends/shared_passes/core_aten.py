"""Write common operators as the core ATen operators that ExecuTorch would decompose them to.

Given:    %t = transpose.int(%x, 1, 2)     %v = reshape(%t, [N, 12])     %s = silu(%v)
Result:   %t = permute(%x, [0, 2, 1])      %c = clone(%t, contiguous)    %v = reshape(%c, [N, 12])
          %g = sigmoid(%v)                 %s = mul(%v, %g)
Numbers: same up to rounding; torch's own SiLU is not its product with the sigmoid to the last bit.

Lowering looks whether anything is left to decompose, and if so interprets the whole program once more. Operators that
have no rule here are left to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
Rule = Callable[..., fx.Node | None]


@dataclasses.dataclass(frozen=True)
class CoreAten(Pass):
    """Replace the calls that have a rule."""

    needs = frozenset({facts.STATIC})
    breaks = frozenset({facts.CANONICAL})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """Every call on its own; then what is copied for a view, until the strides of nothing change any more."""
        _replace(edit, {target: rule for target, rule in _RULES.items() if target is not aten.reshape.default})
        edit.refresh()
        while _replace(edit, {aten.reshape.default: _reshape}):
            edit.refresh()
        _replace(edit, {aten.reshape.default: _view})


def _replace(edit: Editor, rules: Mapping[Any, Rule]) -> bool:
    """Apply the rules once to every call, and say whether one changed anything."""
    changed = False
    for node in list(edit.graph.nodes):
        rule = rules.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        with edit.graph.inserting_before(node):
            replacement = rule(edit, *node.args, **node.kwargs)
        if replacement is not None:
            edit.replace(node, replacement)
            edit.graph.erase_node(node)
            changed = True
    return changed


def _transpose(edit: Editor, x: fx.Node, first: int = 0, second: int = 1) -> fx.Node:
    axes = list(range(x.meta["val"].dim()))
    axes[first], axes[second] = axes[second], axes[first]
    return edit.call(aten.permute.default, x, axes)


def _reshape(edit: Editor, x: fx.Node, sizes: list[Any]) -> fx.Node | None:
    """With a copy where a view cannot give the shape."""
    value = x.meta["val"]
    dynamic = any(isinstance(size, torch.SymInt) for size in value.shape) or any(isinstance(s, fx.Node) for s in sizes)
    # Decompositions that come later may give a value of many axes other strides than it has here. A copy that is not
    # needed is dropped after them.
    merges = value.dim() > 3 and value.dim() > len(sizes) and x.target is not aten.clone.default
    if dynamic or (not merges and _viewable(value, sizes)):
        return None
    copy = edit.call(aten.clone.default, x, memory_format=torch.contiguous_format)
    return edit.call(aten.reshape.default, copy, sizes)


def _view(edit: Editor, x: fx.Node, sizes: list[Any]) -> fx.Node | None:
    fixed = all(isinstance(size, int) for size in (*sizes, *x.meta["val"].shape))
    return edit.call(aten.view.default, x, sizes) if fixed and _viewable(x.meta["val"], sizes) else None


def _viewable(value: Tensor, sizes: list[Any]) -> bool:
    try:
        torch.empty_strided(value.shape, value.stride(), device="meta").view(sizes)
    except RuntimeError:
        return False
    return True


def _flatten(edit: Editor, x: fx.Node, *axes: int, **named: int) -> fx.Node | None:
    sizes = list(aten.flatten.using_ints(x.meta["val"], *axes, **named).shape)
    return edit.call(aten.reshape.default, x, sizes) if all(isinstance(size, int) for size in sizes) else None


def _to(edit: Editor, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    return edit.call(aten._to_copy.default, x, dtype=dtype)


def _contiguous(edit: Editor, x: fx.Node) -> fx.Node:
    return edit.call(aten.clone.default, x, memory_format=torch.contiguous_format)


def _silu(edit: Editor, x: fx.Node) -> fx.Node:
    return edit.call(aten.mul.Tensor, x, edit.call(aten.sigmoid.default, x))


def _softmax(target: Any) -> Rule:
    def rule(edit: Editor, x: fx.Node, axis: int, dtype: Any = None) -> fx.Node | None:
        same = dtype in (None, x.meta["val"].dtype)
        return edit.call(target, x, axis, False) if same else None

    return rule


def _squeeze(edit: Editor, x: fx.Node, axis: int) -> fx.Node:
    return edit.call(aten.squeeze.dims, x, [axis])


def _stack(edit: Editor, parts: list[fx.Node], axis: int = 0) -> fx.Node:
    return edit.call(aten.cat.default, [edit.call(aten.unsqueeze.default, part, axis) for part in parts], axis)


def _arange(edit: Editor, end: Any, **options: Any) -> fx.Node:
    return edit.call(aten.arange.start_step, 0, end, 1, **options)


def _full(number: int) -> Rule:
    def rule(edit: Editor, sizes: list[Any], **options: Any) -> fx.Node:
        return edit.call(aten.full.default, sizes, number, **{"dtype": torch.get_default_dtype()} | options)

    return rule


def _new_full(number: int) -> Rule:
    def rule(edit: Editor, like: fx.Node, sizes: list[Any], **options: Any) -> fx.Node:
        return edit.call(aten.full.default, sizes, number, **{"dtype": like.meta["val"].dtype} | options)

    return rule


def _zeros_like(edit: Editor, like: fx.Node, dtype: Any = None, **options: Any) -> fx.Node:
    return edit.call(aten.full_like.default, like, 0, dtype=dtype or like.meta["val"].dtype, **options)


def _rsub(edit: Editor, x: fx.Node, number: float, alpha: float = 1) -> fx.Node | None:
    return edit.call(aten.add.Tensor, edit.call(aten.neg.default, x), number) if alpha == 1 else None


def _renamed(target: Any) -> Rule:
    def rule(edit: Editor, *args: Any) -> fx.Node | None:
        same = all(isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor) for a in args)
        return edit.call(target, *args) if same else None

    return rule


_RULES: dict[Any, Rule] = {
    aten.transpose.int: _transpose,
    aten.t.default: lambda edit, x: _transpose(edit, x) if x.meta["val"].dim() == 2 else None,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.to.dtype: _to,
    aten.contiguous.default: _contiguous,
    aten.silu.default: _silu,
    aten.softmax.int: _softmax(aten._softmax.default),
    aten.log_softmax.int: _softmax(aten._log_softmax.default),
    aten.squeeze.dim: _squeeze,
    aten.stack.default: _stack,
    aten.arange.default: _arange,
    aten.ones.default: _full(1),
    aten.zeros.default: _full(0),
    aten.new_ones.default: _new_full(1),
    aten.new_zeros.default: _new_full(0),
    aten.zeros_like.default: _zeros_like,
    aten.rsub.Scalar: _rsub,
    aten.__and__.Tensor: _renamed(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _renamed(aten.bitwise_or.Tensor),
    aten.min.other: _renamed(aten.minimum.default),
    aten.max.other: _renamed(aten.maximum.default),
}
