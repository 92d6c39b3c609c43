"""Pick the positions that are wanted as early as possible, instead of at the end.

Given:    %logits = linear(%h, %head)              : f32[rows, tokens, vocabulary]
          %g = gather(%logits, 1, expand(unsqueeze(%position, -1), [-1, -1, vocabulary]))
Result:   %h1 = gather(%h, 1, expand(unsqueeze(%position, -1), [-1, -1, width]))
          %g = linear(%h1, %head)                  : f32[rows, labels, vocabulary]
Numbers: same up to rounding.

A loss with `max_labels` reads a few positions of a row, and a classifier often the first one only. All others would go
through the widest layers of the network for nothing: 32 lanes of 128 tokens and 32,000 words are 524 MB of logits.
What reads a value token by token can read the wanted tokens alone: the head, norms, the last feed-forward block, and
the query side of the last attention. A value is made for the wanted tokens where nobody wants its others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from mobizo_compiler.analysis.narrowing import NarrowCall, equal_sizes, narrow_call, narrowable
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors, operand, slice_bounds
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class HoistPicks(Pass):
    """Move gathers, slices and selections along an axis up to where values for other positions are wanted too."""

    needs = frozenset({facts.CANONICAL})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """One group of equal picks at a time."""
        groups: dict[Any, dict[fx.Node, _Pick]] = {}
        for node in edit.graph.nodes:
            if pick := _pick(node):
                groups.setdefault((pick.key, str(operand(node).meta["val"].shape[pick.axis])), {})[node] = pick
        for picks in groups.values():
            _move_up(edit, picks)


@dataclasses.dataclass(frozen=True)
class _Pick:
    """A call that reads some positions of an axis: those that `of` takes from any value with that axis.

    Args:
        key: Equal for picks of the same positions.
        axis: The axis of the call's argument.
        count: How many positions.
        of: Inserts the picking of these positions from a value, given the axis.
        keeps_axis: Whether the axis is still there in the result of the call.
        by_row: The positions [rows, ...] where each row has its own; then rows must be the first axis of a value.
    """

    key: Any
    axis: int
    count: int
    of: Callable[[Editor, fx.Node, int], fx.Node]
    keeps_axis: bool = True
    by_row: fx.Node | None = None


def _pick(node: fx.Node) -> _Pick | None:
    """The pick that a call is, or None."""
    if node.target is aten.gather.default:
        return _gather(node)
    if node.target not in (aten.slice.Tensor, aten.select.int):
        return None
    whole = operand(node).meta["val"].shape
    rank = len(whole)
    if node.target is aten.select.int:
        selected: tuple[Any, ...] = node.args
        axis, start = selected[1] % rank, selected[2]
        if not isinstance(start, int) or axis in (0, rank - 1) or not _few(1, whole[axis]):
            return None
        end = None if start == -1 else start + 1
        return _Pick((start, end), axis, 1, _slicer(start, end), keeps_axis=False)
    bounds = slice_bounds(node)
    if bounds is None:
        return None
    axis, start, end = bounds
    count = node.meta["val"].shape[axis]
    if axis in (0, rank - 1) or not _few(count, whole[axis]):
        return None
    return _Pick((start, end), axis, count, _slicer(start, end))


def _slicer(start: int, end: int | None) -> Callable[[Editor, fx.Node, int], fx.Node]:
    return lambda edit, node, axis: edit.call(aten.slice.Tensor, node, axis, start, end)


def _gather(node: fx.Node) -> _Pick | None:
    """A gather along axis 1 that takes, in each row, the same positions for the whole last axis, or None.

    Its index is then [rows, positions, 1], expanded along the last axis and nowhere else.
    """
    index, whole = node.args[2], operand(node).meta["val"].shape
    if node.args[1] != 1 or len(whole) != 3 or not isinstance(index, fx.Node):
        return None
    if index.target is not aten.expand.default:
        return None
    position = operand(index)
    found, wide = position.meta["val"].shape, index.meta["val"].shape
    per_row = len(found) == 3 and equal_sizes(found[0], whole[0]) and equal_sizes(found[1], wide[1])
    if not per_row or not equal_sizes(found[2], 1) or not equal_sizes(wide[2], whole[2]):
        return None
    count = found[1]

    def gather(edit: Editor, source: fx.Node, axis: int) -> fx.Node:
        rank = source.meta["val"].dim()
        sizes: list[Any] = [1] * rank
        sizes[0], sizes[axis] = -1, count
        wide = [-1 if a in (0, axis) else size for a, size in enumerate(edit.sizes(source))]
        narrow = edit.call(aten.reshape.default, position, sizes) if (axis, rank) != (1, 3) else position
        return edit.call(aten.gather.default, source, axis, edit.call(aten.expand.default, narrow, wide))

    return _Pick(position, 1, count, gather, by_row=position) if _few(count, whole[1]) else None


def _few(count: Any, whole: Any) -> bool:
    """Whether picking early saves more than the picking costs; a dynamic number of positions is taken for large."""
    return isinstance(count, int) and (not isinstance(whole, int) or 2 * count <= whole)


def _move_up(edit: Editor, picks: Mapping[fx.Node, _Pick]) -> None:
    pick = next(iter(picks.values()))
    rows = operand(next(iter(picks))).meta["val"].shape[0]
    calls = narrowable(
        edit.graph,
        picks,
        lambda node, user: _picked_axis(node, user, picks[user]),
        lambda node, axis: narrow_call(node, axis, rows if pick.by_row else None),
    )
    if not calls or (pick.by_row and not _move_before(edit, pick.by_row, calls)):
        return
    picked: dict[tuple[fx.Node, int], fx.Node] = {}
    few: dict[fx.Node, fx.Node] = {}

    def source(node: fx.Node, axis: int, rank: int) -> fx.Node:
        if node in few:
            return few[node]
        if (node, axis) not in picked:
            wide = _with_rows(edit, node, rank, pick.by_row) if rank and pick.by_row else node
            picked[node, axis] = pick.of(edit, wide, axis + wide.meta["val"].dim() - node.meta["val"].dim())
        return picked[node, axis]

    for node in list(edit.graph.nodes):
        if node in calls:
            with edit.graph.inserting_before(node):
                few[node] = calls[node].apply(edit, node, pick.count, source)
        elif node in picks and operand(node) in few:
            value = few[operand(node)]
            if not picks[node].keeps_axis:
                with edit.graph.inserting_before(node):
                    value = edit.call(aten.select.int, value, picks[node].axis, 0)
            edit.replace(node, value)


def _move_before(edit: Editor, position: fx.Node, calls: Mapping[fx.Node, NarrowCall]) -> bool:
    """Compute the positions before the calls that they are for; False if they depend on one of them."""
    order = list(edit.graph.nodes)
    needed = ancestors([position])
    if not needed.isdisjoint(calls):
        return False
    first = next(node for node in order if node in calls)
    for node in order[order.index(first) :]:
        if node in needed:
            first.prepend(node)
    return True


def _with_rows(edit: Editor, node: fx.Node, rank: int, by_row: fx.Node) -> fx.Node:
    """A value without rows, with its entries once for each row and `rank` axes."""
    sizes = [1] * (rank - node.meta["val"].dim()) + edit.sizes(node)
    wide = edit.call(aten.reshape.default, node, sizes) if rank != node.meta["val"].dim() else node
    return edit.call(aten.expand.default, wide, [edit.call(aten.sym_size.int, by_row, 0), *[-1] * (rank - 1)])


def _picked_axis(node: fx.Node, user: fx.Node, pick: _Pick) -> int | None:
    """The axis along which a pick reads the picked positions of a value alone; None if it reads others too."""
    index = user.args[2] if user.target is aten.gather.default else None
    return pick.axis if operand(user) is node and index is not node else None
