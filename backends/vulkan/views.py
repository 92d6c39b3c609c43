"""Reshapes of reshapes are one reshape: what the passes of this backend build them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand

aten = torch.ops.aten
_KEEP_ORDER = (
    aten.reshape.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)


def base(edit: Editor, node: fx.Node) -> fx.Node:
    """The value of which a node shows the same elements in the same order; a value that has a name stays."""
    while node.target in _KEEP_ORDER and node not in edit.values.values():
        node = operand(node)
    return node


def reshaped(edit: Editor, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    """The value in another shape, as one reshape or none."""
    source = base(edit, node)
    if tuple(source.meta["val"].shape) == tuple(shape):
        return source
    return edit.call(aten.reshape.default, source, list(shape))
