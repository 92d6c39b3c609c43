"""Multiply by the A of several adapters at once where they read the same value (query, key, value; gate, up).

Given:    tensor %a_0: f32[8, 576]    tensor %a_1: f32[8, 576]
          %h0 = linear(%x, %a_0)      %h1 = linear(%x, %a_1)
Result:   tensor %a: f32[16, 576]     %h = linear(%x, %a)
          %h0 = slice(%h, -1, 0, 8)   %h1 = slice(%h, -1, 8, 16)
Numbers: same up to rounding.

A product with eight columns reads all of its input to fill half a register; one with 24 takes hardly longer. The
layers' own weights are not merged: their results are wide, and cutting them apart would copy them.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.passes.insert_mp_lora import LORA_A

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class MergeSiblings(Pass):
    """Merge products with A that have the same input."""

    needs = frozenset({facts.SITES})
    numbers = "rounding"

    def rewrite(self, edit: Editor) -> None:
        """One group of siblings at a time."""
        siblings: dict[fx.Node, list[fx.Node]] = {}
        for node in edit.calls(aten.linear.default):
            if _is_lora_a(edit, operand(node, 1)):
                siblings.setdefault(operand(node), []).append(node)
        merged: dict[tuple[fx.Node, ...], fx.Node] = {}
        for source, nodes in siblings.items():
            weights = tuple(dict.fromkeys(operand(node, 1) for node in nodes))
            if len(weights) == 1:
                continue
            if weights not in merged:  # a layer that is called twice has its siblings twice
                merged[weights] = _concatenated(edit, weights)
            _merge(edit, source, nodes, weights, merged[weights])


def _is_lora_a(edit: Editor, node: fx.Node) -> bool:
    return (edit.tensor_name(node) or "").startswith(LORA_A)


def _concatenated(edit: Editor, weights: tuple[fx.Node, ...]) -> fx.Node:
    numbers = [(edit.tensor_name(weight) or "").removeprefix(LORA_A) for weight in weights]
    tensors = [tensor for weight in weights if (tensor := edit.tensor(weight)) is not None]
    return edit.add_constant(LORA_A + "_".join(numbers), torch.cat(tensors))


def _merge(edit: Editor, source: fx.Node, nodes: list[fx.Node], weights: tuple[fx.Node, ...], merged: fx.Node) -> None:
    with edit.graph.inserting_before(nodes[0]):
        hidden = edit.call(aten.linear.default, source, merged)
    ends = list(itertools.accumulate(int(weight.meta["val"].shape[0]) for weight in weights))
    parts = dict(zip(weights, itertools.pairwise([0, *ends]), strict=True))
    for node in nodes:
        with edit.graph.inserting_before(node):
            edit.replace(node, edit.call(aten.slice.Tensor, hidden, -1, *parts[operand(node, 1)]))
