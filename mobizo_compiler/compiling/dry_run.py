"""What `compile` would make, without lowering it: the graphs, and what they say about memory and work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from torch import fx

from mobizo_compiler.analysis.costs import multiply_adds, tensor_bytes
from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.errors import ArtifactError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Artifact, Program
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import STATE, GraphProgram


class NotLowered(Artifact):
    """In place of an artifact."""

    cannot_run = "this was a dry run"

    def runner(self) -> NoReturn:
        """Refuse."""
        raise ArtifactError(self.cannot_run, hint="compile without the dry run")

    def save(self, path: Path) -> NoReturn:
        """Refuse."""
        raise ArtifactError(self.cannot_run, where=str(path), hint="compile without the dry run")


@dataclasses.dataclass(frozen=True)
class DryRun(Backend):
    """A backend that does all that another one does, up to lowering: `compile(..., backend=DryRun(get_backend(name)))`.

    Args:
        inner: The backend.
    """

    inner: Backend

    @property
    def name(self) -> str:
        """That of the backend."""
        return self.inner.name

    @property
    def data_files(self) -> bool:  # type: ignore[override]
        """As the backend says."""
        return self.inner.data_files

    @property
    def caches(self) -> bool:  # type: ignore[override]
        """As the backend says."""
        return self.inner.caches

    def unavailable(self) -> str | None:
        """As the backend says."""
        return self.inner.unavailable()

    def unsupported(self, program: GraphProgram) -> list[str]:
        """As the backend says."""
        return self.inner.unsupported(program)

    def passes(self) -> Sequence[Pass]:
        """Those of the backend."""
        return self.inner.passes()

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> Artifact:
        """Nothing that could run."""
        return NotLowered()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the graphs of a program say, before a backend packs weights and plans memory in its own way.

    Args:
        weight_bytes: Frozen weights, each once.
        state_bytes: The trained state.
        step_activation_bytes: Most that is alive at once in a training step.
        inference_activation_bytes: The same of `evaluate`.
        step_multiply_adds: Products in a training step.
        inference_multiply_adds: Products in `evaluate`.
    """

    weight_bytes: int
    state_bytes: int
    step_activation_bytes: int
    inference_activation_bytes: int
    step_multiply_adds: int
    inference_multiply_adds: int


def estimate(program: Program) -> Estimate:
    """What a program that was just compiled, or a dry run of one, needs."""
    step, evaluate = program.methods["train_step"], program.methods["evaluate"]
    weights: dict[int, int] = {}
    for method in program.methods.values():
        sizes = {node.name: tensor_bytes(node) for node in method.graph.nodes if node.op == "placeholder"}
        tensors = method.tensors().items()
        weights |= {tensor.data_ptr(): sizes[name] for name, (target, tensor) in tensors if target != STATE}
    return Estimate(
        sum(weights.values()),
        4 * program.manifest.state_size,
        peak_bytes(step),
        peak_bytes(evaluate),
        sum(map(multiply_adds, step.graph.nodes)),
        sum(map(multiply_adds, evaluate.graph.nodes)),
    )


def peak_bytes(program: GraphProgram) -> int:
    """Most bytes of computed values that are alive at once, each from its call to its last use."""
    nodes = list(program.graph.nodes)
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        for inner in node.all_input_nodes:
            last[inner] = position
    ending: dict[int, list[fx.Node]] = {}
    for node, position in last.items():
        ending.setdefault(position, []).append(node)
    alive = most = 0
    for position, node in enumerate(nodes):
        if node.op == "call_function":
            alive += tensor_bytes(node)
        most = max(most, alive)
        alive -= sum(tensor_bytes(gone) for gone in ending.get(position, []) if gone.op == "call_function")
    return most
