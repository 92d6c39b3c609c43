"""A partitioner around another one: it keeps state out of delegates, and spares lowering work without effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from executorch.exir.backend.partitioner import Partitioner, PartitionResult
from torch import fx
from torch.export import ExportedProgram

from mobizo_compiler.graph.program import STATE


class KeepStateOutside(Partitioner):  # type: ignore[misc]
    """A partitioner that never gives the state, or another buffer that changes, to a delegate; else the wrapped one."""

    def __init__(self, inner: Partitioner) -> None:
        super().__init__()
        self.inner = inner
        self.delegation_spec = getattr(inner, "delegation_spec", None)

    def ops_to_not_decompose(self, exported: ExportedProgram) -> tuple[list[Any], Callable[[fx.Node], bool] | None]:
        """What the wrapped partitioner wants whole, without its test of each node where the test says yes to all.

        With a test for each node ExecuTorch decomposes the program twice, under other names for the operators.
        """
        operators, wanted = self.inner.ops_to_not_decompose(exported)
        if wanted is None:
            return operators, None
        answers: dict[Any, set[bool]] = {}
        for node in exported.graph.nodes:
            if node.op == "call_function" and node.target in operators:
                answers.setdefault(node.target, set()).add(bool(wanted(node)))
        if any(len(answer) == 2 for answer in answers.values()):
            return operators, wanted
        return [operator for operator, answer in answers.items() if answer == {True}], None

    def partition(self, exported: ExportedProgram) -> PartitionResult:
        """Partition, then take the tag off the state, which makes it an input of the delegate."""
        result = self.inner.partition(exported)
        signature = exported.graph_signature
        buffers, kept = signature.inputs_to_buffers, {STATE, *signature.buffers_to_mutate.values()}
        for node in result.tagged_exported_program.graph.nodes:
            if node.op == "placeholder" and buffers.get(node.name) in kept:
                node.meta.pop("delegation_tag", None)
        return result
