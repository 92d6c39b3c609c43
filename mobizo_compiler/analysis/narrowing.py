"""Which calls can be made for some positions of an axis alone, and how: the rules behind `passes/hoist_picks.py`.

A rule answers backwards: for the positions of this axis of my result, I need the same positions of those axes of my
arguments, and all of the other arguments. Where there is no rule, the positions are picked from the whole result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand, operator_name

Source = Callable[[fx.Node, int, int], fx.Node]

_ARITHMETIC = ("abs", "add", "addcmul", "clamp", "clamp_max", "clamp_min", "div", "floor_divide", "lerp", "maximum")
_MORE_ARITHMETIC = (
    "minimum",
    "mul",
    "neg",
    "pow",
    "reciprocal",
    "rsub",
    "sign",
    "square",
    "sub",
    "ceil",
    "masked_fill",
)
_FUNCTIONS = (
    "cos",
    "erf",
    "exp",
    "gelu",
    "log",
    "log1p",
    "rsqrt",
    "sigmoid",
    "silu",
    "sin",
    "softplus",
    "sqrt",
    "tanh",
)
_ACTIVATIONS = ("elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu")
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne", "logical_and", "logical_not", "logical_or", "where")
_COPIES = ("clone", "contiguous", "to", "_to_copy")
_POINTWISE = frozenset((*_ARITHMETIC, *_MORE_ARITHMETIC, *_FUNCTIONS, *_ACTIVATIONS, *_COMPARISONS, *_COPIES))
_LAST_AXES = frozenset({"layer_norm", "rms_norm"})
_ALONG = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax"})
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})


@dataclasses.dataclass(frozen=True)
class NarrowCall:
    """A call that can be made for picked positions.

    Args:
        axes: Arguments that are read at these positions only, with the axis in each.
        spread: Arguments without rows that are read at these positions, with the axis; where each row has positions of
            its own, they are given rows first.
        size: The size in a list of sizes that is the number of positions, if there is one.
        causal: Attention that looks back only; it gets a mask that says so.
    """

    axes: Mapping[fx.Node, int]
    spread: Mapping[fx.Node, int] = dataclasses.field(default_factory=dict)
    size: int | None = None
    causal: bool = False

    def apply(self, edit: Editor, node: fx.Node, count: int, source: Source) -> fx.Node:
        """Insert the call for the picked positions.

        Args:
            edit: The editor, with its insertion point.
            node: The whole call.
            count: How many positions are picked.
            source: An argument at the picked positions of an axis; a last argument above 0 asks for a value with rows
                and that many axes.
        """
        rank = node.meta["val"].dim()
        few = {inner: source(inner, axis, 0) for inner, axis in self.axes.items()}
        few |= {inner: source(inner, axis, rank) for inner, axis in self.spread.items()}
        args: list[Any] = list(map_arg(node.args, lambda inner: few.get(inner, inner)))
        if self.size is not None:
            args[1] = [count if position == self.size else size for position, size in enumerate(args[1])]
        if self.causal:
            queries, keys = operand(node), operand(node, 1)
            seen = edit.inline(_looks_back, queries, keys)
            args[3:] = [source(seen, rank - 2, rank), 0.0, False]
        call = edit.call(node.target, *args, **node.kwargs)
        call.meta |= {name: value for name, value in node.meta.items() if name != "val"}
        return call


def narrow_call(node: fx.Node, axis: int, rows: Any) -> NarrowCall | None:
    """How to make a call for some positions of an axis of its result, or None.

    Args:
        node: The call.
        axis: The axis, counted from the front.
        rows: The number of rows if each row has positions of its own (rows are then the first axis), else None.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not hasattr(node.target, "_schema"):
        return None
    if rows is not None and (axis == 0 or not equal_sizes(value.shape[0], rows)):
        return None
    found = _rule(node, axis, node.args)
    if found is None or rows is None:
        return found
    without = {inner: a for inner, a in found.axes.items() if not _has_rows(inner, rows, value.dim())}
    if without and operator_name(node) not in _POINTWISE | {"scaled_dot_product_attention"}:
        if any(not equal_sizes(inner.meta["val"].shape[0], rows) for inner in found.axes):
            return None
        return found
    axes = {inner: a for inner, a in found.axes.items() if inner not in without}
    if any(
        not equal_sizes(inner.meta["val"].shape[0], 1) and inner.meta["val"].dim() == value.dim() for inner in without
    ):
        return None
    return dataclasses.replace(found, axes=axes, spread=without)


def narrowable(
    graph: fx.Graph,
    picks: Container[fx.Node],
    picked_axis: Callable[[fx.Node, fx.Node], int | None],
    how: Callable[[fx.Node, int], NarrowCall | None],
) -> dict[fx.Node, NarrowCall]:
    """The calls that can be made for picked positions alone, because nobody reads their others; the last comes first.

    Args:
        graph: What they are in.
        picks: The calls that pick.
        picked_axis: The axis of a value along which a pick reads the positions alone; None if it reads others too.
        how: How to make a call for some positions of an axis of its result, or None.
    """
    calls: dict[fx.Node, NarrowCall] = {}
    for node in reversed(graph.nodes):
        axes = {
            picked_axis(node, user) if user in picks else calls[user].axes.get(node) if user in calls else None
            for user in node.users
        }
        axis = axes.pop() if len(axes) == 1 else None
        if node.op == "call_function" and axis is not None and (call := how(node, axis)) is not None:
            calls[node] = call
    return calls


def _rule(node: fx.Node, axis: int, args: Any) -> NarrowCall | None:
    name, shape = operator_name(node), node.meta["val"].shape
    rank = len(shape)
    if name in _POINTWISE:
        return _pointwise(node, axis)
    if name == "scaled_dot_product_attention":
        return _attention(node, axis)
    source = args[0]
    if name == "cat":
        along = int(args[1]) % rank if len(args) > 1 else 0
        return NarrowCall(dict.fromkeys(node.all_input_nodes, axis)) if axis != along else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], Tensor):
        return None
    before = source.meta["val"].shape
    if name == "linear":
        return NarrowCall({source: axis}) if axis != rank - 1 else None
    if name in ("matmul", "bmm"):
        left = axis == rank - 2 and source is not args[1] and len(before) == rank
        return NarrowCall({source: axis}) if left else None
    if name in _LAST_AXES:
        return NarrowCall({source: axis}) if axis < rank - len(args[1]) else None
    if name in _ALONG:
        return NarrowCall({source: axis}) if axis != int(args[1]) % rank else None
    if name in _REDUCTIONS:
        return _reduction(args, source, axis)
    if name in ("reshape", "view"):
        inner = _same_axis(shape, axis, before)
        return None if inner is None else NarrowCall({source: inner}, size=axis)
    if name == "expand":
        inner = axis - (rank - len(before))
        same = inner >= 0 and equal_sizes(before[inner], shape[axis])
        return NarrowCall({source: inner}, size=axis) if same and not equal_sizes(shape[axis], 1) else None
    inner = _moved(args, name, axis, len(before))
    return None if inner is None else NarrowCall({source: inner})


def _pointwise(node: fx.Node, axis: int) -> NarrowCall | None:
    shape, axes = node.meta["val"].shape, {}
    for inner in node.all_input_nodes:
        value = inner.meta["val"]
        if not isinstance(value, Tensor):
            return None
        own = axis - (len(shape) - value.dim())
        if own >= 0 and equal_sizes(value.shape[own], shape[axis]):
            axes[inner] = own
    return NarrowCall(axes) if axes else None


def _attention(node: fx.Node, axis: int) -> NarrowCall | None:
    query, key, value = (operand(node, position) for position in range(3))
    rank = node.meta["val"].dim()
    if axis != rank - 2 or query in (key, value):
        return None
    mask = node.args[3] if len(node.args) > 3 else None
    if len(node.args) > 5 and node.args[5]:
        return NarrowCall({query: axis}, causal=True) if mask is None else None
    axes = {query: axis}
    if isinstance(mask, fx.Node):
        own = mask.meta["val"].dim() - 2
        if own < 0 or mask in (query, key, value):
            return None
        if equal_sizes(mask.meta["val"].shape[own], node.meta["val"].shape[axis]):
            axes[mask] = own
    return NarrowCall(axes)


def _reduction(args: Any, source: fx.Node, axis: int) -> NarrowCall | None:
    rank = source.meta["val"].dim()
    if len(args) < 2 or not isinstance(args[1], (list, tuple)):
        return None
    reduced = {int(a) % rank for a in args[1]}
    kept = len(args) > 2 and bool(args[2])
    left = list(range(rank)) if kept else [a for a in range(rank) if a not in reduced]
    return NarrowCall({source: left[axis]}) if left[axis] not in reduced else None


def _moved(args: Any, name: str, axis: int, rank: int) -> int | None:
    """The axis of the argument of a call that moves axes, or works on others."""
    if name == "permute":
        return int(args[1][axis]) % rank
    if name == "transpose":
        pair = [int(a) % rank for a in args[1:3]]
        return pair[1 - pair.index(axis)] if axis in pair else axis
    if name == "unsqueeze":
        new = int(args[1]) % (rank + 1)
        return None if axis == new else axis - (axis > new)
    if name == "slice":
        return axis if axis != int(args[1]) % rank else None
    if name == "select":
        gone = int(args[1]) % rank
        return axis + (axis >= gone)
    return None


def _same_axis(shape: Any, axis: int, before: Any) -> int | None:
    """The axis of a shape that a reshape leaves as it is: of equal size, with as many entries below it."""
    below = [*shape[axis + 1 :]]
    for inner, size in enumerate(before):
        if (
            equal_sizes(size, shape[axis])
            and not equal_sizes(size, 1)
            and equal_sizes(math.prod(before[inner + 1 :]), math.prod(below))
        ):
            return inner
    return None


def _has_rows(node: fx.Node, rows: Any, rank: int) -> bool:
    value = node.meta["val"]
    return value.dim() == rank and equal_sizes(value.shape[0], rows)


def equal_sizes(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or expression; comparing symbols would add guards."""
    return str(a) == str(b)


def _looks_back(query: Tensor, key: Tensor) -> Tensor:
    """True where a query [..., targets, width] may look at a key, [1..., targets, sources]."""
    targets, sources = torch.arange(query.shape[-2]), torch.arange(key.shape[-2])
    return (sources[None, :] <= targets[:, None])[(None,) * (query.dim() - 2)]
