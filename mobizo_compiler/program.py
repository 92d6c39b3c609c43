"""What flows through the passes: one method's graph with everything that belongs to it.

A `GraphProgram` is a functional `torch.export.ExportedProgram` with flat inputs, plus what the compiler knows about
it: named inputs and outputs, named values, adapter sites, facts, history. It never changes: `editor.py` makes the
next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.utils import _pytree as pytree

STATE = "mobizo_lora_b"
LABELS, SEED, LEARNING_RATE, EPS = "mobizo_labels", "mobizo_seed", "mobizo_learning_rate", "mobizo_eps"
PROJECTED_GRADIENT = "mobizo_projected_gradient"
PREFIX = "mobizo_prefix_"  # inputs of a step that starts after the part that no adapter reaches
ROWS = "__rows_"  # after the path of a weight: some rows of it
STATE_INPUT = "mobizo_state"  # name of the state as the last input, and of what it becomes as the last output


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted layer, and where its B lies in the flat state.

    Args:
        fqn: Path of the module in the user's model.
        offset: First element of B in the state; B is `state[offset:offset + r * width].view(r, width)`.
        r: Rank.
        in_features: Width of the layer's input; channels for a convolution.
        out_features: Width of the layer's output; channels for a convolution.
        scaling: Factor of the branch, `lora_alpha / r`.
        kernel: Window of a convolution; empty for a linear layer.
        a_offset: First element of A in the state where A is trained too, as [in_features, r]; None where it is frozen.
        outputs: The outputs that are adapted, ascending; empty for all. The columns of B for others are zero, and not
            in the state.
    """

    fqn: str
    offset: int
    r: int
    in_features: int
    out_features: int
    scaling: float
    kernel: tuple[int, ...] = ()
    a_offset: int | None = None
    outputs: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Number of outputs that are adapted."""
        return len(self.outputs) or self.out_features

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of A: [r, in_features], followed by the window of a convolution."""
        return (self.r, self.in_features, *self.kernel)

    @property
    def size(self) -> int:
        """Number of elements of B in the state."""
        return self.r * self.width

    @property
    def trained(self) -> int:
        """Number of elements that are trained: B, and A where it is not frozen."""
        return self.size + (0 if self.a_offset is None else self.r * self.in_features)

    def lora_b(self, state: Tensor) -> Tensor:
        """B in a flat state [..., S], as [..., r, out_features]; an alias where all outputs are adapted."""
        part = state[..., self.offset : self.offset + self.size].reshape(*state.shape[:-1], self.r, self.width)
        if not self.outputs:
            return part
        whole = part.new_zeros(*part.shape[:-1], self.out_features)
        return whole.index_copy(-1, torch.tensor(self.outputs), part)

    def lora_a(self, state: Tensor) -> Tensor:
        """A in a flat state [..., S], where it is trained, as [..., r, in_features]."""
        assert self.a_offset is not None, "A of this site is frozen"
        part = state[..., self.a_offset : self.a_offset + self.r * self.in_features]
        return part.reshape(*state.shape[:-1], self.in_features, self.r).transpose(-1, -2)


@dataclasses.dataclass(frozen=True)
class DynamicSize:
    """A size that may differ from call to call, in a range that includes both ends."""

    name: str
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Nesting:
    """How the outputs of a model nest: a pytree whose leaves are tensors and values that were fixed by the capture.

    Args:
        spec: The pytree.
        fixed: Leaves that are no tensors (numbers, text, None), by their position among all leaves.
    """

    spec: pytree.TreeSpec
    fixed: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def unflatten(self, tensors: Sequence[Any]) -> Any:
        """The structure with these values in place of its tensors."""
        given = iter(tensors)
        leaves = [self.fixed[i] if i in self.fixed else next(given) for i in range(self.spec.num_leaves)]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclasses.dataclass(frozen=True)
class GraphProgram:
    """One method of a program at one stage of the pipeline.

    Args:
        exported: The graph: functional ATen, flat tensor inputs, static or with one symbolic number of rows.
        outputs: Names of the user outputs, in order.
        nesting: How the model's outputs nest, for the loss and for `evaluate`.
        rows: Axis of the rows of each user input that has rows.
        dynamic: Sizes that stay symbolic to the end, by symbol.
        sites: Adapter sites, in the order of their offsets.
        lora_a: A of every site by module path, float32, [r, in_features], not scaled.
        values: Names for inner nodes that later passes need.
        facts: What holds of this program; see `facts.py`.
        history: `repr` of every pass so far.
    """

    exported: ExportedProgram
    outputs: tuple[str, ...] = ()
    nesting: Nesting | None = None
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dynamic: Mapping[str, DynamicSize] = dataclasses.field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    lora_a: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    facts: frozenset[str] = frozenset()
    history: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph; treat it as read-only."""
        return cast(fx.Graph, self.exported.graph_module.graph)

    @property
    def inputs(self) -> dict[str, Any]:
        """User inputs by name, in order, each as the fake tensor that stands for it."""
        names = set(self.exported.graph_signature.user_inputs)
        return {n.name: n.meta["val"] for n in self.graph.nodes if n.op == "placeholder" and n.name in names}

    @property
    def output_nodes(self) -> dict[str, fx.Node]:
        """User outputs by name."""
        nodes = {node.name: node for node in self.graph.nodes}
        return {
            name: nodes[arg]
            for name, arg in zip(self.outputs, self.exported.graph_signature.user_outputs, strict=True)
            if isinstance(arg, str)
        }

    @property
    def fixed_rows(self) -> int | None:
        """The number of rows, where it is not symbolic."""
        inputs = self.inputs
        size = next((inputs[name].shape[axis] for name, axis in self.rows.items()), None)
        return size if isinstance(size, int) else None

    @property
    def parameters(self) -> int:
        """Number P of trained parameters."""
        return sum(site.trained for site in self.sites)

    def with_facts(self, *facts: str) -> GraphProgram:
        """The same program, of which more is known."""
        return dataclasses.replace(self, facts=self.facts | set(facts))

    def tensors(self) -> dict[str, tuple[str, Tensor]]:
        """Path and value of the parameter, buffer or constant behind each placeholder that is not a user input."""
        known = {**self.exported.constants, **self.exported.state_dict}
        specs = self.exported.graph_signature.input_specs
        return {spec.arg.name: (spec.target, known[spec.target]) for spec in specs if spec.target is not None}


def initial_state(sites: Sequence[Site], lora_a: Mapping[str, Tensor], memory: int = 0) -> Tensor:
    """The flat state before the first step, float32 [S].

    Every B, which is zero; then every A that is trained; then what the update rule remembers, which is zero.

    Args:
        sites: The sites, in the order of their offsets.
        lora_a: A of every site by path, [r, in_features].
        memory: How many numbers the rule remembers.
    """
    parts = [torch.zeros(sum(site.size for site in sites))]
    parts += [lora_a[site.fqn].t().reshape(-1) for site in sites if site.a_offset is not None]
    return torch.cat([*parts, torch.zeros(memory)])


def flat_call_graph(inputs: int, outputs: int) -> list[ModuleCallEntry]:
    """The calling convention of a program with flat tensor inputs and a tuple of outputs."""
    in_spec = pytree.tree_structure(((None,) * inputs, {}), is_leaf=lambda x: x is None)
    out_spec = pytree.tree_structure((None,) * outputs, is_leaf=lambda x: x is None)
    return [ModuleCallEntry("", ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec))]


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


def source_line(node: fx.Node) -> str:
    """The node's name with the user's own source line, for messages."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [line for line in reversed(trace) if line.startswith("File ")]
    place = next((line for line in places if "/torch/nn/" not in line), "")
    return f"%{node.name} ({node.target})" + (f", {place}" if place else "")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order. A tensor of one element may have any stride, which a view refuses."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data
