"""Which calls of a graph can carry an adapter, under which names, and which ones do if the user names none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, fx

from mobizo_compiler.analysis.axes import row_axes
from mobizo_compiler.config import ALL_LINEAR, LoraConfig
from mobizo_compiler.errors import NoMatchingTargetError
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import ancestors, operand, unrounded
from mobizo_compiler.graph.program import ROWS, GraphProgram

aten = torch.ops.aten
_CONVOLUTIONS = (
    aten.convolution.default,
    *(getattr(aten, f"conv{d}d").default for d in (1, 2, 3)),
    *(getattr(aten, f"conv{d}d").padding for d in (1, 2, 3)),
)
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_PLAIN_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_MAX_STEPS = 400


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer: a linear layer, a product with a parameter, or a convolution in one group.

    Args:
        fqn: Path of the module, or of the parameter where no module of its own holds it.
        call: The call.
        position: Which argument of the call is the input.
        in_features: Width of the input (channels).
        out_features: Width of the output (channels).
        result: What the adapter adds to: the call, or the scaling after a product with an integer weight.
        kernel: Window of a convolution, else empty.
    """

    fqn: str
    call: fx.Node
    position: int
    in_features: int
    out_features: int
    result: fx.Node
    kernel: tuple[int, ...] = ()

    @property
    def source(self) -> fx.Node:
        """The input, as it is now: a layer before this one may have been adapted meanwhile.

        Where a quantized layer rounds its input first, this is what it rounds: the adapter works in full precision, and
        engines recognise the rounding only where the quantized layer alone uses it.
        """
        node = operand(self.call, self.position)
        return unrounded(node) or node


def find_targets(edit: Editor) -> dict[str, list[LayerCall]]:
    """All calls that can carry an adapter, by path, in order of first call.

    A layer that is called several times is one site with one B. Two modules that share a weight are two sites.
    """
    constants = _without_inputs(edit)
    found: dict[str, list[LayerCall]] = {}
    for node in edit.graph.nodes:
        if node.op == "call_function" and (target := _target(edit, node, constants)):
            found.setdefault(target.fqn, []).append(target)
    return found


def resolve_targets(program: GraphProgram, lora: LoraConfig) -> LoraConfig:
    """`lora` with the names of the layers it adapts in this program, where it leaves the choice to the graph."""
    if lora.target_modules is not None and lora.target_modules != ALL_LINEAR:
        return lora
    edit = Editor(program)
    layouts = row_axes(edit.graph, edit.rows, program.fixed_rows, edit.tensors)
    every = find_targets(edit)
    able = {fqn: calls for fqn, calls in every.items() if all(layouts.layout(t.call) is not None for t in calls)}
    chosen = default_targets(edit, able) if lora.target_modules is None else sorted(all_targets(edit, able))
    if not chosen:
        raise NoMatchingTargetError("no layer of this model can carry an adapter")
    return dataclasses.replace(lora, target_modules=short_names(chosen, every))


def default_targets(edit: Editor, targets: dict[str, list[LayerCall]]) -> list[str]:
    """The layers that make the queries and the values of attention; where there is none, all but the output layer."""
    calls = {target.call: fqn for fqn, several in targets.items() for target in several}
    sources: list[fx.Node] = []
    for node in edit.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            sources += [operand(node, 0), operand(node, 2)]
        elif node.target in _SOFTMAX:
            scores = _reach(operand(node), lambda n: n.all_input_nodes, _PRODUCTS, calls)
            weighted = _reach(node, lambda n: n.users, _PRODUCTS, calls)
            if scores and weighted:
                sources += [n.all_input_nodes[-2 if n.target is aten.baddbmm.default else 0] for n in scores]
                sources += [n.all_input_nodes[-1] for n in weighted]
    chosen = {calls[n] for s in sources for n in _reach(s, lambda n: n.all_input_nodes, (), calls) if n in calls}
    chosen = chosen or all_targets(edit, targets)
    return [fqn for fqn in targets if fqn in chosen]


def all_targets(edit: Editor, targets: dict[str, list[LayerCall]]) -> set[str]:
    """Every layer but those whose result is an output of the model with nothing but adjustments in between."""
    calls = {target.call: fqn for fqn, several in targets.items() for target in several}
    last: set[str] = set()
    for output in edit.outputs.values():
        last |= {calls[n] for n in _reach(output, lambda n: n.all_input_nodes, (), calls) if n in calls}
    return set(targets) - last or set(targets)


def output_layers(program: GraphProgram) -> tuple[str, ...]:
    """The layers that `all_targets` leaves out: those whose result is an output of the model."""
    edit = Editor(program)
    every = find_targets(edit)
    return tuple(sorted(set(every) - all_targets(edit, every)))


class LinearWeight(NamedTuple):
    """The float32 parameter that a product multiplies by: its placeholder, and whether it is [in_features,
    out_features]."""

    node: fx.Node
    turned: bool

    def read(self, edit: Editor) -> Tensor:
        """Its value, [out_features, in_features]."""
        weight = edit.tensor(self.node)
        assert weight is not None
        return weight.t() if self.turned else weight


def linear_weight(edit: Editor, target: LayerCall) -> LinearWeight | None:
    """The float32 parameter that a product multiplies by; None if it is something else."""
    node = target.call
    if node.target not in _PLAIN_PRODUCTS:
        return None
    placeholder = operand(node, target.position + 1)
    turned = node.target is not aten.linear.default
    if placeholder.target is aten.t.default or placeholder.target is aten.transpose.int:
        placeholder, turned = operand(placeholder), not turned
    value = placeholder.meta["val"]
    if edit.tensor_name(placeholder) is None or value.dtype != torch.float32 or value.dim() != 2:
        return None
    return LinearWeight(placeholder, turned)


def short_names(chosen: Iterable[str], every: Iterable[str]) -> tuple[str, ...]:
    """Last parts of the paths, if they name the same layers; else the paths.

    >>> short_names(["a.0.q", "a.1.q"], ["a.0.q", "a.0.k", "a.1.q"])
    ('q',)
    >>> short_names(["a.0.q"], ["a.0.q", "a.1.q"])
    ('a.0.q',)
    """
    paths = tuple(chosen)
    names = tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return names if {p for p in every if p.rpartition(".")[2] in names} == set(paths) else paths


def _reach(
    start: fx.Node,
    neighbours: Callable[[fx.Node], Iterable[fx.Node]],
    stop: tuple[object, ...],
    calls: dict[fx.Node, str],
) -> list[fx.Node]:
    """The first nodes of some kind, or layers, in one direction. Layers are not passed."""
    pending, seen, found = [start], {start}, []
    while pending and len(seen) < _MAX_STEPS:
        node = pending.pop(0)
        if node in calls or node.target in stop:
            if node.target in stop or not stop:
                found.append(node)
            continue
        for other in neighbours(node):
            if other not in seen and other.op == "call_function":
                seen.add(other)
                pending.append(other)
    return found


def _target(edit: Editor, node: fx.Node, constants: set[fx.Node]) -> LayerCall | None:
    if node.target is aten.linear.default or node.target in _CONVOLUTIONS:
        position, turned = 0, False
    elif node.target is aten.addmm.default:
        position, turned = 1, True
    elif node.target in (aten.mm.default, aten.matmul.default, aten.bmm.default):
        position, turned = 0, True
    else:
        return None
    source, weight = operand(node, position), operand(node, position + 1)
    shape = tuple(weight.meta["val"].shape)
    if weight not in constants or source.meta["val"].dim() < 2:
        return None
    if node.target is aten.bmm.default and shape[0] == 1:
        shape = shape[1:]  # a product of matrices that einsum made
    names = _parameters(edit, weight)
    if not names or (turned and len(shape) != 2):
        return None
    if node.target in _CONVOLUTIONS:
        if _groups(node) != 1 or source.meta["val"].dim() != len(shape):
            return None
        return LayerCall(
            _path(node, names[0]), node, position, int(shape[1]), int(shape[0]), node, tuple(map(int, shape[2:]))
        )
    out_features, in_features = (shape[1], shape[0]) if turned else shape
    result = _scaling(node, constants) if _is_integer(weight) else node
    if result is None:
        return None
    return LayerCall(_path(node, names[0]), node, position, int(in_features), int(out_features), result)


def _is_integer(weight: fx.Node) -> bool:
    """Whether a weight is a quantized one as it is stored, converted to float without its scale."""
    node = weight
    while node.target in (aten.to.dtype, aten._to_copy.default, aten.t.default, aten.permute.default):
        node = operand(node)
    return not node.meta["val"].dtype.is_floating_point


def _scaling(product: fx.Node, constants: set[fx.Node]) -> fx.Node | None:
    """The only user of a product, if it multiplies by a constant."""
    users = list(product.users)
    if len(users) != 1 or users[0].target is not aten.mul.Tensor:
        return None
    factors = [n for n in users[0].all_input_nodes if n is not product]
    return users[0] if all(n in constants for n in factors) else None


def _groups(node: fx.Node) -> int:
    """The `groups` of a convolution; transposed convolutions count as many, they carry no adapter."""
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))  # type: ignore[union-attr]
    arguments |= node.kwargs
    return 0 if arguments.get("transposed") else int(str(arguments.get("groups", 1)))


def _without_inputs(edit: Editor) -> set[fx.Node]:
    """Values that are computed from parameters and constants alone."""
    inputs = set(edit.inputs.values())
    found: set[fx.Node] = set()
    for node in edit.graph.nodes:
        if node not in inputs and node.op != "output" and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _parameters(edit: Editor, weight: fx.Node) -> list[str]:
    """Paths of the parameters that a weight is computed from: itself, or several for a quantized or normed one."""
    weights = (node for node in ancestors([weight]) if edit.is_weight(node))
    return sorted(name for node in weights if (name := edit.tensor_name(node)) is not None)


def _path(node: fx.Node, parameter: str) -> str:
    """Path of the module that holds the parameter, as the caller sees it: tied weights belong to the calling module."""
    stack = node.meta.get("nn_module_stack") or {}
    caller = str(list(stack.values())[-1][0]).removeprefix("L['self']").removeprefix(".") if stack else ""
    caller = caller.split("@")[0]
    parameter = parameter.partition(ROWS)[0]
    holder, _, leaf = parameter.rpartition(".")
    for inner in (".parametrizations.weight", ".weight"):
        if (holder + ".").find(inner + ".") >= 0:
            holder, leaf = holder[: (holder + ".").find(inner + ".")], "weight"
    inside = not caller or holder == caller or holder.startswith(caller + ".")
    if not inside:
        return caller
    return holder if leaf == "weight" and holder else parameter
