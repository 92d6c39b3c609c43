"""Make noise, lanes and update for one part of the parameters at a time, so that few of them are in memory at once.

Given:    %z = ... of seed        : f32[q, P]
          %lanes = cat([add(%state, %step), sub(%state, %step)])               : f32[2q, P]
          %b = slice(%lanes, 1, 100, 130)
          update %state <- sub(%state, mul(sum(mul(%z, %g), [0]), %rate))
Result:   %z0 = ... of seed       : f32[q, 64]       made of arange(32, 64) in place of arange(P / 2)
          %lanes0 = cat([...])    : f32[2q, 64]      %b = slice(%lanes0, 1, 36, 66)
          update %state <- cat([sub(slice(%state, 0, 0, 64), ...), ...])
Numbers: exact.

A number of the noise depends on its position and the seed alone, and making it again costs less than keeping it: with
16 queries, noise and lanes of all adapters of a model of a billion parameters are 1.2 GB beside weights of 2.2 GB.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.backends.aot_inductor.sums_in_order import update_calls
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand, slice_bounds
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
_CONVERSIONS = (aten.to.dtype, aten._to_copy.default)
_SUMS = (aten.sum.dim_IntList, aten.mean.dim)


@dataclasses.dataclass(frozen=True)
class NoiseInParts(Pass):
    """Cut what is made of the noise into parts.

    Args:
        part_bytes: Size of a part of the lanes; no cut is made inside of a layer's adapter.
    """

    part_bytes: int = 32 << 20
    needs = frozenset({facts.STATIC})
    breaks = frozenset({facts.SITES, facts.LANES, facts.PERTURBED})  # no value holds all lanes any more

    def rewrite(self, edit: Editor) -> None:
        """Lanes where they are first used, then the update. What is not made of elementwise calls stays whole."""
        lanes = edit.values.get("lanes")
        count = 1 if lanes is None else lanes.meta["val"].shape[0]
        if lanes is not None and count > 1:
            self._lanes(edit, lanes, self.part_bytes // (4 * count))
        self._update(edit)

    def _lanes(self, edit: Editor, lanes: fx.Node, size: int) -> None:
        slices = {user: slice_bounds(user) for user in lanes.users if user.target is aten.slice.Tensor}
        width = lanes.meta["val"].shape[1]
        if len(slices) < len(lanes.users) or any(bounds is None or bounds[0] != 1 for bounds in slices.values()):
            return
        spans = {user: (bounds[1], min(width, bounds[2] or width)) for user, bounds in slices.items() if bounds}
        order = [node for node in edit.graph.nodes if node in spans]
        for start, end in _parts(sorted(set(spans.values())), size):
            inside = [node for node in order if start <= spans[node][0] and spans[node][1] <= end]
            narrow = _Narrowing(edit)
            with edit.graph.inserting_before(inside[0]):
                part = narrow(lanes, 1, start, end)
            for node in inside:
                with edit.graph.inserting_before(node):
                    first, last = spans[node]
                    edit.replace(node, edit.call(aten.slice.Tensor, part, 1, first - start, last - start))

    def _update(self, edit: Editor) -> None:
        calls, new = update_calls(edit), edit.new_state
        noise = [node for node in calls if node.target is aten.mul.Tensor and node.meta["val"].dim() == 2]
        if new is None or not noise:
            return
        queries, parameters = max((node.meta["val"].shape for node in noise), key=lambda shape: shape[1])
        size = self.part_bytes // (4 * queries)
        if parameters <= size or any(_sums_over(node, parameters) for node in calls):
            return
        total = new.meta["val"].shape[0]
        ends = [*range(size - size % 2, total, size - size % 2), total]
        parts = []
        with edit.graph.inserting_before(edit.graph.output_node()):
            for start, end in itertools.pairwise([0, *ends]):
                parts.append(_Narrowing(edit)(new, 0, start, end))
            edit.replace(new, edit.call(aten.cat.default, parts))


def _parts(spans: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Neighbouring spans together, as long as they have at most so many elements; overlapping ones always."""
    parts: list[tuple[int, int]] = []
    for start, end in spans:
        if parts and (start < parts[-1][1] or end - parts[-1][0] <= size):
            parts[-1] = parts[-1][0], max(end, parts[-1][1])
        else:
            parts.append((start, end))
    return parts


def _sums_over(node: fx.Node, parameters: int) -> bool:
    """Whether a call sums over all parameters, as a rule does that wants the size of the whole estimate."""
    axes: Any = node.args[1] if node.target in _SUMS else []
    return any(operand(node).meta["val"].shape[axis] == parameters for axis in axes)


class _Narrowing:
    """Makes part of a value from parts of what it is made of."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._known: dict[tuple[fx.Node, int, int, int], fx.Node] = {}

    def __call__(self, node: fx.Node, axis: int, start: int, end: int) -> fx.Node:
        """Entries start..end of a value along an axis, as new calls at the insertion point."""
        if (start, end) == (0, node.meta["val"].shape[axis]):
            return node
        key = (node, axis, start, end)
        if key not in self._known:
            self._known[key] = self._made(node, axis, start, end)
        return self._known[key]

    def _made(self, node: fx.Node, axis: int, start: int, end: int) -> fx.Node:
        call, shape = self._edit.call, node.meta["val"].shape
        target: Any = node.target
        if node.op == "call_function":
            if target is aten.arange.default:
                return call(aten.arange.start, start, end, **node.kwargs)
            if target in _CONVERSIONS or torch.Tag.pointwise in getattr(target, "tags", ()):
                return call(target, *(self._operand(a, shape, axis, start, end) for a in node.args), **node.kwargs)
            if target is aten.embedding.default and axis < len(shape) - 1:
                table: Any = node.args[0]
                return call(target, table, self(operand(node, 1), axis, start, end))
            if target is aten.cat.default:
                return self._joined(node, axis, start, end)
            if target in _SUMS:
                outer = self._before_sum(node, axis)
                return call(target, self(operand(node), outer, start, end), *node.args[1:], **node.kwargs)
            if target is aten.slice.Tensor and (bounds := slice_bounds(node)) is not None:
                if bounds[0] == axis:
                    return self(operand(node), axis, bounds[1] + start, bounds[1] + end)
                return call(target, self(operand(node), axis, start, end), *node.args[1:])
            if target is aten.reshape.default and (made := self._reshaped(node, axis, start, end)) is not None:
                return made
        return call(aten.slice.Tensor, node, axis, start, end)

    def _operand(self, value: Any, shape: Any, axis: int, start: int, end: int) -> Any:
        """The part of an operand that a part of an elementwise result needs; what is broadcast stays."""
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
            return value
        own = axis - (len(shape) - value.meta["val"].dim())
        return value if own < 0 or value.meta["val"].shape[own] == 1 else self(value, own, start, end)

    def _list(self, node: fx.Node) -> list[fx.Node]:
        parts: Any = node.args[0]
        return list(parts)

    def _before_sum(self, node: fx.Node, axis: int) -> int:
        """The axis of what is summed that an axis of the sum is; one of the axes that are summed has one entry then."""
        axes: Any = node.args[1]
        if len(node.args) > 2 and node.args[2]:
            return axis
        rank = operand(node).meta["val"].dim()
        return [a for a in range(rank) if a not in {inner % rank for inner in axes}][axis]

    def _joined(self, node: fx.Node, axis: int, start: int, end: int) -> fx.Node:
        parts, along = self._list(node), (node.args[1] if len(node.args) > 1 else 0)
        if along != axis:
            return self._edit.call(aten.cat.default, [self(part, axis, start, end) for part in parts], along)
        found, offset = [], 0
        for part in parts:
            size = part.meta["val"].shape[axis]
            first, last = max(start, offset), min(end, offset + size)
            if first < last:
                found.append(self(part, axis, first - offset, last - offset))
            offset += size
        return found[0] if len(found) == 1 else self._edit.call(aten.cat.default, found, axis)

    def _reshaped(self, node: fx.Node, axis: int, start: int, end: int) -> fx.Node | None:
        """Where a reshape adds an axis of size 1 in front or behind, or makes one axis of the last two."""
        call, source = self._edit.call, operand(node)
        before, after = tuple(source.meta["val"].shape), tuple(node.meta["val"].shape)
        if after == (1, *before):
            part = self(source, axis - 1, start, end)
            return call(aten.reshape.default, part, [1, *part.meta["val"].shape])
        if after == (*before, 1):
            part = self(source, axis, start, end)
            return call(aten.reshape.default, part, [*part.meta["val"].shape, 1])
        if before[:-2] == after[:-1] and axis == len(after) - 1 and len(before) == len(after) + 1:
            width = before[-1]
            first, last = start // width, -(-end // width)
            part = self(source, axis, first, last)
            part = call(aten.reshape.default, part, [*after[:-1], (last - first) * width])
            if (last - first) * width == end - start:
                return part
            return call(aten.slice.Tensor, part, axis, start - first * width, end - first * width)
        return None
