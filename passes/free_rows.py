"""Make a graph that was captured with a fixed number of rows right for any number.

Given:    input %x: f32[3, 5, 12]              %v = reshape(%x, [15, 12])      %c = cat([%ones, %v2], 1)
Result:   input %x: f32[3, 5, 12]              %v = reshape(%x, [-1, 12])
          %n = sym_size(%v2, 0)                %e = expand(slice(%ones, 0, 0, 1), [%n, 1, 12])
          %c = cat([%e, %v2], 1)
Numbers: exact.

The axis analysis says where the rows are in every value, so every size that stands for the rows is known; sizes that
merely are the same number stay. A value without rows whose size is the number of rows is taken along only if all its
entries along that axis are equal. What cannot be proved right is refused. A graph with symbolic rows is left alone.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler.analysis.axes import Adoption, Layout, RowAxes, row_axes
from mobizo_compiler.errors import FixedRowsError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand, operator_name, source_line
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
_RESHAPES = ("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as")


@dataclasses.dataclass(frozen=True)
class FreeRows(Pass):
    """Replace sizes that stand for the number of rows."""

    needs = frozenset({facts.FUNCTIONAL})
    gives = frozenset({facts.ANY_ROWS})

    def rewrite(self, edit: Editor) -> None:
        """Raise `RowMixingError`, `NoAxisRuleError` or `FixedRowsError` with the node that stands in the way."""
        rows = edit.before.fixed_rows
        if rows is None:
            return
        found = row_axes(edit.graph, edit.rows, rows, edit.tensors)
        for node, layout in found.layouts.items():
            if isinstance(layout, Layout) and node.op == "call_function":
                _free(edit, node, layout)
        for adoption in found.adoptions:
            _adopt(edit, found, adoption)
        for user, numbers, axis in found.row_numbers:
            _renumber(edit, found, user, numbers, axis)
        _check(edit, rows)


def _free(edit: Editor, node: fx.Node, layout: Layout) -> None:
    """Let the size of the row axis follow from the operand."""
    name, shape = operator_name(node), list(node.meta["val"].shape)
    if name in _RESHAPES:
        node.target, node.kwargs = aten.reshape.default, {}
        node.args = (operand(node), [-1 if axis == layout.axis else size for axis, size in enumerate(shape)])
    elif name == "expand":
        node.args = (operand(node), [-1 if axis == layout.axis else size for axis, size in enumerate(shape)])
    elif name == "slice" and operand(node).meta["val"].shape == node.meta["val"].shape:
        edit.replace(node, operand(node))
    elif name == "native_group_norm":
        raise FixedRowsError("the number of rows is an argument of this call", where=source_line(node))


def _adopt(edit: Editor, found: RowAxes, adoption: Adoption) -> None:
    """One entry along the axis broadcasts to any number of rows; where nothing broadcasts, expand it."""
    user, value, axis = adoption.user, adoption.value, adoption.axis
    with edit.graph.inserting_before(user):
        single = value
        if value.meta["val"].shape[axis] != 1:
            single = edit.call(aten.slice.Tensor, value, axis, 0, 1)
        if not adoption.broadcasts:
            other = next(n for n in user.all_input_nodes if found.layouts.get(n) is not None)
            layout = found.layout(other)
            assert layout is not None
            count = edit.call(aten.sym_size.int, other, layout.axis)
            sizes = [count if a == axis else -1 for a in range(value.meta["val"].dim())]
            single = edit.call(aten.expand.default, single, sizes)
    user.replace_input_with(value, single)


def _renumber(edit: Editor, found: RowAxes, user: fx.Node, numbers: fx.Node, axis: int) -> None:
    """Count the rows there are."""
    source = operand(user)
    layout = found.layout(source)
    assert layout is not None
    with edit.graph.inserting_before(user):
        count = edit.call(aten.sym_size.int, source, layout.axis)
        counted = edit.call(
            aten.arange.default, count, dtype=numbers.meta["val"].dtype, device=torch.device("cpu"), pin_memory=False
        )
        rank = numbers.meta["val"].dim()
        shaped = edit.call(aten.reshape.default, counted, [-1 if a == axis else 1 for a in range(rank)])
    user.replace_input_with(numbers, shaped)


def _check(edit: Editor, rows: int) -> None:
    """Compute all sizes for one more row; every one that carried the rows must have grown in proportion."""

    def inputs(count: int) -> dict[str, torch.Tensor]:
        values = {}
        with edit.mode:
            for name, node in edit.inputs.items():
                shape = node.meta["val"].shape
                sizes = [count if edit.rows.get(name) == axis else size for axis, size in enumerate(shape)]
                values[name] = torch.empty(sizes, dtype=node.meta["val"].dtype)
        return values

    edit.refresh(inputs(rows))
    before = {name: tuple(node.meta["val"].shape) for name, node in edit.outputs.items()}
    try:
        edit.refresh(inputs(rows + 1))
        after = {name: tuple(node.meta["val"].shape) for name, node in edit.outputs.items()}
        edit.refresh(inputs(rows))
    except Exception as error:
        raise FixedRowsError(
            f"the graph was captured with {rows} rows and does not run with {rows + 1}: {error}",
            hint="export with a dynamic batch: dynamic_shapes={...: {0: torch.export.Dim('rows', min=2)}}",
        ) from error
    grown = {name: (shape[0] // rows * (rows + 1), *shape[1:]) for name, shape in before.items()}
    if after != grown:
        raise FixedRowsError(f"with {rows + 1} rows the results have the shapes {after}, not {grown}")
