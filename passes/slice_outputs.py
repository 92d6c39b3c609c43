"""Make only those outputs of a layer that are read.

Given:    tensor %p_head: f32[49152, 576]
          %logits = linear(%h, %p_head)              : f32[rows, 1, 49152]
          %no = slice(%logits, -1, 2318, 2319)       %yes = slice(%logits, -1, 1123, 1124)
Result:   tensor %p_head_rows: f32[8, 576]
          %few = linear(%h, %p_head_rows)            : f32[rows, 1, 8]
          %no = slice(%few, -1, 1, 2)                %yes = slice(%few, -1, 0, 1)
Numbers: same up to rounding.

A choice between answers reads a few words of the vocabulary. The head over all words is a fifth of the work of a small
language model at one position, and nearly all of the work of a step that starts from a prefix. The number of outputs
stays a multiple of eight: kernels make eight at once, and those for 4-bit weights take nothing else.

What is added to these outputs, by an adapter for example, is made for them alone as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mobizo_compiler.analysis.narrowing import NarrowCall, narrow_call, narrowable
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import slice_bounds
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class SliceOutputs(Pass):
    """Leave out the rows of a weight, and of its bias, whose results nobody reads."""

    needs = frozenset({facts.CANONICAL})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """One value at a time of which slices of the last axis are read, and nothing else."""
        for value in [node for node in edit.graph.nodes if isinstance(node.meta.get("val"), Tensor)]:
            slices = {user: read for user in value.users if (read := _read(user, value)) is not None}
            if slices and len(slices) == len(value.users):
                width = value.meta["val"].shape[-1]
                rows = _filled(sorted(set().union(*slices.values())), width)
                if 2 * len(rows) > width:
                    continue
                calls = narrowable(edit.graph, slices, lambda node, user: _last(node), lambda *call: _call(edit, *call))
                if any(call.target is aten.linear.default for call in calls):
                    _narrow(edit, calls, slices, rows)


def outputs_read(node: fx.Node) -> set[int] | None:
    """The entries of the last axis of a value that anything reads, or None if that may be all of them.

    Slices read some; calls that treat every entry for itself, what is read of their results.
    """
    found: set[int] = set()
    reached, pending = {node}, [node]
    while pending:
        value = pending.pop()
        for user in value.users:
            read = _read(user, value)
            if read is not None:
                found.update(read)
            elif not _entry_by_entry(user, value):
                return None
            elif user not in reached:
                reached.add(user)
                pending.append(user)
    return found


def _entry_by_entry(node: fx.Node, source: fx.Node) -> bool:
    """Whether a call makes every entry of the last axis of its result of the same entry of a value alone."""
    value = node.meta.get("val")
    call = narrow_call(node, value.dim() - 1, None) if isinstance(value, Tensor) else None
    return call is not None and call.axes.get(source) == _last(source)


def _last(node: fx.Node) -> int:
    return int(node.meta["val"].dim()) - 1


def _read(node: fx.Node, source: fx.Node) -> range | None:
    """The outputs that a slice of the last axis takes, or None if the call is none."""
    bounds = slice_bounds(node) if node.target is aten.slice.Tensor else None
    value = source.meta["val"]
    if bounds is None or bounds[0] != value.dim() - 1 or not isinstance(value.shape[-1], int):
        return None
    return range(*slice(*bounds[1:]).indices(value.shape[-1]))


def _filled(rows: list[int], width: int) -> list[int]:
    """The rows, and as many others behind them as make a multiple of `MULTIPLE`."""
    read = set(rows)
    others = (row for row in range(width) if row not in read)
    return rows + list(itertools.islice(others, -len(rows) % MULTIPLE))


def _call(edit: Editor, node: fx.Node, axis: int) -> NarrowCall | None:
    """How to make a call for some entries of an axis of its result, or None. A layer's are rows of its weight."""
    if axis == _last(node) and node.target is aten.linear.default:
        parameters = [inner for inner in node.args[1:] if isinstance(inner, fx.Node)]
        known = all(edit.tensor(inner) is not None for inner in parameters)
        return NarrowCall(dict.fromkeys(parameters, 0)) if known else None
    return narrow_call(node, axis, None)


def _narrow(edit: Editor, calls: dict[fx.Node, NarrowCall], slices: dict[fx.Node, range], rows: list[int]) -> None:
    value, few = next(iter(calls)), dict[fx.Node, fx.Node]()

    def source(node: fx.Node, axis: int, rank: int) -> fx.Node:
        if node in few:
            return few[node]
        fixed = edit.tensor(node) is not None and axis == 0
        return edit.some_rows(node, rows) if fixed else _picked(edit, node, axis, rows)

    for node in reversed(calls):
        with edit.graph.inserting_before(node):
            few[node] = calls[node].apply(edit, node, len(rows), source)
    for user, read in slices.items():
        start = rows.index(read.start)
        with edit.graph.inserting_before(user):
            edit.replace(user, edit.call(aten.slice.Tensor, few[value], -1, start, start + len(read)))


def _picked(edit: Editor, node: fx.Node, axis: int, rows: Sequence[int]) -> fx.Node:
    """Some entries of an axis, one slice for those that follow each other."""
    starts = [index for index, row in enumerate(rows) if index == 0 or row != rows[index - 1] + 1]
    lengths = [end - start for start, end in itertools.pairwise([*starts, len(rows)])]
    parts = [
        edit.call(aten.slice.Tensor, node, axis, rows[start], rows[start] + length)
        for start, length in zip(starts, lengths, strict=True)
    ]
    return edit.call(aten.cat.default, parts, axis) if len(parts) > 1 else parts[0]
