"""What flows through the passes: one method's graph with everything that belongs to it.

A `GraphProgram` is a functional `torch.export.ExportedProgram` with flat inputs, plus what the compiler knows about
it: named inputs and outputs, named values, adapter sites, facts, history. It never changes: `editor.py` makes the
next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature

from mobizo_compiler.graph.paging import lay_down, let_go
from mobizo_compiler.step.sites import Site
from mobizo_compiler.upstream import pytree

STATE = "mobizo_lora_b"
LABELS_INPUT, SEED_INPUT, LEARNING_RATE_INPUT, EPS_INPUT = (
    "mobizo_labels",
    "mobizo_seed",
    "mobizo_learning_rate",
    "mobizo_eps",
)
PROJECTED_GRADIENT_INPUT = "mobizo_projected_gradient"
PREFIX = "mobizo_prefix_"  # inputs of a step that starts after the part that no adapter reaches
ROWS = "__rows_"  # after the path of a weight: some rows of it
STATE_INPUT = "mobizo_state"  # name of the state as the last input, and of what it becomes as the last output


def as_read(stored: Tensor, value: Any) -> Tensor:
    """A weight in the dtype in which its graph reads it.

    Weights of half precision are kept as they were given, and made float32 one at a time, where they are needed.

    Args:
        stored: The weight.
        value: What stands for it in the graph.
    """
    if stored.dtype == value.dtype:
        return stored
    read = stored.detach().to(value.dtype)
    let_go(stored)
    return read


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
    def placeholders(self) -> dict[str, Any]:
        """What stands for each tensor that the graph is given, its weights among them, by name, in order."""
        return {node.name: node.meta["val"] for node in self.graph.nodes if node.op == "placeholder"}

    @property
    def inputs(self) -> dict[str, Any]:
        """User inputs by name, in order, each as the fake tensor that stands for it."""
        names = set(self.exported.graph_signature.user_inputs)
        return {name: value for name, value in self.placeholders.items() if name in names}

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

    def whole(self, known: dict[Any, Tensor]) -> GraphProgram:
        """The same program with every weight stored as the graph reads it, for those who take its tensors as they are.

        Args:
            known: Weights of half precision that were made whole for another method, by where and how they lie in
                memory; more are added.
        """
        values = self.placeholders
        made: dict[str, Tensor] = {}
        for name, (path, stored) in self.tensors().items():
            if stored.dtype != values[name].dtype:
                place = stored.data_ptr(), stored.shape, stored.stride()
                read = known.get(place)
                if read is None:
                    read = known[place] = lay_down(as_read(stored, values[name]))
                made[path] = nn.Parameter(read, requires_grad=False) if isinstance(stored, nn.Parameter) else read
        if not made:
            return self
        old = self.exported
        exported = ExportedProgram(
            root=nn.Module(),
            graph=old.graph,
            graph_signature=old.graph_signature,
            state_dict={name: made.get(name, tensor) for name, tensor in old.state_dict.items()},
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            constants={name: made.get(name, tensor) for name, tensor in old.constants.items()},
            verifiers=old.verifiers,
        )
        return dataclasses.replace(self, exported=exported)

    def tensors(self) -> dict[str, tuple[str, Tensor]]:
        """Path and value of the parameter, buffer or constant behind each placeholder that is not a user input.

        A value may be stored in half precision where the graph reads float32; see `as_read`.
        """
        known = {**self.exported.constants, **self.exported.state_dict}
        specs = self.exported.graph_signature.input_specs
        return {spec.arg.name: (spec.target, known[spec.target]) for spec in specs if spec.target is not None}


def flat_call_graph(inputs: int, outputs: int) -> list[ModuleCallEntry]:
    """The calling convention of a program with flat tensor inputs and a tuple of outputs."""
    in_spec = pytree.tree_structure(((None,) * inputs, {}), is_leaf=lambda x: x is None)
    out_spec = pytree.tree_structure((None,) * outputs, is_leaf=lambda x: x is None)
    return [ModuleCallEntry("", ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec))]
