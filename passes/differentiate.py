"""Append the gradient of the loss with respect to the adapters, as operators of inference (reverse mode).

Given:    %h = linear(%x, %b_mobizo_lora_a_0)   %b = reshape(slice(%lanes, 1, 0, 160), [1, 8, 20])   %d = bmm(%h, %b)
          %y = add(linear(%x, %p_w), %d)        return row_loss = f(%y) : f32[rows]      return row_weight : f32[rows]
Result:   %loss = sum(row_loss) / sum(row_weight)                                        : f32[1]
          %gy = ... of f                        %gb = bmm(permute(%h, [0, 2, 1]), %gy)
          %gx = bmm(reshape(%gy, [1, -1, 20]), unsqueeze(%p_w, 0)) + ...
          %gradient = reshape(cat([reshape(%gb, [1, 160]), ...], 1), [P])                : f32[P]
          return loss, lane_losses = loss, projected_gradient = %norm                    : f32[1] each
          return gradient
Numbers: exact for what the program computed before; the gradient is that of PyTorch up to rounding.

Every call between an adapter and the loss gets the product of the vector behind it with its derivative, which PyTorch
writes: `torch.func.vjp` of the call is traced, and what it computes again of the call itself is the call. What lies
before the first adapter has no derivative, and rounding passes it on as it is (straight through). Slices of one value,
as the numbers of each site are of all of them, are put together again by one `cat`, so that no gradient is scattered
into the whole. Products become `bmm`, of which a factor may be a stored weight: it is read where it is, not stored a
second time in another order.

The norm of the gradient is the slope along its own direction, and stands where the slopes along random directions
stand in other programs.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from mobizo_compiler.errors import NotSupportedYetError, UnsupportedGraphError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import CHOOSE, ancestors, operand, operator_name, slice_bounds, source_line, unrounded
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import EPS_INPUT, SEED_INPUT
from mobizo_compiler.passes.duplicate_lanes import CLEAN
from mobizo_compiler.upstream import core_aten_decompositions

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Differentiate(Pass):
    """Make the gradient of the mean loss a value of the program."""

    needs = frozenset({facts.LOSS, facts.SITES, facts.STATIC})
    gives = frozenset({facts.DIFFERENCED, facts.GRADIENT})
    inputs = "added"
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Seed and eps are inputs as in every step, and change nothing."""
        edit.add_input(SEED_INPUT, [1], torch.int32)
        edit.add_input(EPS_INPUT, [1], torch.float32)
        loss, flat = _loss_and_gradient(edit, "", edit.values["lanes"])
        with edit.graph.inserting_before(edit.graph.output_node()):
            norm, losses = edit.inline(length, flat), edit.call(aten.clone.default, loss)
        edit.set_outputs({"loss": loss, "lane_losses": losses, "projected_gradient": norm, "gradient": flat})
        edit.refresh()


@dataclasses.dataclass(frozen=True)
class DifferentiateCleanLane(Pass):
    """Make the loss of the lane that is not perturbed, and its gradient with respect to `exact`, values of the program.

    The losses of the other lanes stay outputs.
    """

    needs = frozenset({facts.LOSS, facts.CLEAN_LANE, facts.STATIC})
    gives = frozenset({facts.GRADIENT})
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """The rows of the lane are no outputs any more."""
        loss, flat = _loss_and_gradient(edit, CLEAN, edit.values["exact"])
        rows = {name: edit.outputs[name] for name in ("row_loss", "row_weight")}
        edit.set_outputs({**rows, "loss": loss, "gradient": flat})
        edit.refresh()


def _loss_and_gradient(edit: Editor, prefix: str, leaf: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The mean loss of the rows of one lane, float32 [1], and its gradient, float32 [P]."""
    if edit.before.dynamic:
        raise NotSupportedYetError(
            "the exact gradient needs sizes that are numbers", hint="leave dynamic_shapes out, and pad"
        )
    rows = [edit.outputs[f"{prefix}row_loss"], edit.outputs[f"{prefix}row_weight"]]
    with edit.graph.inserting_before(edit.graph.output_node()):
        loss = edit.inline(_mean, *rows)
        flat = edit.call(aten.reshape.default, gradient(edit, loss, leaf), [edit.before.parameters])
    for node in edit.calls(aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default  # strides are a matter of the engine
    return loss, flat


def _mean(row_loss_N: Tensor, row_weight_N: Tensor) -> Tensor:
    return row_loss_N.sum(dim=0, keepdim=True) / row_weight_N.sum(dim=0, keepdim=True)


def length(gradient_P: Tensor) -> Tensor:
    """The length of a gradient [P], as [1]."""
    return torch.sqrt((gradient_P * gradient_P).sum(dim=0, keepdim=True))


# -- reverse mode ------------------------------------------------------------------------------------------------------


def gradient(edit: Editor, result: fx.Node, leaf: fx.Node) -> fx.Node:
    """The gradient of a value of one element with respect to another value, inserted at the insertion point.

    Args:
        edit: The program.
        result: The value, float32 [1].
        leaf: What to differentiate by; the result depends on it.

    Raises:
        UnsupportedGraphError: A call in between has no derivative that an inference engine could run.
    """
    between = _between(edit, result, leaf)
    behind: dict[fx.Node, list[tuple[fx.Node | None, fx.Node]]] = {node: [] for node in between}
    one = edit.call(aten.full.default, list(result.meta["val"].shape), 1.0, dtype=result.meta["val"].dtype)
    behind[result].append((None, one))
    traced: dict[_Call, fx.GraphModule] = {}
    for node in reversed(between[1:]):
        if not behind[node]:
            continue
        if node.target is operator.getitem:
            behind[operand(node)].append((node, _sum(edit, node, behind[node])))
            continue
        before = unrounded(node)
        if before is not None:
            behind[before].append((None, _sum(edit, node, behind[node])))
            continue
        several = isinstance(node.meta["val"], (tuple, list))
        vectors = _by_index(edit, behind[node]) if several else {0: _sum(edit, node, behind[node])}
        inner = [n for n in node.all_input_nodes if n in behind]
        if node.target is aten.slice.Tensor and slice_bounds(node) is not None:
            behind[inner[0]].append((node, vectors[0]))  # slices of one value are put together there
            continue
        for source, vector in zip(inner, _pullback(edit, node, inner, vectors, traced), strict=True):
            behind[source].append((None, vector))
    return _sum(edit, leaf, behind[leaf])


def _between(edit: Editor, result: fx.Node, leaf: fx.Node) -> list[fx.Node]:
    """What depends on the leaf, with itself, and what the result depends on, in order, of floating-point numbers."""
    reached, needed = {leaf}, ancestors([result])
    for node in edit.graph.nodes:
        real = node.op == "call_function" and _is_real(node.meta.get("val")) and operator_name(node) != CHOOSE
        before = unrounded(node)
        if real and any(inner in reached for inner in (node.all_input_nodes if before is None else (before,))):
            reached.add(node)
    return [node for node in edit.graph.nodes if node in reached and node in needed]


def _is_real(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, Tensor) and v.dtype.is_floating_point for v in values)


def _by_index(edit: Editor, parts: list[tuple[fx.Node | None, fx.Node]]) -> dict[int, fx.Node]:
    """The vectors behind the results of a call with several, each of which is read by one getitem or more."""
    found: dict[int, fx.Node] = {}
    for reader, vector in parts:
        assert reader is not None
        index = reader.args[1]
        assert isinstance(index, int)
        found[index] = edit.call(aten.add.Tensor, found[index], vector) if index in found else vector
    return found


def _sum(edit: Editor, node: fx.Node, parts: list[tuple[fx.Node | None, fx.Node]]) -> fx.Node:
    """The vector behind a value: the sum over its users, of which slices are put in their places first."""
    by_place: dict[tuple[int, int, int], fx.Node] = {}
    terms: list[fx.Node] = []
    for reader, vector in parts:
        if reader is None or reader.target is not aten.slice.Tensor:
            terms.append(vector)
            continue
        bounds = slice_bounds(reader)
        assert bounds is not None
        axis, size = bounds[0], int(node.meta["val"].shape[bounds[0]])
        start, stop, _ = slice(bounds[1], bounds[2]).indices(size)
        before = by_place.get((axis, start, stop))
        by_place[axis, start, stop] = vector if before is None else edit.call(aten.add.Tensor, before, vector)
    by_axis: dict[int, list[tuple[int, int, fx.Node]]] = {}
    for axis, start, stop in sorted(by_place):
        by_axis.setdefault(axis, []).append((start, stop, by_place[axis, start, stop]))
    for axis, slices in by_axis.items():
        terms += [_joined(edit, node, axis, layer) for layer in _apart(slices)]
    total = terms[0]
    for term in terms[1:]:
        total = edit.call(aten.add.Tensor, total, term)
    return total


def _apart(slices: list[tuple[int, int, fx.Node]]) -> list[list[tuple[int, int, fx.Node]]]:
    """Slices in groups whose members do not overlap, as few as there can be."""
    groups: list[list[tuple[int, int, fx.Node]]] = []
    for item in slices:
        group = next((g for g in groups if g[-1][1] <= item[0]), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    return groups


def _joined(edit: Editor, node: fx.Node, axis: int, slices: list[tuple[int, int, fx.Node]]) -> fx.Node:
    """The vector behind a value from those behind slices of it, with zeros in between."""
    value = node.meta["val"]
    parts, end = [], 0
    for start, stop, vector in [*slices, (value.shape[axis], value.shape[axis], None)]:
        if start > end:
            sizes = [*value.shape[:axis], start - end, *value.shape[axis + 1 :]]
            parts.append(edit.call(aten.full.default, sizes, 0.0, dtype=value.dtype))
        if vector is not None:
            parts.append(vector)
        end = stop
    return parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, axis)


# -- the derivative of one call ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call without its values: calls that are equal have one derivative."""

    node: fx.Node = dataclasses.field(compare=False)
    target: Any
    arguments: str
    values: tuple[Any, ...]
    inner: tuple[int, ...]
    behind: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node, inner: list[fx.Node], behind: Iterable[int]) -> _Call:
        """The call with the arguments that are differentiated by, and the results that a vector is behind."""
        inputs = node.all_input_nodes
        numbered = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{inputs.index(n)}")
        values = tuple((tuple(v.shape), v.dtype, v.stride()) for v in (n.meta["val"] for n in inputs))
        return cls(node, node.target, str(numbered), values, tuple(map(inputs.index, inner)), tuple(behind))

    def pullback(self, *given: Any) -> list[Tensor]:
        """The products of the vectors with the derivative by the inner arguments, then the results of the call."""
        inputs = self.node.all_input_nodes
        values, vectors = given[: len(inputs)], dict(zip(self.behind, given[len(inputs) :], strict=True))

        def results(*some: Tensor) -> dict[int, Tensor]:
            now = dict(zip(inputs, values, strict=True)) | dict(zip((inputs[i] for i in self.inner), some, strict=True))
            args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), now.__getitem__)
            found = DIFFERENTIABLE.get(self.target, self.target)(*args, **kwargs)
            several = found if isinstance(found, (tuple, list)) else (found,)
            return {index: value for index, value in enumerate(several) if _is_real(value)}

        found, pull = cast(
            tuple[dict[int, Tensor], Callable[[dict[int, Tensor]], tuple[Tensor, ...]]],
            torch.func.vjp(results, *(values[i] for i in self.inner)),
        )
        behind = {i: vectors[i] if i in vectors else torch.zeros_like(result) for i, result in found.items()}
        return [*pull(behind), *found.values()]


def _pullback(
    edit: Editor,
    node: fx.Node,
    inner: list[fx.Node],
    vectors: Mapping[int, fx.Node],
    traced: dict[_Call, fx.GraphModule],
) -> list[fx.Node]:
    """The products of vectors, one for each result of a call, with the call's derivative by some of its arguments."""
    call = _Call.of(node, inner, vectors)
    given = [*node.all_input_nodes, *vectors.values()]
    try:
        if call not in traced:
            traced[call] = edit.trace(call.pullback, *given, decompositions=_spelled_out())
        several = isinstance(node.meta["val"], (tuple, list))
        made = edit.insert(traced[call], *given, known={} if several else {len(inner): node})
    except Exception as error:
        raise UnsupportedGraphError(
            f"the exact gradient cannot be had through this call: {type(error).__name__}: {error}",
            where=source_line(node),
            hint='estimator="two-sided" needs no derivative',
        ) from error
    return list(made[: len(inner)])


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape) * 1.0


def _conv1d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """As a convolution of pictures of one line, for whose derivative there are kernels."""

    def two(value: Any, line: int) -> Any:
        return value if isinstance(value, str) else [line, *(value if isinstance(value, (list, tuple)) else [value])]

    options = (two(stride, 1), two(padding, 0), two(dilation, 1), groups)
    return torch.nn.functional.conv2d(x.unsqueeze(-2), weight.unsqueeze(-2), bias, *options).squeeze(-2)


def _average(axes: list[int]) -> Callable[..., Tensor]:
    def average(x: Tensor, size: Sequence[int]) -> Tensor:
        if any(number != 1 for number in size):
            return _ADAPTIVE[len(axes)](x, size)  # type: ignore[no-any-return]
        return x.mean(axes, keepdim=True)

    return average


_ADAPTIVE: dict[int, Any] = {1: aten.adaptive_avg_pool1d.default, 2: aten.adaptive_avg_pool2d.default}
# The same as an operator that autograd does not know, because it is for graphs without side effects, or whose
# derivative is made of views and writes into them.
DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    aten.copy.default: _copy,
    aten.conv1d.default: _conv1d,
    aten.conv1d.padding: _conv1d,
    aten.adaptive_avg_pool1d.default: _average([-1]),
    aten.adaptive_avg_pool2d.default: _average([-2, -1]),
}


@functools.cache
def _spelled_out() -> dict[Any, Callable[..., Any]]:
    """PyTorch's own derivatives in operators of inference, and products in the form that every engine takes."""
    known: dict[Any, Any] = dict(core_aten_decompositions())
    table = {op: rule for op, rule in known.items() if "backward" in str(op)}
    decompositions: dict[Any, Callable[..., Any]] = {
        **table,
        aten.convolution_backward.default: _convolution_backward,
        aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
        aten.mm.default: _mm,
        aten.pow.Tensor_Scalar: _power,
        aten.mul.Scalar: lambda x, number: aten.mul.Tensor(x, number),
        aten.div.Scalar: lambda x, number: aten.mul.Tensor(x, 1.0 / number),
        aten.rsub.Scalar: lambda x, number: aten.add.Tensor(aten.neg.default(x), number),
    }
    return decompositions


def _power(x: Tensor, exponent: float) -> Tensor:
    """Small whole powers as products."""
    if exponent == 1:
        return x
    if exponent in (2, 3):
        square: Tensor = aten.mul.Tensor(x, x)
        return square if exponent == 2 else torch.mul(square, x)
    return cast(Tensor, NotImplemented)


def _convolution_backward(
    vector: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """By the input: a transposed convolution with the same weight, which delegates run as well."""
    if transposed or any(wanted[1:]):
        return NotImplemented
    options = zip(x.shape[2:], vector.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    lost = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in options]
    return aten.convolution.default(vector, weight, None, stride, padding, dilation, True, lost, groups), None, None


def _max_pool_backward(vector: Tensor, x: Tensor, *options: Any) -> Tensor:
    """To where each largest value was. ExecuTorch's kernel adds to what its output had before (1.5.1)."""
    indices = options[-1]
    nothing = torch.zeros(x.shape, dtype=x.dtype, device=x.device).flatten(-2)
    return nothing.scatter_add(-1, indices.flatten(-2), vector.flatten(-2)).reshape(x.shape)


def _mm(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    return torch.bmm(left_MK.unsqueeze(0), right_KN.unsqueeze(0)).squeeze(0)
