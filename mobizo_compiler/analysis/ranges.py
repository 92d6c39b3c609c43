"""Which integers a graph looks up in tables: what inputs may hold, and positions that are read past the end.

Kernels do not check. An input that is looked up may hold the numbers of the entries of the table, however it is
reshaped on the way; positions that the graph counts itself (`arange`, sums of a mask) are bounded by sizes, and a table
that they exceed is refused before anything is lowered.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.errors import ExampleInputError
from mobizo_compiler.graph.nodes import operand, operator_name, source_line
from mobizo_compiler.graph.program import GraphProgram

# Operators whose results hold values of their first argument, and no others.
_SAME = frozenset(
    (
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "expand",
        "repeat",
        "slice",
        "select",
        "permute",
        "transpose",
        "t",
        "clone",
        "alias",
        "detach",
        "contiguous",
        "gather",
        "flip",
        "roll",
    )
)
_CASTS = frozenset(("to", "_to_copy", "type_as"))
_PICKS = frozenset(("index", "index_select", "amax", "amin", "cummax", "cummin"))
_TRUTH = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor"))
_LARGEST_CONSTANT = 1 << 24  # elements of a constant whose values are looked at


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and the greatest value of a tensor of integers, and whether longer rows would have greater ones."""

    low: int
    high: int
    grows: bool = False

    def joined(self, other: Bounds) -> Bounds:
        """Values of both."""
        return Bounds(min(self.low, other.low), max(self.high, other.high), self.grows or other.grows)


def input_ranges(program: GraphProgram) -> dict[str, tuple[int, int]]:
    """The least and the greatest value of every user input that is looked up in a table."""
    inputs = program.inputs
    found: dict[str, tuple[int, int]] = {}
    for table, index in _lookups(program):
        node = _origin(index)
        if node.name in inputs:
            entries = int(table.meta["val"].shape[0])
            found[node.name] = (0, min(entries - 1, found.get(node.name, (0, entries - 1))[1]))
    return found


def _origin(index: fx.Node) -> fx.Node:
    """What the numbers of an index were before they were reshaped and cast."""
    while operator_name(index) in _SAME or (operator_name(index) in _CASTS and _is_integer(operand(index))):
        index = operand(index)
    return index


def check_lookups(program: GraphProgram, example: Sequence[Tensor]) -> None:
    """Refuse tables that positions which the graph counts itself go beyond, for some mask.

    Bounds are known where they are reached: what two values make together, or a condition lets through, is not.

    Args:
        program: What was captured.
        example: The example inputs, in flat order: integers that are all 0 or 1 are taken for a mask.

    Raises:
        ExampleInputError: The message names the table, its length and, where rows are too long, how long they may be.
    """
    bounds = _Bounds(program, example)
    for table, index in _lookups(program):
        found, entries = bounds.of(index), int(table.meta["val"].shape[0])
        if found is None or found.high < entries or _origin(index).name in program.inputs:
            continue  # what an input holds is looked at in every call
        longest = index.meta["val"].shape[-1] if index.meta["val"].dim() else None
        fits = longest - (found.high - entries + 1) if found.grows and isinstance(longest, int) else 0
        raise _past_end(program, table, index, f"are read up to position {found.high}", fits)


def explain_lookup(program: GraphProgram, example: Sequence[Tensor]) -> None:
    """Say which table the example inputs go beyond, if they do.

    Raises:
        ExampleInputError: They do.
    """
    _CheckedRun(program).outputs(example)


def _past_end(program: GraphProgram, table: fx.Node, index: fx.Node, what: str, fits: int = 0) -> ExampleInputError:
    path = program.tensors().get(table.name, (table.name, None))[0]
    entries = int(table.meta["val"].shape[0])
    return ExampleInputError(
        f"the table {path!r} has {entries} entries, which {what}",
        where=source_line(next(iter(index.users))),
        hint=f"take rows of at most {fits} tokens, or a model with a longer table"
        if fits > 0
        else f"take numbers in 0..{entries - 1}, or a model with a longer table",
    )


def _lookups(program: GraphProgram) -> list[tuple[fx.Node, fx.Node]]:
    """Table and index of every lookup in a tensor that is no input."""
    tensors = program.tensors()
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        pair = _lookup(node)
        if pair is not None and pair[0].name in tensors and _is_integer(pair[1]):
            found.append(pair)
    return found


def _lookup(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    name = operator_name(node)
    if name == "embedding":
        return operand(node), operand(node, 1)
    if name == "index_select" and node.args[1] == 0:
        return operand(node), operand(node, 2)
    if name == "index":
        indices: Any = node.args[1]
        if len(indices) == 1 and isinstance(indices[0], fx.Node):
            return operand(node), indices[0]
    return None


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.dtype.is_floating_point and value.dtype != torch.bool


class _Bounds:
    """Bounds of values, each computed once."""

    def __init__(self, program: GraphProgram, example: Sequence[Tensor]) -> None:
        self.tensors = program.tensors()
        self.sizes = {symbol: size.high for symbol, size in program.dynamic.items()}
        self.inputs = dict(zip(program.inputs, example, strict=False))
        self.constants = {n: self.tensors[n.name][1] for n in program.graph.nodes if n.name in self.tensors}
        self.known: dict[fx.Node, Bounds | None] = {}
        for node in program.graph.nodes:
            value = node.meta.get("val")
            whole = isinstance(value, Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex
            self.known[node] = self._bounds(node) if whole else None

    def of(self, node: object) -> Bounds | None:
        """The bounds of an argument; None if they are not known."""
        if isinstance(node, fx.Node):
            return self.known.get(node)
        return Bounds(int(node), int(node)) if isinstance(node, (int, bool)) else None

    def size(self, size: Any) -> int | None:
        """The greatest value of a size; None for the number of rows where that is a symbol."""
        if isinstance(size, int):
            return size
        symbols = {str(symbol) for symbol in size.node.expr.free_symbols}
        if not symbols <= self.sizes.keys():
            return None
        return int(size.node.expr.subs({symbol: self.sizes[str(symbol)] for symbol in size.node.expr.free_symbols}))

    def _bounds(self, node: fx.Node) -> Bounds | None:
        if node.op == "placeholder":
            return self._of_tensor(node)
        if node.op != "call_function":
            return None
        name = operator_name(node)
        if name in _TRUTH or node.meta["val"].dtype == torch.bool:
            return Bounds(0, 1)
        if name in _SAME and (known := self._constant(node)) is not None:
            return known
        if name in _SAME or name in _CASTS or name in _PICKS:
            return self.of(node.args[0])
        rule = _RULES.get(name)
        return rule(self, node) if rule else None

    def _constant(self, node: fx.Node) -> Bounds | None:
        """The bounds of a part of a constant, which may be narrower than those of the whole."""
        source = self.constants.get(operand(node))
        if source is None or len(node.all_input_nodes) > 1 or not isinstance(node.args[0], fx.Node):
            return None
        with torch.no_grad():
            self.constants[node] = node.target(source, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return _of_values(self.constants[node])

    def _of_tensor(self, node: fx.Node) -> Bounds | None:
        if node.meta["val"].dtype == torch.bool:
            return Bounds(0, 1)
        if node.name in self.tensors:
            return _of_values(self.tensors[node.name][1])
        given = self.inputs.get(node.name)
        mask = given is not None and given.numel() > 0 and bool(((given == 0) | (given == 1)).all())
        return Bounds(0, 1) if mask else None


def _of_values(tensor: Tensor) -> Bounds | None:
    if not 0 < tensor.numel() <= _LARGEST_CONSTANT:
        return None
    return Bounds(int(tensor.min()), int(tensor.max()), grows=tensor.numel() > 1)


def _of_arange(bounds: _Bounds, node: fx.Node) -> Bounds | None:
    count = bounds.size(node.meta["val"].shape[0])
    start = node.args[0] if len(node.args) > 1 else 0
    step = node.args[2] if len(node.args) > 2 else 1
    if count is None or not isinstance(start, int) or not isinstance(step, int):
        return None
    last = start + step * (count - 1)
    return Bounds(min(start, last), max(start, last), grows=True)


def _of_sum(bounds: _Bounds, node: fx.Node) -> Bounds | None:
    found, shape = bounds.of(node.args[0]), operand(node).meta["val"].shape
    axes: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    sizes = [bounds.size(shape[axis]) for axis in ([axes] if isinstance(axes, int) else axes or range(len(shape)))]
    if found is None or any(size is None for size in sizes):
        return None
    count = math.prod(size for size in sizes if size is not None)
    return Bounds(min(found.low, found.low * count), max(found.high, found.high * count), grows=True)


def _of_argmax(bounds: _Bounds, node: fx.Node) -> Bounds | None:
    axis = node.args[1] if len(node.args) > 1 else None
    count = bounds.size(operand(node).meta["val"].shape[axis]) if isinstance(axis, int) else None
    return None if count is None else Bounds(0, count - 1, grows=True)


def _arithmetic(combine: Callable[[int, int], int], of: int = -1) -> Callable[[_Bounds, fx.Node], Bounds | None]:
    def rule(bounds: _Bounds, node: fx.Node) -> Bounds | None:
        left, right = bounds.of(node.args[0]), bounds.of(node.args[1])
        if left is None or right is None or node.kwargs.get("alpha", 1) != 1:
            return None
        if not any(one.low == one.high or (one.low >= 0 and one.high <= of) for one in (left, right)):
            return None
        ends = [combine(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
        return Bounds(min(ends), max(ends), left.grows or right.grows)

    return rule


def _of_clamp(bounds: _Bounds, node: fx.Node) -> Bounds | None:
    found, given = bounds.of(node.args[0]), {**dict(zip(("min", "max"), node.args[1:], strict=False)), **node.kwargs}
    low, high = given.get("min"), given.get("max")
    if found is None or not isinstance(low, (int, type(None))) or not isinstance(high, (int, type(None))):
        return None
    ends = [max(end, low) if low is not None else end for end in (found.low, found.high)]
    ends = [min(end, high) if high is not None else end for end in ends]
    return Bounds(ends[0], ends[1], found.grows)


def _of_remainder(bounds: _Bounds, node: fx.Node) -> Bounds | None:
    divisor = node.args[1]
    return Bounds(0, divisor - 1) if isinstance(divisor, int) and divisor > 0 else None


def _of_parts(bounds: _Bounds, node: fx.Node) -> Bounds | None:
    parts: Any = node.args[0]
    found = [bounds.of(part) for part in parts]
    known = [one for one in found if one is not None]
    if len(known) < len(found) or not known:
        return None
    return functools.reduce(Bounds.joined, known)


def _of_fill(position: int) -> Callable[[_Bounds, fx.Node], Bounds | None]:
    return lambda bounds, node: bounds.of(node.args[position]) if len(node.args) > position else None


_RULES: Mapping[str, Callable[[_Bounds, fx.Node], Bounds | None]] = {
    "arange": _of_arange,
    "cumsum": _of_sum,
    "sum": _of_sum,
    "argmax": _of_argmax,
    "argmin": _of_argmax,
    "add": _arithmetic(lambda a, b: a + b),
    "sub": _arithmetic(lambda a, b: a - b),
    "mul": _arithmetic(lambda a, b: a * b, of=1),
    "neg": lambda bounds, node: _negated(bounds.of(node.args[0])),
    "rsub": _arithmetic(lambda a, b: b - a),
    "clamp": _of_clamp,
    "clamp_min": _of_clamp,
    "remainder": _of_remainder,
    "cat": _of_parts,
    "stack": _of_parts,
    "full": _of_fill(1),
    "full_like": _of_fill(1),
    "new_full": _of_fill(2),
    "scalar_tensor": _of_fill(0),
    "zeros": lambda bounds, node: Bounds(0, 0),
    "zeros_like": lambda bounds, node: Bounds(0, 0),
    "new_zeros": lambda bounds, node: Bounds(0, 0),
    "ones": lambda bounds, node: Bounds(1, 1),
    "ones_like": lambda bounds, node: Bounds(1, 1),
    "new_ones": lambda bounds, node: Bounds(1, 1),
}


def _negated(found: Bounds | None) -> Bounds | None:
    return None if found is None else Bounds(-found.high, -found.low, found.grows)


class _CheckedRun(fx.Interpreter):
    """Runs a program and looks at every index before it is used."""

    def __init__(self, program: GraphProgram) -> None:
        super().__init__(program.exported.graph_module)
        self._program = program

    def outputs(self, inputs: Sequence[Tensor]) -> Any:
        """What the program returns for these inputs."""
        tensors = self._program.tensors()
        given = iter(inputs)
        placeholders = [node for node in self._program.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            return self.run(*(tensors[n.name][1] if n.name in tensors else next(given) for n in placeholders))

    def run_node(self, n: fx.Node) -> Any:
        pair = _lookup(n) if n.op == "call_function" else None
        if pair is not None:
            table, index = (self.env[node] for node in pair)
            if isinstance(index, Tensor) and not index.dtype.is_floating_point and index.dtype != torch.bool:
                least, greatest = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
                if greatest >= table.shape[0] or least < (0 if operator_name(n) == "embedding" else -table.shape[0]):
                    outside = greatest if greatest >= table.shape[0] else least
                    raise _past_end(self._program, pair[0], pair[1], f"the example inputs read at position {outside}")
        return super().run_node(n)
