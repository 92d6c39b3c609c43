"""What delegates return, without computing it.

Every later interpretation of a program would make a module of each delegate's original graph and run all of its
operators, to find shapes that the graph has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from mobizo_compiler.upstream import FakeTensor


def know_results(program: ExportedProgram) -> None:
    """From now on, calls of the program's delegates with fake tensors return what their graphs say that they return."""
    for delegate in program.graph_module.children():
        if isinstance(delegate, LoweredBackendModule) and _is_plain(delegate.original_module):
            delegate.original_module.module = _module_of(delegate.original_module)


def _is_plain(original: ExportedProgram) -> bool:
    """Whether a graph returns tensors of fixed sizes, and writes into nothing."""
    returns = original.graph.output_node().args[0]
    values = [node.meta.get("val") for node in returns]
    kinds = {spec.kind for spec in original.graph_signature.output_specs}
    return kinds == {OutputKind.USER_OUTPUT} and all(
        isinstance(value, FakeTensor) and all(type(size) is int for size in (*value.shape, *value.stride()))
        for value in values
    )


def _module_of(original: ExportedProgram) -> Callable[[], Callable[..., Any]]:
    """In place of `ExportedProgram.module`."""
    module = original.module
    results = [node.meta["val"] for node in original.graph.output_node().args[0]]

    def returns(*args: Any) -> Any:
        mode = next((arg.fake_mode for arg in args if isinstance(arg, FakeTensor)), None)
        if mode is None:
            return module()(*args)
        empty = [torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device="meta") for r in results]
        return tuple(FakeTensor(mode, e, r.device) for e, r in zip(empty, results, strict=True))

    return lambda: returns
