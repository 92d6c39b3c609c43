"""Example inputs: what a user passes to `compile`, with every tensor's name, row axis and dynamic sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mobizo_compiler.errors import ExampleInputError
from mobizo_compiler.upstream import pytree

ExampleInputs = Sequence[Any] | Mapping[str, Any]
RowAxes = Mapping[str | int, int | None]
DynamicShapes = Mapping[str, Mapping[int, Any]] | Sequence[Mapping[int, Any] | None]
HALVES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of the example inputs.

    Args:
        name: Keyword or position, with the path inside of it: `input_ids`, `0`, `states.1`.
        tensor: The example; float32 for one in half precision.
        row_axis: The axis that carries the rows; None if the input has none and all lanes share it.
        dims: Axes with a dynamic size, as `torch.export.Dim`.
    """

    name: str
    tensor: Tensor
    row_axis: int | None
    dims: Mapping[int, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """Checked example inputs.

    Args:
        inputs: As the user gave them; keywords in the order of the program.
        leaves: The tensors, in flat order.
        fixed: The other values, by name: they are fixed by the capture.
        rows: The number of rows.
    """

    inputs: ExampleInputs
    leaves: tuple[Leaf, ...]
    fixed: Mapping[str, Any]
    rows: int

    @property
    def keywords(self) -> bool:
        """Whether inputs are passed by name."""
        return isinstance(self.inputs, Mapping)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in flat order."""
        return [leaf.tensor for leaf in self.leaves]

    @property
    def rows_dim(self) -> Any:
        """The user's dynamic size of the row axis, if there is one."""
        found = (leaf.dims.get(leaf.row_axis) for leaf in self.leaves if leaf.row_axis is not None)
        return next((dim for dim in found if dim is not None), None)

    def mapped(self, change: Any) -> Any:
        """The inputs with every tensor replaced by `change(leaf)`; other values stay."""
        given = iter(self.leaves)
        leaves, spec = pytree.tree_flatten(self.inputs)
        changed = [change(next(given)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(changed, spec)


def flat_names(inputs: ExampleInputs) -> list[tuple[str, Any]]:
    """Name and value of every leaf.

    >>> flat_names({"a": 1, "b": (2, 3)})
    [('a', 1), ('b.0', 2), ('b.1', 3)]
    """
    paths, _ = pytree.tree_flatten_with_path(inputs)
    return [(".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), v) for path, v in paths]


def bind_example(
    model: object,
    example_inputs: ExampleInputs,
    row_axes: RowAxes | None = None,
    dynamic_shapes: DynamicShapes | None = None,
) -> Example:
    """Check example inputs and find the rows of each.

    The first input has its rows in its first axis, and so has every input of as many; an input without axes, or with a
    first axis of size 1 where there are more rows, has none. `row_axes` says otherwise.

    Raises:
        ExampleInputError: They are not tensors with one common number of rows, or do not fit an `ExportedProgram`.
    """
    if not isinstance(example_inputs, (Mapping, tuple, list)):
        raise ExampleInputError(
            f"example_inputs must be a tuple of tensors or a dict, not {type(example_inputs).__name__}"
        )
    ordered = _in_program_order(model, example_inputs)
    ordered = _distinct(dict(ordered) if isinstance(ordered, Mapping) else tuple(ordered))
    values = flat_names(ordered)
    tensors = {name: value for name, value in values if isinstance(value, Tensor)}
    if not tensors:
        raise ExampleInputError("example_inputs are empty: no tensor is among them")
    for name, value in values:
        if not isinstance(value, (Tensor, int, float, bool, str, type(None))):
            raise ExampleInputError(f"input {name!r} is a {type(value).__name__}, which no program can take")
    axes = _row_axes(tensors, {str(key): axis for key, axis in (row_axes or {}).items()})
    rows = {name: int(tensors[name].shape[axis]) for name, axis in axes.items() if axis is not None}
    if not rows:
        raise ExampleInputError("no input has rows", hint="name the row axis of an input: row_axes={name: axis}")
    first = next(iter(rows))
    for name, count in rows.items():
        if count != rows[first]:
            raise ExampleInputError(
                f"input {name!r} has {count} rows, input {first!r} has {rows[first]}",
                hint=f"axis 0 is taken for the rows; otherwise row_axes={{{name!r}: axis, or None for no rows}}",
            )
    if not rows[first]:
        raise ExampleInputError(f"input {first!r} has no rows: its shape is {tuple(tensors[first].shape)}")
    dims = _dims(tensors, dynamic_shapes)
    if not isinstance(model, ExportedProgram):  # which takes what it was exported with
        tensors = {name: tensor.float() if tensor.dtype in HALVES else tensor for name, tensor in tensors.items()}
    leaves = tuple(Leaf(name, tensor, axes[name], dims.get(name, {})) for name, tensor in tensors.items())
    fixed = {name: value for name, value in values if not isinstance(value, Tensor)}
    return Example(ordered, leaves, fixed, rows[first])


def _row_axes(tensors: Mapping[str, Tensor], given: Mapping[str, int | None]) -> dict[str, int | None]:
    for name, axis in given.items():
        if name not in tensors:
            raise ExampleInputError(f"row_axes names input {name!r}; the inputs are {list(tensors)}")
        if axis is not None and not -tensors[name].dim() <= axis < tensors[name].dim():
            raise ExampleInputError(f"row_axes[{name!r}] is {axis}, the input has {tensors[name].dim()} axes")
    rows = next((t.shape[0] for n, t in tensors.items() if n not in given and t.dim()), 1)
    rows = next((tensors[n].shape[a] for n, a in given.items() if a is not None), rows)
    axes: dict[str, int | None] = {}
    for name, tensor in tensors.items():
        if name in given:
            axis = given[name]
            axes[name] = None if axis is None else axis % tensor.dim()
        else:
            shared = tensor.dim() == 0 or (tensor.shape[0] == 1 and rows > 1)
            axes[name] = None if shared else 0
    return axes


def _dims(tensors: Mapping[str, Tensor], shapes: DynamicShapes | None) -> dict[str, dict[int, Any]]:
    """Dynamic sizes by input, checked."""
    if shapes is None:
        return {}
    if not isinstance(shapes, (Mapping, tuple, list)):
        raise ExampleInputError(f"dynamic_shapes must be a dict or a tuple, not {type(shapes).__name__}")
    pairs = shapes.items() if isinstance(shapes, Mapping) else zip(map(str, range(len(shapes))), shapes, strict=True)
    found: dict[str, dict[int, Any]] = {}
    for name, dims in pairs:
        if str(name) not in tensors:
            raise ExampleInputError(f"dynamic_shapes names input {name!r}; the inputs are {list(tensors)}")
        for axis, dim in (dims or {}).items():
            if dim is None:
                continue
            if not isinstance(dim, Dim) or getattr(dim, "max", None) is None or dim.max >= 1 << 40:
                raise ExampleInputError(
                    f"dynamic_shapes[{name!r}][{axis!r}] is {dim!r}; it must be a named size with a maximum",
                    hint='for example torch.export.Dim("tokens", max=128)',
                )
            rank = tensors[str(name)].dim()
            if not isinstance(axis, int) or not -rank <= axis < rank:
                raise ExampleInputError(f"dynamic_shapes[{name!r}] speaks of axis {axis!r}; the input has {rank} axes")
            found.setdefault(str(name), {})[axis % rank] = dim
    return found


def _distinct(inputs: ExampleInputs) -> ExampleInputs:
    """The inputs with a copy wherever a tensor is given again: torch.export takes one tensor for one input."""
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) in seen:
            return leaf.clone()
        seen.add(id(leaf))
        return leaf

    distinct: ExampleInputs = pytree.tree_map(once, inputs)
    return distinct


def _in_program_order(model: object, example_inputs: ExampleInputs) -> ExampleInputs:
    """Keyword inputs of an `ExportedProgram` in the order in which it takes them; others as they are."""
    spec = model.call_spec.in_spec if isinstance(model, ExportedProgram) else None
    if spec is None:
        return example_inputs
    by_position, keywords = spec.child(0).num_leaves, tuple(spec.child(1).context or ())
    given = tuple(example_inputs) if isinstance(example_inputs, Mapping) else ()
    if sorted(given) != sorted(keywords) or bool(by_position) == isinstance(example_inputs, Mapping):
        taken = f"the keywords {list(keywords)}" if keywords else f"{by_position} inputs by position"
        raise ExampleInputError(f"the program was exported to take {taken}; example_inputs must be like that")
    return {name: example_inputs[name] for name in keywords} if isinstance(example_inputs, Mapping) else example_inputs


def doubled(leaf: Leaf) -> Tensor:
    """The tensor with its only row twice: torch.export takes sizes 0 and 1 for constants."""
    if leaf.row_axis is None or leaf.tensor.shape[leaf.row_axis] != 1:
        return leaf.tensor
    return torch.cat([leaf.tensor, leaf.tensor], dim=leaf.row_axis)
