"""The walk over a graph that gives every value its row layout, or raises with the node where rows meet."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mobizo_compiler.analysis.axes.layout import Adoption, Layout
from mobizo_compiler.analysis.axes.rules import CREATORS, MOVES, SHAPE_ONLY, Call, Layouts, RowsMix, find_rule
from mobizo_compiler.errors import NoAxisRuleError, RowMixingError
from mobizo_compiler.graph.nodes import operator_name, source_line

if TYPE_CHECKING:
    import sympy

# Symbols are replaced by large primes, which no other size is a multiple of: then all arithmetic is on plain numbers,
# and a size carries rows exactly where the prime of the rows divides it.
ROWS_PRIME = 1_000_003
OTHER_PRIMES = (1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099)


@dataclasses.dataclass(frozen=True)
class RowAxes:
    """The result of the analysis.

    Args:
        rows: The number of rows that sizes were computed with: the fixed number, or a prime in place of the symbol.
        layouts: Layout of every value; None for values without rows, a tuple for calls with several results.
        adoptions: What has to change before a graph with a fixed number of rows can have another number.
        row_numbers: Index calls whose given argument counts rows from 0 in a graph with a fixed number of rows.
    """

    rows: int
    layouts: Mapping[fx.Node, Layouts]
    adoptions: tuple[Adoption, ...]
    row_numbers: tuple[tuple[fx.Node, fx.Node, int], ...]

    def layout(self, node: fx.Node) -> Layout | None:
        """Layout of a value that is one tensor."""
        found = self.layouts[node]
        assert not isinstance(found, tuple), node
        return found


def row_axes(
    graph: fx.Graph,
    inputs: Mapping[str, int],
    fixed_rows: int | None = None,
    tensors: Mapping[fx.Node, Tensor] = MappingProxyType({}),
    *,
    leave_out: Collection[fx.Node] = frozenset(),
) -> RowAxes:
    """Find the layout of every value.

    Args:
        graph: A functional graph with `meta["val"]` everywhere.
        inputs: Row axis of each placeholder that carries rows.
        fixed_rows: The number of rows, where it is not symbolic.
        tensors: Parameters and constants by placeholder, to see which constants are equal for all rows.
        leave_out: Nodes to give no layout, with all that depends on them.

    Raises:
        RowMixingError: At a node, rows meet.
        NoAxisRuleError: A node with rows has an operator without a rule.
    """
    return _Walk(graph, inputs, fixed_rows, tensors).run(leave_out)


class _Walk:
    """State of one analysis; what rules may ask is in `Call`."""

    def __init__(
        self, graph: fx.Graph, inputs: Mapping[str, int], fixed_rows: int | None, tensors: Mapping[fx.Node, Tensor]
    ) -> None:
        self.graph, self.inputs = graph, inputs
        self.tensors, self.constants = tensors, dict[fx.Node, Any]()
        self.static = fixed_rows is not None
        self.rows = fixed_rows or ROWS_PRIME
        self.symbols: frozenset[sympy.Symbol] = frozenset()
        self.primes: dict[sympy.Symbol, int] = {}
        self.layouts: dict[fx.Node, Layouts] = {}
        self.adoptions: list[Adoption] = []
        self.row_numbers: list[tuple[fx.Node, fx.Node, int]] = []
        if not self.static:
            sizes = [n.meta["val"].shape[inputs[n.name]] for n in graph.nodes if n.name in inputs]
            self.symbols = frozenset(s for size in sizes for s in size.node.expr.free_symbols)

    def run(self, leave_out: Collection[fx.Node]) -> RowAxes:
        for node in self.graph.nodes:
            if node in leave_out:
                continue
            if node.op == "placeholder":
                axis = self.inputs.get(node.name)
                self.layouts[node] = None if axis is None else Layout(axis)
            elif node.op == "call_function":
                try:
                    self.layouts[node] = self.visit(node)
                    self.check(node)
                except RowsMix as mix:
                    raise RowMixingError(
                        f"the rows of the batch meet: {mix}",
                        where=source_line(node),
                        hint="every row must be computed from that row alone: remove the operation, or leave its "
                        "result out of the loss; put batch statistics into eval mode",
                    ) from None
        return RowAxes(self.rows, self.layouts, tuple(self.adoptions), tuple(self.row_numbers))

    def visit(self, node: fx.Node) -> Layouts:
        if node.target is operator.getitem:
            found = self.layouts[node.args[0]]  # type: ignore[index]
            return found[node.args[1]] if isinstance(found, tuple) else found  # type: ignore[index]
        value = node.meta.get("val")
        name = operator_name(node)
        with_rows = any(self.layouts[n] is not None for n in node.all_input_nodes)
        if not isinstance(value, (Tensor, tuple, list)):
            if with_rows and value is not None and not name.startswith("sym_"):
                raise RowsMix("an entry of a row becomes a number of the program")
            return None  # a number: checked where it is used
        if not hasattr(node.target, "_schema"):
            if not with_rows and not self.counts_rows(node):
                return tuple(None for _ in value) if isinstance(value, (tuple, list)) else None
            raise self.no_rule(node)
        call = Call(node, self)
        if name not in SHAPE_ONLY and self.counts_rows(node):
            raise RowsMix("the number of rows is used as a number")
        filled = call.args.get("fill_value")
        if isinstance(filled, fx.Node) and self.depends_on_rows(filled):
            raise RowsMix("the number of rows is used as a number")
        if not call.with_rows:
            return self.without_rows(call)
        rule = find_rule(node)
        if rule is None:
            raise self.no_rule(node)
        found = rule(call)
        several = found if isinstance(found, tuple) else (found,)
        if name not in MOVES and any(layout and layout.kind == "index" for layout in several):
            raise RowsMix("the numbers of the rows are used as values")
        return found

    def no_rule(self, node: fx.Node) -> NoAxisRuleError:
        """The error for an operator that rows cannot be followed through."""
        return NoAxisRuleError(
            f"no rule says how rows go through {operator_name(node)!r}",
            where=source_line(node),
            hint="a package can bring one, or mobizo_compiler.analysis.axes.axis_rule register one; or write the model "
            "without this operator",
        )

    def check(self, node: fx.Node) -> None:
        """The sizes of a result agree with its layout: its rows are in that axis, all of them, and in no other."""
        value, layouts = node.meta.get("val"), self.layouts[node]
        values = value if isinstance(value, (tuple, list)) else [value]
        for tensor, layout in zip(values, layouts if isinstance(layouts, tuple) else [layouts], strict=True):
            if not isinstance(tensor, Tensor) or 0 in tensor.shape:
                continue
            shape = [self.number(size) for size in tensor.shape]
            if layout and not layout.any_split and shape[layout.axis] != layout.outer * self.rows * layout.inner:
                raise RowsMix("some of the rows are left out or repeated")
            axis = None if layout is None else layout.axis
            others = [a for a, size in enumerate(shape) if size and size % self.rows == 0 and a != axis]
            if others and not self.static:
                raise RowsMix(f"axis {others[0]} of the result has one entry per row too")

    def without_rows(self, call: Call) -> Layouts:
        """Results of values without rows: only those that are made to size can have rows, equal ones."""
        if isinstance(call.node.meta["val"], (tuple, list)):
            return tuple(None for _ in call.node.meta["val"])
        found = [axis for axis, size in enumerate(call.out_shape) if not self.static and size and size % self.rows == 0]
        if not found:
            return None
        if len(found) == 1 and operator_name(call.node) in CREATORS:
            axis, name = found[0], operator_name(call.node)
            exact = call.out_shape[axis] == self.rows
            if name == "arange":
                return Layout(axis, kind="index") if exact and call.counts_from_zero() else None
            if name in ("expand", "repeat") and not exact:
                return Layout(axis, 1, call.out_shape[axis] // self.rows, "same")
            return Layout(axis, 1, 1, "same") if exact else Layout(axis, 0, 0, "same")
        raise RowsMix(f"a value of shape {call.shown(call.out_shape)} is made with one entry per row")

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that depends on parameters and constants alone; None if it depends on an input."""
        if node in self.tensors:
            return self.tensors[node]
        if node not in self.constants:
            inputs = {inner: self.constant(inner) for inner in node.all_input_nodes}
            self.constants[node] = None
            if node.op == "call_function" and all(value is not None for value in inputs.values()):
                args, kwargs = map_arg((node.args, node.kwargs), lambda inner: inputs[inner])
                with torch.no_grad():
                    self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.constants[node]

    # -- sizes -----------------------------------------------------------------------------------------------------

    def number(self, size: Any) -> int:
        """A size as a plain number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols - self.symbols - self.primes.keys(), key=str):
            self.primes[symbol] = OTHER_PRIMES[len(self.primes) % len(OTHER_PRIMES)]
        return int(expression.subs({**self.primes, **dict.fromkeys(self.symbols, self.rows)}))

    def counts_rows(self, node: fx.Node) -> bool:
        """Whether an argument is a number that depends on the number of rows."""
        return any(self.depends_on_rows(argument) for argument in node.all_input_nodes)

    def depends_on_rows(self, node: fx.Node) -> bool:
        """Whether a value is a number that depends on the number of rows."""
        value = node.meta.get("val")
        return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and bool(
            value.node.expr.free_symbols & self.symbols
        )
