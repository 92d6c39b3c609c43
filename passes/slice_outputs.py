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
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mobizo_compiler import facts
from mobizo_compiler.editor import Editor
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import slice_bounds
from mobizo_compiler.tokens import token_call

aten = torch.ops.aten
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class SliceOutputs(Pass):
    """Leave out the rows of a weight, and of its bias, whose results nobody reads.

    It runs after the adapters were inserted: what they add to is read whole.
    """

    needs = frozenset({facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """One layer at a time, with the elementwise calls between it and the slices."""
        for node in edit.calls(aten.linear.default):
            chain = _chain(node)
            slices = {user: read for user in chain[-1].users if (read := _read(user, chain[-1])) is not None}
            width = node.meta["val"].shape[-1]
            rows = _filled(sorted(set().union(*slices.values())), width)
            parameters = [inner for inner in node.args[1:] if isinstance(inner, fx.Node)]
            known = all(edit.tensor(inner) is not None for inner in parameters)
            if known and slices and len(slices) == len(chain[-1].users) and 2 * len(rows) <= width:
                _narrow(edit, chain, slices, rows)


def _filled(rows: list[int], width: int) -> list[int]:
    """The rows, and as many others behind them as make a multiple of `MULTIPLE`."""
    read = set(rows)
    others = (row for row in range(width) if row not in read)
    return rows + list(itertools.islice(others, -len(rows) % MULTIPLE))


def _chain(node: fx.Node) -> list[fx.Node]:
    """A call and those after it, as long as each is read by one call that treats every output for itself."""
    chain = [node]
    while len(chain[-1].users) == 1:
        last, user = chain[-1], next(iter(chain[-1].users))
        value = user.meta.get("val")
        axis = last.meta["val"].dim() - 1
        if not isinstance(value, Tensor) or _read(user, last) is not None:
            break
        call = token_call(user, value.dim() - 1, None)
        if call is None or call.axes != {last: axis} or call.size is not None:
            break
        chain.append(user)
    return chain


def _read(node: fx.Node, source: fx.Node) -> range | None:
    """The outputs that a slice of the last axis takes, or None if the call is none."""
    bounds = slice_bounds(node) if node.target is aten.slice.Tensor else None
    value = source.meta["val"]
    if bounds is None or bounds[0] != value.dim() - 1 or not isinstance(value.shape[-1], int):
        return None
    return range(*slice(*bounds[1:]).indices(value.shape[-1]))


def _narrow(edit: Editor, chain: list[fx.Node], slices: dict[fx.Node, range], rows: list[int]) -> None:
    narrow = {node: edit.some_rows(node, rows) for node in chain[0].args[1:] if isinstance(node, fx.Node)}
    for call in chain:
        with edit.graph.inserting_before(call):
            few = edit.call(call.target, *map_arg(call.args, lambda inner: narrow.get(inner, inner)), **call.kwargs)
        few.meta |= {name: value for name, value in call.meta.items() if name != "val"}
        narrow[call] = few
    for user, read in slices.items():
        start = rows.index(read.start)
        with edit.graph.inserting_before(user):
            edit.replace(user, edit.call(aten.slice.Tensor, narrow[chain[-1]], -1, start, start + len(read)))
