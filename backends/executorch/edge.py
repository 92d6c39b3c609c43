"""ExecuTorch's edge dialect in two interpretations of a program.

Its own conversion interprets the program once for each of the eight passes that change one operator at a time, and
interpretation of every node is most of what lowering costs. Such a pass says what becomes of an operator in
`call_operator`, and hands the rest on to `super()`: a class that inherits from several of them, in their order, is all
of them in one interpretation.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from executorch.exir import EdgeCompileConfig
from executorch.exir.pass_base import ExportPass
from executorch.exir.passes import MemoryFormatOpsPass, OpReplacePass
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult

from mobizo_compiler.upstream import (
    PRIVATE,
    OpOverload,
    aten_to_edge_passes,
    exir_program,
    transform_edge,
    updated_signature,
    view_copy_of,
)

aten = torch.ops.aten
_GENERATE = PRIVATE["generate_edge_program"].name
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def few_interpretations() -> Iterator[None]:
    """In this block `to_edge_transform_and_lower` makes the edge dialect as described above."""
    with _one_at_a_time:
        upstream = getattr(exir_program, _GENERATE)
        setattr(exir_program, _GENERATE, _edge_program)
        try:
            yield
        finally:
            setattr(exir_program, _GENERATE, upstream)


def _edge_program(
    config: EdgeCompileConfig,
    program: ExportedProgram,
    core_aten_ops_exception_list: Sequence[Any] | None = None,
    preserve_ops: Sequence[Any] | None = None,
) -> ExportedProgram:
    """In place of ExecuTorch's function of this signature: the same passes in the same order."""
    program = exir_program.remove_unused_parameters_pass(program)
    before, after = aten_to_edge_passes(config)
    passes = [exir_program.RemoveNonCoreAtenOpGraphAssertsPass(), _copies_for_views, *before, OpReplacePass()]
    if not config._skip_dim_order:
        passes.append(MemoryFormatOpsPass())
    module = program.graph_module
    for step in _together(passes):
        module = step(module).graph_module
    edge = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=updated_signature(program.graph_signature, module),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=[
            exir_program.EXIREdgeDialectVerifier(
                edge_compile_config=config,
                class_only=True,
                core_aten_ops_exception_list=core_aten_ops_exception_list,
                preserve_ops=preserve_ops,
            )
        ],
    )
    edge = exir_program.lift_constant_tensor_pass(edge)
    edge = exir_program.convert_constant_dim_order_pass.convert_constant_dim_order_pass(edge)
    return cast(ExportedProgram, transform_edge(edge, *after))


def _together(passes: Iterable[Any]) -> Iterator[Any]:
    """The passes, with neighbours that change one operator at a time as one."""
    for of_operators, steps in itertools.groupby(passes, _is_of_operators):
        if of_operators:
            yield type("Together", tuple(type(inspect.unwrap(step)) for step in steps), {})()
        else:
            yield from steps


def _is_of_operators(step: Any) -> bool:
    """Whether a pass is what its `call_operator` says, and nothing else."""
    step = inspect.unwrap(step)  # a pass manager wraps what it is given
    if not isinstance(step, ExportPass) or type(step).__bases__ != (ExportPass,):
        return False
    own = {name for name in vars(type(step)) if not name.startswith("_")}
    return own == {"call_operator"} or isinstance(step, ScalarToTensorPass)  # whose `call` only notes what it did


def _copies_for_views(module: fx.GraphModule) -> PassResult:
    """Operators that return views become those that return copies; the next interpretation finds their strides."""
    for inner in module.modules():
        for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
            if isinstance(node.target, OpOverload):
                copy = aten.view_copy.default if node.target is aten._unsafe_view.default else None
                node.target = copy or view_copy_of(node.target._schema) or node.target
    return PassResult(module, True)
