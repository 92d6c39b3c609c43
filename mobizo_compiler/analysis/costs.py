"""What a call costs: bytes moved and multiply-adds, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.graph.nodes import operator_name

# The argument that is contracted over its last axis, by operator; for a convolution, the weight over all but its first.
_CONTRACTED = {"linear": 0, "mm": 0, "bmm": 0, "matmul": 0, "addmm": 1, "baddbmm": 1}
# Work and traffic in one unit: a core does about eight multiply-adds in the time in which it moves a byte.
MULTIPLY_ADDS_PER_BYTE = 8
_ATTENTION, _CONVOLUTION = "scaled_dot_product_attention", "conv"


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
    >>> y = graph.call_function(torch.ops.aten.linear.default, (x, w))
    >>> x.meta["val"], w.meta["val"], y.meta["val"] = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 5)
    >>> multiply_adds(y)
    30
    """
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return 0
    tensors = [a if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor) else None for a in node.args]
    return product_multiply_adds(operator_name(node), [a and shape_hint(a) for a in tensors], shape_hint(node))


def product_multiply_adds(operator: str, shapes: Sequence[Any], result: Sequence[int]) -> int:
    """Multiply-adds of an operator by its name without namespace, from the shapes of its arguments and its result."""
    if operator in _CONTRACTED:
        return int(math.prod(result) * shapes[_CONTRACTED[operator]][-1])
    if operator.startswith(_CONVOLUTION):
        return int(math.prod(result) * math.prod(shapes[1][1:]))
    if operator == _ATTENTION:  # queries with keys, then weights with values
        return int((math.prod(shapes[0]) + math.prod(result)) * shapes[1][-2])
    return 0


def work_bytes(node: fx.Node, read: Iterable[fx.Node]) -> int:
    """What computing a value costs, as bytes moved: itself, what it reads of others, and its multiply-adds."""
    traffic = tensor_bytes(node) + sum(map(tensor_bytes, read))
    return traffic + multiply_adds(node) // MULTIPLY_ADDS_PER_BYTE


def si(number: float) -> str:
    """A number in steps of a thousand.

    >>> si(1_250_000), si(16)
    ('1.25 M', '16 ')
    """
    steps = ["", "k", "M", "G", "T"]
    while number >= 1000 and len(steps) > 1:
        number /= 1000
        steps.pop(0)
    return f"{number:.3g} {steps[0]}"
