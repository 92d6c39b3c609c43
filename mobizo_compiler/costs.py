"""What a call costs: bytes moved and multiply-adds, from shapes alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.bmm.default, aten.matmul.default})
_CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default, aten.conv2d.padding}
)
_ATTENTION = aten.scaled_dot_product_attention.default


def size_hint(size: Any) -> int:
    """A size as a number; for a symbol, its value in the example inputs."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def shape_hint(node: fx.Node) -> tuple[int, ...]:
    """Shape of a tensor with numbers for symbols."""
    return tuple(size_hint(size) for size in node.meta["val"].shape)


def tensor_bytes(node: fx.Node) -> int:
    """Bytes of a value; 0 for what is no tensor, the sum for several tensors."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return sum(math.prod(map(size_hint, v.shape)) * v.element_size() for v in values if isinstance(v, Tensor))


def multiply_adds(node: fx.Node) -> int:
    """Multiply-adds of a matrix product, convolution or attention; 0 for everything else.

    >>> graph = fx.Graph()
    >>> x, w = graph.placeholder("x"), graph.placeholder("w")
    >>> y = graph.call_function(aten.linear.default, (x, w))
    >>> x.meta["val"], w.meta["val"], y.meta["val"] = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 5)
    >>> multiply_adds(y)
    30
    """
    if node.op != "call_function":
        return 0
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if node.target in _MATRIX_PRODUCTS or node.target is aten.linear.default:
        return math.prod(shape_hint(node)) * shape_hint(operands[0])[-1]
    if node.target is aten.addmm.default:
        return math.prod(shape_hint(node)) * shape_hint(operands[1])[-1]
    if node.target in _CONVOLUTIONS:
        return math.prod(shape_hint(node)) * math.prod(shape_hint(operands[1])[1:])
    if node.target is _ATTENTION:
        sources = shape_hint(operands[1])[-2]
        return math.prod(shape_hint(operands[0])) * sources + math.prod(shape_hint(node)) * sources
    return 0
