"""A step on the captured graph, one lane after the other: what `compile` compares an artifact with.

No lanes share a batch, no positions are picked early, nothing is in place: the graph is the one that the capture gave,
with `W x + scaling * B (A x)` at every adapted layer, and losses, differences and updates are computed in PyTorch. With
quantized weights it has those, because the rounding of weights is what was asked for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from mobizo_compiler.analysis.targets import LayerCall, find_targets
from mobizo_compiler.config import ZOConfig
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.eager import Interpreter, run_side_by_side
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand, unrounded
from mobizo_compiler.graph.paging import give_back
from mobizo_compiler.graph.pipeline import Pass, Pipeline
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes import FreeRows, Specialize
from mobizo_compiler.passes.differentiate import DIFFERENTIABLE
from mobizo_compiler.step.estimators import directions, get_estimator
from mobizo_compiler.step.losses import Loss
from mobizo_compiler.step.sites import Site

aten = torch.ops.aten
_A, _B = "mobizo_given_a_", "mobizo_given_b_"


@dataclasses.dataclass(frozen=True)
class AddAdapters(Pass):
    """Add the adapters of one lane, whose A and B are inputs behind those of the model."""

    sites: tuple[Site, ...]
    needs = frozenset({facts.FUNCTIONAL})
    breaks = frozenset({facts.CANONICAL})
    inputs = "added"

    def rewrite(self, edit: Editor) -> None:
        """Every call of a layer gets the same A and B."""
        every = find_targets(edit)
        for index, site in enumerate(self.sites):
            a = edit.add_input(f"{_A}{index}", site.a_shape, torch.float32)
            b = edit.add_input(f"{_B}{index}", (site.out_features, site.r), torch.float32)
            for target in every[site.fqn]:
                with edit.graph.inserting_before(target.result.next):
                    total = edit.call(aten.add.Tensor, target.result, _delta(edit, target, a, b))
                edit.replace(target.result, total, keep=total)


def given_adapters(sites: Sequence[Site], lora_a: Mapping[str, Tensor], trained: Tensor) -> list[Tensor]:
    """What `AddAdapters` adds as inputs, for these trained numbers, [P]."""
    given = []
    for site in sites:
        a = lora_a[site.fqn] if site.a_offset is None else site.lora_a(trained)
        given += [a.contiguous(), site.scaling * site.lora_b(trained).T]
    return given


def _delta(edit: Editor, target: LayerCall, a: fx.Node, b: fx.Node) -> fx.Node:
    if not target.kernel:
        return edit.call(aten.linear.default, edit.call(aten.linear.default, target.source, a), b)
    layer = target.call
    options = (None, *layer.args[3:]) if len(layer.args) > 3 else (None,)
    hidden = edit.call(layer.target, target.source, a, *options, **layer.kwargs)
    last = edit.call(aten.transpose.int, hidden, 1, -1)
    return edit.call(aten.transpose.int, edit.call(aten.linear.default, last, b), 1, -1)


class CapturedStep:
    """Steps of a captured model.

    Args:
        captured: The graph.
        sites: The adapters.
        lora_a: A of every site by path.
        rows: Number of rows.
        store: What quantizes the base weights.
        zo: The estimator.
        loss: The loss.
    """

    def __init__(
        self,
        captured: GraphProgram,
        sites: Sequence[Site],
        lora_a: Mapping[str, Tensor],
        rows: int,
        store: Sequence[Pass],
        zo: ZOConfig,
        loss: Loss,
    ) -> None:
        self.captured, self.sites, self.lora_a, self.store = captured, tuple(sites), lora_a, tuple(store)
        self.zo, self.loss = zo, loss
        free = [FreeRows()] if captured.fixed_rows not in (None, rows) else []
        self.program = Pipeline([*free, AddAdapters(self.sites), Specialize(rows), *store]).run(captured)

    def for_rows(self, rows: int) -> CapturedStep:
        """The same for another number of rows; raises `UnsupportedGraphError` if that is fixed in the graph."""
        return CapturedStep(self.captured, self.sites, self.lora_a, rows, self.store, self.zo, self.loss)

    def without_rounding(self) -> CapturedStep:
        """The same with real numbers where activations are rounded to integers."""
        smooth = copy.copy(self)
        smooth.program = without_rounding(self.program)
        return smooth

    def evaluate(self, inputs: Sequence[Tensor], trained: Tensor) -> list[Tensor]:
        """The model's outputs, flat, with these trained numbers, [P]."""
        (outputs,) = self.evaluate_each(inputs, [trained])
        return outputs

    def evaluate_each(self, inputs: Sequence[Tensor], trained: Sequence[Tensor]) -> list[list[Tensor]]:
        """The same for several sets of trained numbers, with weights that are read and decoded once."""
        give_back()
        return run_side_by_side(self.program, [[*inputs, *self._adapters(numbers)] for numbers in trained])

    @property
    def largest_bytes(self) -> int:
        """Of a value that depends on the inputs, among those whose size is known before they are."""
        given, largest = set(self.program.inputs), 0
        varies: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if node.name in given or varies.intersection(node.all_input_nodes):
                varies.add(node)
                value = node.meta.get("val")
                if isinstance(value, Tensor) and isinstance(numbers := value.numel(), int):
                    largest = max(largest, numbers * value.element_size())
        return largest

    def evaluate_exactly(self, inputs: Sequence[Tensor], trained: Tensor) -> list[Tensor]:
        """As `evaluate`, in float64."""
        return InFloat64(self.program).outputs([*inputs, *self._adapters(trained)])

    def gradient(self, inputs: Sequence[Tensor], labels: Tensor, trained: Tensor) -> Tensor:
        """The gradient of the loss by the trained numbers, [P], by PyTorch; rounding has the derivative 1."""
        leaf = trained.clone().requires_grad_(True)
        outputs = _StraightThrough(self.program).outputs([*inputs, *self._adapters(leaf)])
        with torch.enable_grad():
            loss = self.loss_of(outputs, labels)
        (found,) = torch.autograd.grad(loss, leaf)
        return found

    def lane(self, index: int, trained: Tensor, seed: int, eps: float) -> Tensor:
        """The trained numbers of one lane of a step, [P]."""
        return get_estimator(self.zo.estimator).perturbed(trained, eps * self.directions(seed))[index]

    def directions(self, seed: int) -> Tensor:
        """The directions of a step, [q, P]."""
        zo, seed_1 = self.zo, torch.tensor([seed], dtype=torch.int32)
        return directions(get_estimator(zo.estimator), self.sites, seed_1, zo.queries, zo.noise)

    def loss_of(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of a lane with these outputs."""
        row_loss, row_weight = self.row_losses(outputs, labels)
        return row_loss.sum() / row_weight.sum()

    def row_losses(self, outputs: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and weight of every row with these outputs."""
        assert self.captured.nesting is not None
        return self.loss(self.captured.nesting.unflatten(outputs), labels)

    def _adapters(self, trained: Tensor) -> list[Tensor]:
        return given_adapters(self.sites, self.lora_a, trained)


class _Interpreter(Interpreter):
    """Runs a program on its own tensors."""

    forgets = True

    def __init__(self, program: GraphProgram) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=self.forgets)
        self._program = program

    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the program returns for these inputs."""
        known = {name: tensor.detach() for name, (_, tensor) in self._program.tensors().items()}
        given = iter(inputs)
        placeholders = [node for node in self._program.graph.nodes if node.op == "placeholder"]
        arguments = [known[node.name] if node.name in known else next(given) for node in placeholders]
        return list(self.run(*arguments))


class _StraightThrough(_Interpreter):
    """Runs a program that can be differentiated afterwards, where rounding has the derivative 1."""

    forgets = False  # what is rounded is needed after it was

    @torch.enable_grad()
    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the program returns for these inputs."""
        return super().outputs(inputs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(DIFFERENTIABLE.get(target, target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value, source = super().run_node(n), _unrounded(n)
        if source is None:
            return value
        before = self.env[source]
        return before + (value - before).detach()


class InFloat64(_Interpreter):
    """Runs a program with every float32 number in float64, one weight at a time."""

    @torch.no_grad()
    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the program returns for these inputs."""
        return super().outputs(inputs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on wide numbers."""
        args, kwargs = map_aggregate((args, kwargs), _wide)
        return super().call_function(target, args, kwargs)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def rounds(program: GraphProgram) -> bool:
    """Whether values that depend on the inputs are rounded, to integers or to bfloat16."""
    return any(_unrounded(node) is not None for node in program.graph.nodes)


def without_rounding(program: GraphProgram) -> GraphProgram:
    """The same program with real numbers in place of integers, and float32 in place of bfloat16, for comparison."""
    edit = Editor(program)
    half = [node for node in edit.graph.nodes if _is_half(node) and edit.tensor(node) is not None]
    for node in list(edit.graph.nodes):
        source = _unrounded(node)
        if source is not None:
            edit.replace(node, source)
    for node in half:
        with edit.graph.inserting_before(min(node.users)):
            whole = edit.call(aten.to.dtype, node, torch.float32)
        edit.replace(node, whole, keep=whole)
    if half:
        edit.refresh()
    return edit.finish(program.facts, (*program.history, "without rounding"))


def _unrounded(node: fx.Node) -> fx.Node | None:
    """What a node rounds, if it does; torchao's operators round as one that quantizes and one that dequantizes."""
    if node.target is aten.round.default:
        return operand(node)
    if node.target is aten.to.dtype and _is_half(node) and operand(node).meta["val"].dtype == torch.float32:
        return operand(node)
    return unrounded(node)


def _is_half(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
