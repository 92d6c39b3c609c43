"""One rule per operator family: from the layouts of the operands to the layout of the result.

A rule gets a `Call` and returns the layout of the result (a tuple of layouts for several results), or raises `RowsMix`
with the reason why rows meet. It is called only where an operand has rows. Operators that torch tags as pointwise need
no entry. A package brings the rules of its own operators as entry points; `axis_rule` registers them for one process.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from mobizo_compiler.analysis.axes.layout import Adoption, Layout
from mobizo_compiler.extensions import Registry, path_of
from mobizo_compiler.graph.nodes import operator_name

Layouts = Layout | None | tuple[Layout | None, ...]
Rule = Callable[["Call"], Layouts]


class RowsMix(Exception):
    """Raised by a rule: why rows meet in this call."""


@dataclasses.dataclass(frozen=True)
class AxisRule:
    """Where the rows are after a call of some operators.

    A package exposes one as an entry point for each operator, under the operator's name with a dot after its namespace:
    `"mylib.scan" = "mylib.rows:SCAN"`.

    Args:
        operators: Names with namespace, "mylib::scan"; those of aten without.
        function: Takes a `Call`; returns the layout of the result (a tuple for several results), or raises `RowsMix`.
    """

    operators: tuple[str, ...]
    function: Rule

    def to_json(self) -> dict[str, Any]:
        """The operators, and where the function is."""
        return {"operators": list(self.operators), "function": path_of(self.function)}


class _AxisRules(Registry[AxisRule]):
    """A name means the rule of one operator."""

    def fault(self, loaded: Any) -> str | None:
        """Why it is not a rule."""
        wrong = super().fault(loaded)
        if wrong:
            return wrong
        named = isinstance(loaded.operators, tuple) and all(isinstance(name, str) for name in loaded.operators)
        if not named or not loaded.operators:
            return f"its operators are {loaded.operators!r}, not a tuple of names"
        return None if callable(loaded.function) else f"its function is {loaded.function!r}"

    def misnamed(self, name: str, loaded: Any) -> str | None:
        """Why it is not the rule of this operator."""
        if name in map(_entry_name, loaded.operators):
            return None
        return f"it is the rule of {', '.join(loaded.operators)}, not of {name.replace('.', '::')}"


def _entry_name(operator: str) -> str:
    return operator.replace("::", ".")


AXIS_RULES = _AxisRules(
    "axis rule", "mobizo_compiler.axis_rules", AxisRule, {}, page="docs/writing_an_estimator.md#axis-rules"
)


class Walk(Protocol):
    """What a call needs of the analysis."""

    static: bool
    rows: int
    layouts: dict[fx.Node, Layouts]
    adoptions: list[Adoption]
    row_numbers: list[tuple[fx.Node, fx.Node, int]]

    def number(self, size: Any) -> int:
        """A size as a plain number."""

    def counts_rows(self, node: fx.Node) -> bool:
        """Whether an argument of the call is a number that depends on the number of rows."""

    def without_rows(self, call: Call) -> Layouts:
        """Results of a call that makes values from nothing."""

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that depends on parameters and constants alone; None if it depends on an input."""


class Call:
    """One call in a graph, as rules see it: arguments by name, sizes as plain numbers."""

    def __init__(self, node: fx.Node, walk: Walk) -> None:
        self.node, self.walk, self.rows = node, walk, walk.rows
        parameters = node.target._schema.arguments  # type: ignore[union-attr]
        self.args: dict[str, Any] = {p.name: p.default_value if p.has_default_value() else None for p in parameters}
        self.args |= dict(zip(self.args, node.args, strict=False)) | node.kwargs
        self.tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        self.with_rows = any(walk.layouts[n] is not None for n in self.tensors)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return tuple(self.walk.number(size) for size in node.meta["val"].shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the result, which is one tensor."""
        return self.shape(self.node)

    def layout(self, value: Any) -> Layout | None:
        """Layout of an argument; None if it is no node."""
        found = self.walk.layouts[value] if isinstance(value, fx.Node) else None
        assert not isinstance(found, tuple), value
        return found

    def first(self) -> tuple[Layout, tuple[int, ...]]:
        """Layout and shape of the first argument, which must be what has the rows."""
        node = next(iter(self.args.values()))
        layout = self.layout(node)
        if layout is None:
            raise RowsMix(f"%{self.tensors[-1].name} selects by row from a value without rows")
        return layout, self.shape(node)

    def axis(self, name: str, rank: int) -> int:
        """An argument that is an axis, counted from the front."""
        return int(self.args[name]) % rank

    def results(self, layout: Layout | None) -> Layouts:
        """The layout for every result of the call."""
        value = self.node.meta["val"]
        return tuple(layout for _ in value) if isinstance(value, (tuple, list)) else layout

    def shown(self, shape: Sequence[int]) -> str:
        """Sizes for a message."""
        return "[" + ", ".join("rows" if s == self.rows and not self.walk.static else str(s) for s in shape) + "]"

    def join(self, *layouts: Layout | None) -> Layout:
        """What several operands that are aligned say together."""
        joined: Layout | None = None
        for layout in layouts:
            if joined is None or layout is None:
                joined = joined or layout
                continue
            if not joined.fits(layout):
                raise RowsMix(
                    f"one operand has its rows in axis {joined.axis}, another in axis {layout.axis}"
                    if joined.axis != layout.axis
                    else "rows and another axis are flattened in different orders in the operands"
                )
            if "index" in (joined.kind, layout.kind):
                raise RowsMix("the numbers of the rows are used as values")
            joined = layout if joined.any_split or joined.kind == "same" else joined
        assert joined is not None
        return joined

    def adopt(self, node: fx.Node, axis: int, *, broadcasts: bool) -> None:
        """Take a value without rows beside values with rows in `axis`: its entries along it must all be equal."""
        size = self.shape(node)[axis]
        if broadcasts and size == 1:
            return
        if not self.walk.static or not (same_along(node, axis) or self._equal_along(node, axis)):
            raise RowsMix(f"%{node.name} has {size} different entries along the axis of the rows")
        self.walk.adoptions.append(Adoption(self.node, node, axis, broadcasts))

    def _equal_along(self, node: fx.Node, axis: int) -> bool:
        """Whether the entries of a constant are equal along an axis."""
        value = self.walk.constant(node)
        return value is not None and bool((value == value.narrow(axis, 0, 1)).all())

    def counts_from_zero(self) -> bool:
        """Whether this `arange` is 0, 1, 2, ..."""
        return self.args.get("start", 0) in (0, None) and self.args.get("step", 1) in (1, None)


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a call's operator."""
    name = operator_name(node)
    if AXIS_RULES.claims(_entry_name(name)):
        return AXIS_RULES.load(_entry_name(name)).function  # type: ignore[no-any-return]
    if name.startswith("sym_"):
        return lambda call: None
    tags = getattr(node.target, "tags", ())
    return pointwise if torch.Tag.pointwise in tags else None


def has_rule(node: fx.Node) -> bool:
    """Whether rows can be followed through this call."""
    return not hasattr(node.target, "_schema") or find_rule(node) is not None or operator_name(node) in CREATORS


def axis_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of operators in the running process. An entry point does so in all of them.

    Args:
        names: With namespace ("mylib::scan"); aten operators without namespace.

    Raises:
        ConfigError: An operator has another rule.

    >>> @axis_rule("somelib::scan")
    ... def scan(call):
    ...     layout, shape = call.first()
    ...     return call.results(layout)
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            AXIS_RULES.register(_entry_name(name), AxisRule(names, rule))
        return rule

    return register


CREATORS = frozenset(
    ("expand", "repeat", "full", "zeros", "ones", "empty", "arange", "new_full", "new_zeros", "new_ones", "new_empty")
)
# Operators whose numbers are sizes, so that a number that depends on the rows is right for every number of rows.
SHAPE_ONLY = CREATORS | {"view", "_unsafe_view", "reshape", "slice", "native_group_norm", "unflatten"}
# Operators that only move entries: the number of a row is still that after them.
MOVES = frozenset({"to", "_to_copy", "clone", "alias", "contiguous", "lift_fresh_copy", "detach", "getitem"}) | {
    *("reshape", "view", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand"),
    *("slice", "select", "arange"),
}


def same_along(node: fx.Node, axis: int) -> bool:
    """Whether a value without rows has equal entries along an axis, whatever the inputs are."""
    shape = node.meta["val"].shape
    if shape[axis] == 1:
        return True
    if node.op == "placeholder":
        return False
    name, rank = operator_name(node), len(shape)
    if name in ("full", "zeros", "ones", "new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like"):
        return True
    if name == "expand":
        source = node.args[0]
        inner = axis - (rank - len(source.meta["val"].shape))  # type: ignore[union-attr]
        return inner < 0 or same_along(source, inner)  # type: ignore[arg-type]
    if name == "unsqueeze":
        position = int(node.args[1]) % rank  # type: ignore[arg-type]
        return axis == position or same_along(node.args[0], axis - (position < axis))  # type: ignore[arg-type]
    if find_rule(node) is pointwise:
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        inner_axes = [(n, axis - (rank - n.meta["val"].dim())) for n in tensors]
        return all(inner < 0 or same_along(n, inner) for n, inner in inner_axes)
    return False


def _numbers_of_rows(node: fx.Node, call: Call) -> int | None:
    """The axis along which an index counts the rows from 0; None if it does something else."""
    layout = call.layout(node)
    if layout is not None:
        return layout.axis if layout.kind == "index" else None
    if not call.walk.static:
        return None
    root = node
    while operator_name(root) in ("unsqueeze", "expand", "reshape", "view", "_to_copy", "to", "clone"):
        root = root.args[0]  # type: ignore[assignment]
    if operator_name(root) != "arange" or not Call(root, call.walk).counts_from_zero():
        return None
    shape = call.shape(node)
    axes = [axis for axis, size in enumerate(shape) if size == call.rows]
    if call.shape(root) != (call.rows,) or len(axes) != 1 or any(s != 1 for a, s in enumerate(shape) if a != axes[0]):
        return None
    return axes[0]


# -- entry by entry ------------------------------------------------------------------------------------------------


@axis_rule("to", "_to_copy", "__and__", "__or__", "__xor__", "masked_fill", "copy", "fill", "contiguous")
@axis_rule("isin", "bucketize", "hardswish", "dropout", "alias", "detach", "lift_fresh_copy", "real", "imag", "relu_")
@axis_rule(
    "pin_memory", "_assert_tensor_metadata", "conj", "resolve_conj", "resolve_neg", "hardsigmoid", "feature_dropout"
)
@axis_rule("rand_like", "randn_like", "softplus", "log_sigmoid", "celu", "selu")
def pointwise(call: Call) -> Layouts:
    """Operands are broadcast; the result has the rows where they all have them."""
    rank = len(call.out_shape)
    with_rows = [(n, layout) for n in call.tensors if (layout := call.layout(n)) is not None]
    moved = [layout.at(layout.axis + rank - len(call.shape(n))) for n, layout in with_rows]
    joined = call.join(*moved)
    for node, layout in with_rows:
        if call.shape(node)[layout.axis] != call.out_shape[joined.axis]:
            raise RowsMix(f"%{node.name} is repeated along its rows")
    for node in call.tensors:
        axis = joined.axis - (rank - len(call.shape(node)))
        if call.layout(node) is None and axis >= 0:
            call.adopt(node, axis, broadcasts=True)
    return call.results(joined)


@axis_rule("type_as")
def same_rows(call: Call) -> Layouts:
    """The second operand gives only the type."""
    return call.layout(call.args["self"])


@axis_rule("zeros_like", "ones_like", "full_like", "empty_like")
def like(call: Call) -> Layouts:
    """Equal entries in the shape of the operand."""
    layout, _ = call.first()
    return Layout(layout.axis, layout.outer, layout.inner, "same")


@axis_rule(*CREATORS - {"expand", "repeat"})
def create(call: Call) -> Layouts:
    """The operand gives only the type."""
    return call.walk.without_rows(call)


# -- moving entries ------------------------------------------------------------------------------------------------


@axis_rule(
    "reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as", "_reshape_copy"
)
def reshape(call: Call) -> Layouts:
    """Row-major reshape."""
    layout, before = call.first()
    found = layout.reshaped(before, call.out_shape, call.rows)
    if found is None:
        raise RowsMix(f"the reshape from {call.shown(before)} to {call.shown(call.out_shape)} splits the rows")
    return found


@axis_rule("permute", "transpose", "t", "swapaxes", "mT")
def permute(call: Call) -> Layouts:
    """Axes change places."""
    layout, shape = call.first()
    rank = len(shape)
    if "dims" in call.args:
        order = [int(d) % rank for d in call.args["dims"]]
    else:
        order = list(range(rank))
        one, two = (call.axis("dim0", rank), call.axis("dim1", rank)) if "dim0" in call.args else (rank - 2, rank - 1)
        if rank > 1:
            order[one], order[two] = order[two], order[one]
    return layout.at(order.index(layout.axis))


@axis_rule("unsqueeze")
def unsqueeze(call: Call) -> Layouts:
    """A new axis."""
    layout, shape = call.first()
    return layout.at(layout.axis + (call.axis("dim", len(shape) + 1) <= layout.axis))


@axis_rule("expand", "broadcast_to", "expand_as")
def expand(call: Call) -> Layouts:
    """New axes in front, and axes of size 1 repeated."""
    layout, shape = call.first()
    axis = layout.axis + len(call.out_shape) - len(shape)
    if call.out_shape[axis] != shape[layout.axis]:
        raise RowsMix("the only row is repeated")
    return layout.at(axis)


@axis_rule("broadcast_tensors")
def broadcast_tensors(call: Call) -> Layouts:
    """Every tensor in the shape that all of them have together."""
    tensors = call.args["tensors"]
    rank = max(len(call.shape(n)) for n in tensors)
    shifts = [rank - len(call.shape(n)) for n in tensors]
    moved = [
        layout and layout.at(layout.axis + shift)
        for n, shift in zip(tensors, shifts, strict=True)
        for layout in [call.layout(n)]
    ]
    joined = call.join(*moved)
    for node, shift in zip(tensors, shifts, strict=True):
        axis = joined.axis - shift
        if call.layout(node) is None and axis >= 0 and call.shape(node)[axis] != 1:
            raise RowsMix(f"%{node.name} has {call.shape(node)[axis]} different entries along the axis of the rows")
    same = Layout(joined.axis, joined.outer, joined.inner, "same")
    return tuple(layout or same for layout in moved)


@axis_rule("repeat", "tile")
def repeat(call: Call) -> Layouts:
    """The whole tensor several times along each axis."""
    layout, shape = call.first()
    axis = layout.axis + len(call.out_shape) - len(shape)
    times = call.out_shape[axis] // shape[layout.axis]
    return Layout(axis, layout.outer * times, layout.inner, layout.kind)


@axis_rule("repeat_interleave")
def repeat_interleave(call: Call) -> Layouts:
    """Each entry several times in a row."""
    layout, shape = call.first()
    if call.args.get("dim") is None or isinstance(call.args.get("repeats"), fx.Node):
        raise RowsMix("entries are repeated across rows")
    if call.axis("dim", len(shape)) != layout.axis:
        return layout
    return Layout(layout.axis, layout.outer, layout.inner * int(call.args["repeats"]), layout.kind)


@axis_rule("select")
def select(call: Call) -> Layouts:
    """One entry of an axis, which goes."""
    layout, shape = call.first()
    axis = call.axis("dim", len(shape))
    if axis == layout.axis:
        raise RowsMix("one row is picked out of the batch")
    return layout.at(layout.axis - (axis < layout.axis))


@axis_rule("slice", "narrow")
def slice_(call: Call) -> Layouts:
    """Some entries of an axis."""
    layout, shape = call.first()
    if call.axis("dim", len(shape)) == layout.axis and shape != call.out_shape:
        raise RowsMix("some of the rows are cut out of the batch")
    if call.axis("dim", len(shape)) != layout.axis and call.walk.counts_rows(call.node):
        raise RowsMix("the number of rows is used as a position")
    return layout


@axis_rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unbind")
def split(call: Call) -> Layouts:
    """Parts of an axis."""
    layout, shape = call.first()
    axis = call.axis("dim", len(shape))
    if axis == layout.axis:
        raise RowsMix("the batch is split into parts")
    return call.results(layout.at(layout.axis - (operator_name(call.node) == "unbind" and axis < layout.axis)))


@axis_rule("cat", "concat", "concatenate", "stack")
def cat(call: Call) -> Layouts:
    """Tensors one after the other in an axis, or in a new one."""
    tensors = [n for n in call.args["tensors"] if call.shape(n) != (0,)]
    new = operator_name(call.node) == "stack"
    joined = call.join(*(call.layout(n) for n in tensors))
    axis = call.axis("dim", len(call.out_shape))
    if axis == joined.axis and not new:
        raise RowsMix("values are concatenated along the rows")
    for node in tensors:
        if call.layout(node) is None:
            call.adopt(node, joined.axis, broadcasts=False)
    return joined.at(joined.axis + (new and axis <= joined.axis))


@axis_rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(call: Call) -> Layouts:
    """Entries before and after, from the last axis on."""
    layout, shape = call.first()
    amounts = call.args["pad"] if "pad" in call.args else call.args["padding"]
    position = 2 * (len(shape) - 1 - layout.axis)
    if any(amounts[position : position + 2]):
        raise RowsMix("the batch is padded with rows")
    return layout


@axis_rule("unfold")
def unfold(call: Call) -> Layouts:
    """Windows along an axis, in a new last axis."""
    layout, shape = call.first()
    if call.axis("dimension", len(shape)) == layout.axis:
        raise RowsMix("windows are taken over the rows")
    return layout


@axis_rule("view_as_real", "one_hot")
def new_last_axis(call: Call) -> Layouts:
    """Every entry becomes several, in a new last axis."""
    return call.first()[0]


@axis_rule("view_as_complex")
def no_last_axis(call: Call) -> Layouts:
    """The last axis goes."""
    return _not_last(call, 1)


@axis_rule("im2col", "col2im", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def batch_first(call: Call) -> Layouts:
    """The first axis is the batch."""
    layout, _ = call.first()
    if layout.axis != 0:
        raise RowsMix("rows lie in an axis that this operation works on")
    return layout


# -- over an axis --------------------------------------------------------------------------------------------------


def _axes(call: Call, rank: int) -> list[int]:
    """The axes that a call works on; all if it names none."""
    dims = call.args.get("dim", call.args.get("dims"))
    if dims is None or dims == []:
        return list(range(rank))
    return [int(d) % rank for d in (dims if isinstance(dims, Iterable) else [dims])]


@axis_rule("sum", "mean", "amax", "amin", "max", "min", "any", "all", "prod", "var", "std", "var_mean", "std_mean")
@axis_rule("logsumexp", "argmax", "argmin", "linalg_vector_norm", "norm", "count_nonzero", "median", "kthvalue", "mode")
@axis_rule("nansum", "nanmean", "aminmax", "special_logsumexp")
def reduce(call: Call) -> Layouts:
    """Axes are reduced, and go unless they are kept with size 1."""
    if "other" in call.args:
        return pointwise(call)
    layout, shape = call.first()
    axes = _axes(call, len(shape))
    if layout.axis in axes:
        raise RowsMix(f"{operator_name(call.node)} over the batch")
    gone = 0 if call.args.get("keepdim") else sum(axis < layout.axis for axis in axes)
    return call.results(layout.at(layout.axis - gone))


@axis_rule(
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"
)
@axis_rule(
    "sort", "argsort", "topk", "flip", "roll", "_fft_r2c", "_fft_c2c", "_fft_c2r", "glu", "_safe_softmax", "softmin"
)
def along(call: Call) -> Layouts:
    """Entries of an axis depend on each other."""
    layout, shape = call.first()
    if layout.axis in _axes(call, len(shape)):
        raise RowsMix(f"{operator_name(call.node)} over the batch")
    return call.results(layout)


def _not_last(call: Call, count: int) -> Layouts:
    """The last axes depend on each other."""
    layout, shape = call.first()
    if layout.axis >= len(shape) - count:
        raise RowsMix(f"{operator_name(call.node)} works on the axis of the rows")
    return call.results(layout)


@axis_rule("tril", "triu")
def last_two(call: Call) -> Layouts:
    """Matrices in the last two axes."""
    return _not_last(call, 2)


def _spatial(call: Call) -> Layouts:
    """Pooling and resampling over the last axes; how many is in the name."""
    found = re.search(r"(\d)d", operator_name(call.node))
    assert found
    return _not_last(call, int(found.group(1)))


_POOLING = ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "_adaptive_avg_pool{}d", "adaptive_max_pool{}d")
_RESAMPLING = ("max_pool{}d_with_indices", "upsample_nearest{}d", "_upsample_nearest_exact{}d")
axis_rule(*(name.format(d) for name in (*_POOLING, *_RESAMPLING) for d in (1, 2, 3)))(_spatial)
axis_rule("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")(_spatial)


@axis_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Layouts:
    """Statistics over the last axes."""
    return _not_last(call, len(call.args["normalized_shape"]))


@axis_rule("group_norm", "native_group_norm", "instance_norm")
def group_norm(call: Call) -> Layouts:
    """Statistics of each row's channels."""
    return call.results(batch_first(call))  # type: ignore[arg-type]


@axis_rule(
    "batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "native_batch_norm",
    "_batch_norm_no_update",
)
def batch_norm(call: Call) -> Layouts:
    """Statistics that were learnt, never those of the batch."""
    if call.args.get("training"):
        raise RowsMix("it normalises with the statistics of the batch")
    layout, _ = call.first()
    if layout.axis == 1:
        raise RowsMix("rows lie in the axis of the channels")
    return call.results(layout)


# -- products ------------------------------------------------------------------------------------------------------


@axis_rule("linear")
def linear(call: Call) -> Layouts:
    """Every entry of all axes but the last is a vector of its own."""
    if call.layout(call.args["weight"]) is not None:
        return _product(call, call.args["input"], call.args["weight"], turned=True)
    return _not_last(call, 1)


@axis_rule("matmul", "bmm", "mm", "mv", "dot", "addmm", "baddbmm", "addbmm")
def product(call: Call) -> Layouts:
    """Matrix products, with or without something added."""
    matrices = [call.args[n] for n in ("mat1", "mat2", "batch1", "batch2", "tensor1", "tensor2") if n in call.args]
    if len(matrices) < 2:
        matrices = [n for n in call.args.values() if isinstance(n, fx.Node)][:2]
    joined = None
    if any(call.layout(n) is not None for n in matrices):
        joined = _product(call, *matrices)
    if operator_name(call.node).startswith(("add", "badd")):
        added, rank = call.args["self"], len(call.out_shape)
        layout = call.layout(added)
        shift = rank - len(call.shape(added))
        joined = call.join(joined, None if layout is None else layout.at(layout.axis + shift))
        if layout is None and joined.axis - shift >= 0:
            call.adopt(added, joined.axis - shift, broadcasts=True)
    return joined


def _product(call: Call, one: fx.Node, two: fx.Node, *, turned: bool = False) -> Layout:
    """Rows may lie in axes of both that are multiplied entry by entry, or in one outer axis of one of them."""
    shapes = call.shape(one), call.shape(two)
    vector = len(shapes[0]) == 1, len(shapes[1]) == 1
    summed = -1, (-1 if turned or vector[1] else -2)
    found: list[int | None] = []
    for node, shape, contracted in zip((one, two), shapes, summed, strict=True):
        layout = call.layout(node)
        position = None if layout is None else layout.axis - len(shape)
        if position == contracted:
            raise RowsMix("a matrix product sums over the rows")
        found.append(position)
    layouts = [layout for n in (one, two) if (layout := call.layout(n)) is not None]
    rank = len(call.out_shape)

    def place(which: int, position: int) -> int:
        """Position in the result, counted from its end."""
        if position <= -3:
            return position + sum(vector) if any(vector) else position
        if which == 0:
            return -1 if vector[1] else -2
        return -1

    if None not in found and (min(p for p in found if p is not None) > -3 or found[0] != found[1]):
        raise RowsMix("in a matrix product every row meets every other")
    which = 0 if found[0] is not None else 1
    position = found[which]
    assert position is not None
    for other, node in enumerate((one, two)):
        if found[other] is None and position <= -3 and len(shapes[other]) >= -position:
            call.adopt(node, len(shapes[other]) + position, broadcasts=operator_name(call.node) == "matmul")
    return call.join(*(layout.at(rank + place(which, position)) for layout in layouts))


@axis_rule("scaled_dot_product_attention")
def attention(call: Call) -> Layouts:
    """All axes but the last two are batches."""
    parts = [call.args[name] for name in ("query", "key", "value")]
    rank = len(call.out_shape)
    joined = call.join(*(call.layout(n) for n in parts))
    if joined.axis >= rank - 2:
        raise RowsMix("rows attend to each other")
    for node in parts:
        if call.layout(node) is None:
            call.adopt(node, joined.axis, broadcasts=False)
    mask = call.args.get("attn_mask")
    if isinstance(mask, fx.Node):
        shift = rank - len(call.shape(mask))
        layout = call.layout(mask)
        if layout is not None:
            call.join(joined, layout.at(layout.axis + shift))
        elif joined.axis - shift >= 0:
            call.adopt(mask, joined.axis - shift, broadcasts=True)
    return joined


@axis_rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Layouts:
    """Batch first; the weights are the same for all rows."""
    if call.layout(call.args["weight"]) is not None or call.layout(call.args.get("bias")) is not None:
        raise RowsMix("the weights of a convolution depend on the rows")
    layout, shape = call.first()
    if layout.axis != 0 or len(shape) != len(call.shape(call.args["weight"])):
        raise RowsMix("rows lie in an axis that the convolution works on")
    return layout


# -- looking up ----------------------------------------------------------------------------------------------------


@axis_rule("embedding")
def embedding(call: Call) -> Layouts:
    """A row of the table for every index."""
    if call.layout(call.args["weight"]) is not None:
        raise RowsMix("the table of an embedding depends on the rows")
    return _no_numbers(call.layout(call.args["indices"]))


def _no_numbers(layout: Layout | None) -> Layout | None:
    """Looking something up by the number of the row gives other results in another lane."""
    if layout is not None and layout.kind == "index":
        raise RowsMix("the numbers of the rows are looked up in a table")
    return layout


@axis_rule("gather", "scatter", "scatter_add", "scatter_reduce", "take_along_dim")
def gather(call: Call) -> Layouts:
    """Entries are picked from, or written to, places along one axis."""
    parts = [n for n in (call.args["self"], call.args["index"], call.args.get("src")) if isinstance(n, fx.Node)]
    joined = call.join(*(call.layout(n) for n in parts))
    if call.axis("dim", len(call.out_shape)) == joined.axis:
        raise RowsMix(f"{operator_name(call.node)} across the rows")
    sizes = {call.shape(n)[joined.axis] for n in parts}
    for node in parts:
        if call.layout(node) is None:
            call.adopt(node, joined.axis, broadcasts=False)
    if len(sizes) > 1:
        raise RowsMix("some of the rows are left out")
    return joined


@axis_rule("slice_scatter", "select_scatter")
def part_scatter(call: Call) -> Layouts:
    """A part of a tensor is replaced."""
    whole, part = call.args["self"], call.args["src"]
    rank = len(call.out_shape)
    axis = call.axis("dim", rank)
    removed = operator_name(call.node) == "select_scatter"
    moved = call.layout(part)
    if moved is not None and removed:
        moved = moved.at(moved.axis + (axis <= moved.axis))
    joined = call.join(call.layout(whole), moved)
    if axis == joined.axis:
        raise RowsMix("some of the rows are replaced")
    if call.layout(whole) is None:
        call.adopt(whole, joined.axis, broadcasts=False)
    if moved is None:
        call.adopt(part, joined.axis - (removed and axis < joined.axis), broadcasts=removed)
    return joined


@axis_rule("index_select")
def index_select(call: Call) -> Layouts:
    """Entries of one axis, by one list for the whole tensor."""
    layout, index = call.layout(call.args["self"]), call.layout(call.args["index"])
    axis = call.axis("dim", len(call.out_shape))
    if layout is None:
        return None if index is None else _no_numbers(index.at(axis))
    if index is not None or axis == layout.axis:
        raise RowsMix("index_select across the rows")
    return layout


@axis_rule("index", "_unsafe_index", "index_put", "_unsafe_index_put")
def index(call: Call) -> Layouts:
    """Advanced indexing: the axis of the rows is not indexed, or indexed by the number of the row."""
    source, indices = call.args["self"], call.args["indices"]
    layout = call.layout(source)
    used = [(axis, node) for axis, node in enumerate(indices) if node is not None]
    if any(node.meta["val"].dtype == torch.bool for _, node in used):
        raise RowsMix("a mask picks a number of entries that differs from row to row")
    rank = max(len(call.shape(node)) for _, node in used)
    axes = [axis for axis, _ in used]
    together = axes == list(range(axes[0], axes[-1] + 1))
    start = axes[0] if together else 0
    by_row = [(axis, node) for axis, node in used if layout is not None and axis == layout.axis]
    joined: Layout | None = None
    for axis, node in used:
        shift = rank - len(call.shape(node))
        if (axis, node) in by_row:
            numbers = _numbers_of_rows(node, call)
            if numbers is None:
                raise RowsMix("entries of other rows are looked up")
            call.walk.row_numbers.append((call.node, node, numbers))
            found: Layout | None = Layout(numbers + shift)
        else:
            found = _no_numbers(call.layout(node))
            found = None if found is None else found.at(found.axis + shift)
        if found is not None:
            joined = call.join(joined, found)
    if joined is not None:
        if layout is not None and not by_row:
            raise RowsMix("entries of all rows are looked up for every row")
        for _, node in used:
            inner = joined.axis - (rank - len(call.shape(node)))
            if inner >= 0 and call.layout(node) is None and not any(node is n for _, n in by_row):
                call.adopt(node, inner, broadcasts=True)
        found = joined.at(start + joined.axis)
    elif layout is None:
        found = None
    elif together:
        found = layout.at(layout.axis if layout.axis < start else layout.axis - len(axes) + rank)
    else:
        found = layout.at(rank + layout.axis - sum(axis < layout.axis for axis in axes))
    return _written(call, layout, found, len(call.shape(source)) - len(axes) + rank) if "values" in call.args else found


def _written(call: Call, layout: Layout | None, place: Layout | None, rank: int) -> Layouts:
    """The layout of a tensor after values, broadcast to `rank` axes, were written where `place` has the rows."""
    values = call.args["values"]
    written = call.layout(values)
    if layout is None or place is None:
        raise RowsMix("entries are written across the rows")
    if written is not None:
        call.join(place, written.at(written.axis + rank - len(call.shape(values))))
    elif place.axis - (rank - len(call.shape(values))) >= 0:
        call.adopt(values, place.axis - (rank - len(call.shape(values))), broadcasts=True)
    return layout


# -- losses --------------------------------------------------------------------------------------------------------


def _reduces(call: Call) -> bool:
    """Whether a loss is summed or averaged over everything; torch gives 0 for reduction="none"."""
    return bool(call.args.get("reduction", 1) != 0)


@axis_rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div")
@axis_rule("binary_cross_entropy", "binary_cross_entropy_with_logits", "poisson_nll_loss", "margin_ranking_loss")
def pointwise_loss(call: Call) -> Layouts:
    """One loss per entry."""
    if _reduces(call):
        raise RowsMix('the loss is reduced over the batch; use reduction="none" and the mean over the other axes')
    return pointwise(call)


@axis_rule("cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss_forward", "nll_loss2d")
def class_loss(call: Call) -> Layouts:
    """One loss per target; classes are in axis 1, or 0 where there is no batch."""
    if _reduces(call):
        raise RowsMix('the loss is reduced over the batch; use reduction="none"')
    scores, target = call.layout(call.args["self"]), call.layout(call.args["target"])
    joined = call.join(scores, target)
    if scores is None or target is None or joined.axis != 0 or len(call.shape(call.args["self"])) < 2:
        raise RowsMix("the rows must lie in the first axis of scores and targets")
    return call.results(joined)


# -- quantization ----------------------------------------------------------------------------------------------------


@axis_rule("torchao::choose_qparams_affine", "torchao::quantize_affine", "torchao::dequantize_affine")
def affine(call: Call) -> Layouts:
    """Blocks of entries share a scale; a block must not hold several rows."""
    layout, _ = call.first()
    if int(call.args["block_size"][layout.axis]) != 1:
        raise RowsMix("activations of several rows are quantized with one scale")
    return call.results(layout)
