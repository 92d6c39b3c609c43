"""Compute with vectors of one element where the model computes with tensors without axes.

Given:    %p_scale: f32[]   %e = exp(%p_scale) : f32[]          %y = mul(%x, %e) : f32[N, 3]
Result:   %v = reshape(%p_scale, [1])          %e = exp(%v) : f32[1]   %y = mul(%x, %e) : f32[N, 3]
Numbers: exact.

The Vulkan runtime cannot load a delegate that has a tensor without axes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mobizo_compiler.backends.vulkan.operators import POINTWISE, name_of
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
_SHAPING = (aten.reshape.default, aten.expand.default)


@dataclasses.dataclass(frozen=True)
class VectorsForScalars(Pass):
    """Give tensors without axes one axis, where elementwise operators read them."""

    needs = frozenset({facts.STATIC})

    def rewrite(self, edit: Editor) -> None:
        """In order, so that what is computed from such tensors has an axis too."""
        vectors: dict[fx.Node, fx.Node] = {}
        for node in list(edit.graph.nodes):
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            if node.target is aten.full.default and node.meta["val"].dim() == 0:
                with edit.graph.inserting_before(node):
                    options = {"dtype": node.meta["val"].dtype, **node.kwargs}
                    vectors[node] = edit.call(aten.full.default, [1], node.args[1], **options)
                continue
            scalars = [inner for inner in node.all_input_nodes if _is_scalar(inner)]
            if not scalars or (name_of(node) not in POINTWISE and node.target not in _SHAPING):
                continue
            with edit.graph.inserting_before(node):
                for inner in scalars:
                    if inner not in vectors:
                        vectors[inner] = edit.call(aten.reshape.default, inner, [1])
                replaced: Any = map_arg((node.args, node.kwargs), lambda inner: vectors.get(inner, inner))
                new = edit.call(node.target, *replaced[0], **replaced[1])
            if new.meta["val"].shape == node.meta["val"].shape:
                edit.replace(node, new)
            else:
                vectors[node] = new


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0
