"""Leave out what derivatives bring along: double transposes, chains of views, repetitions, zeros, work done twice.

Given:    %t = t(%w)   %u = t(%t)      %v = reshape(%x, [21, 20])   %s = unsqueeze(%v, 0)    : f32[1, 21, 20]
          %e = expand(%m, [3, 7, 20])  %d = mul(%e, %y)              : %y f32[3, 7, 20]
          %z = zeros_like(%p)          %a = add(%q, %z)
          %g = sigmoid(%x)             %h = sigmoid(%x)
Result:   %w for %u                    %s = reshape(%x, [1, 21, 20])
          %d = mul(%m, %y)             %q for %a                     %g for %h
Numbers: exact.

A repetition that another factor repeats anyway is left to the engine, which reads one number many times in place of
writing it many times. The same call of the same values is made once: the derivative of a call asks for parts of it.
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
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
_VIEWS = (
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
)
_BROADCAST = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)


@dataclasses.dataclass(frozen=True)
class Tidy(Pass):
    """One sweep for each, in an order in which one makes room for the next."""

    needs = frozenset({facts.STATIC})
    breaks = frozenset({facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """Sizes are numbers here, so that a chain of views is one."""
        named = set(edit.values.values())
        for node in edit.calls(*_BROADCAST):
            _without_zeros(edit, node)
        for node in edit.calls(*_TRANSPOSES):
            _without_double_transpose(edit, node)
        for node in edit.calls(*_VIEWS):
            _as_one_view(edit, node, named)
        for node in edit.calls(aten.expand.default):
            _without_expansion(edit, node)
        share_equal_calls(edit, lambda node: isinstance(node.meta.get("val"), Tensor))


def share_equal_calls(edit: Editor, wanted: Callable[[fx.Node], bool]) -> None:
    """Let calls of one operator with the same arguments be one call, of those that `wanted` says."""
    first: dict[str, fx.Node] = {}
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or not wanted(node):
            continue
        key = f"{node.target} {node.args} {node.kwargs}"
        if key in first:
            edit.replace(node, first[key])
        else:
            first[key] = node


def _without_zeros(edit: Editor, node: fx.Node) -> None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return
    for value, other in ((0, 1), (1, 0)):
        kept, zeros = node.args[value], node.args[other]
        nothing = isinstance(zeros, fx.Node) and zeros.target in _ZEROS
        if nothing and isinstance(kept, fx.Node) and _alike(kept, node):
            edit.replace(node, kept)
            return


def _without_double_transpose(edit: Editor, node: fx.Node) -> None:
    inner = operand(node)
    if inner.target in _TRANSPOSES:
        first, second = _order(inner), _order(node)
        if [first[axis] for axis in second] == list(range(len(first))):
            edit.replace(node, operand(inner))


def _order(node: fx.Node) -> list[int]:
    """Which axis of the argument is where in the result."""
    axes = list(range(operand(node).meta["val"].dim()))
    if node.target is aten.permute.default:
        return [axes[axis] for axis in node.args[1]]  # type: ignore[union-attr, index]
    first, second = node.args[1:3] if node.target is aten.transpose.int else axes[:1] + axes[-1:]
    axes[first], axes[second] = axes[second], axes[first]  # type: ignore[index]
    return axes


def _as_one_view(edit: Editor, node: fx.Node, named: set[fx.Node]) -> None:
    """What later passes know by a name stays."""
    source = operand(node)
    if (
        source.target not in _VIEWS
        or source in named
        or any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
    ):
        return
    while source.target in _VIEWS and source not in named:
        source = operand(source)
    shape = list(node.meta["val"].shape)
    if list(source.meta["val"].shape) == shape:
        edit.replace(node, source)
        return
    with edit.graph.inserting_before(node):
        edit.replace(node, edit.call(aten.reshape.default, source, shape))


def _without_expansion(edit: Editor, node: fx.Node) -> None:
    """Where every reader repeats it anyway, because its other argument has the whole shape."""
    source = operand(node)
    if source.meta["val"].dim() != node.meta["val"].dim():
        return
    readers: list[fx.Node] = [node]
    for reader in readers:  # a scaling in between is done before
        for user in reader.users:
            if user.target not in _BROADCAST:
                return
            others = [arg for arg in user.args if arg is not reader]
            if len(others) != 1 or user in edit.outputs.values():
                return
            if not isinstance(others[0], fx.Node):
                readers.append(user)
            elif others[0].meta["val"].shape != node.meta["val"].shape:
                return
    edit.replace(node, source)
    for reader in readers[1:]:
        reader.meta["val"] = source.meta["val"]


def _alike(one: Any, other: Any) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)
