"""Questions about single nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import fx

FIRST_PRIME = 10_000  # among the primes: larger ones than most sizes are
# torchao's operators for rounding, of inputs and of weights.
CHOOSE, QUANTIZE, DEQUANTIZE = (
    f"torchao::{name}" for name in ("choose_qparams_affine", "quantize_affine", "dequantize_affine")
)


def operand(node: fx.Node, position: int = 0) -> fx.Node:
    """An argument of a call that is a node; torch.fx types arguments as nearly anything."""
    return cast(fx.Node, node.args[position])


def slice_bounds(node: fx.Node) -> tuple[int, int, int | None] | None:
    """Axis from the front, start and end of a slice; None if a bound is no number, or the step is not 1."""
    given: tuple[Any, ...] = node.args[1:]
    axis, start, end, step = given + (0, None, None, 1)[len(given) :]
    if step != 1 or not all(isinstance(bound, (int, type(None))) for bound in (start, end)):
        return None
    return axis % operand(node).meta["val"].dim(), start or 0, end


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes with all that they are made of."""
    found = set(nodes)
    pending = list(found)
    while pending:
        for inner in pending.pop().all_input_nodes:
            if inner not in found:
                found.add(inner)
                pending.append(inner)
    return found


def numbered_shapes(shapes: Sequence[Sequence[Any]]) -> list[tuple[int, ...]]:
    """Shapes with a prime in place of each symbol: equal where they are, however expressions are written."""
    import sympy  # takes as long to load as PyTorch, and only compiling needs it

    sizes = [size for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
    symbols = sorted({symbol for size in sizes for symbol in size.node.expr.free_symbols}, key=str)
    primes = {symbol: sympy.prime(FIRST_PRIME + index) for index, symbol in enumerate(symbols)}

    def number(size: Any) -> int:
        return int(size.node.expr.subs(primes)) if isinstance(size, torch.SymInt) else int(size)

    return [tuple(map(number, shape)) for shape in shapes]


def source_line(node: fx.Node) -> str:
    """The node's name with the user's own source line, for messages."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [line for line in reversed(trace) if line.startswith("File ")]
    place = next((line for line in places if "/torch/nn/" not in line), "")
    return f"%{node.name} ({node.target})" + (f", {place}" if place else "")


def operator_name(node: fx.Node) -> str:
    """Name of the operator, without overload; with its namespace if that is not aten."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema else getattr(node.target, "__name__", str(node.target))


def unrounded(node: fx.Node) -> fx.Node | None:
    """What a value was before torchao rounded it to integers and back; None if that is not what the node does."""
    if operator_name(node) == DEQUANTIZE and operator_name(operand(node)) == QUANTIZE:
        return operand(operand(node))
    return None
