"""From methods in the edge dialect to the bytes of a `.pte` file."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    schema,
)
from executorch.exir.emit import EmitterOutput
from executorch.exir.passes import MemoryPlanningPass
from torch import fx
from torch.export import ExportedProgram

from mobizo_compiler.format import checksum
from mobizo_compiler.graph.program import STATE
from mobizo_compiler.upstream import member, serialize_for_executorch, set_member


@dataclasses.dataclass(frozen=True)
class EdgePrograms:
    """A lowered program before ExecuTorch emits it.

    Args:
        methods: The methods in the edge dialect, with their delegates.
        constant_methods: What the methods without a graph return.
        state: Where the state is, as in `compile`.
    """

    methods: Mapping[str, ExportedProgram]
    constant_methods: Mapping[str, Any]
    state: str


_listener: contextvars.ContextVar[Callable[[EdgePrograms], None] | None] = contextvars.ContextVar(
    "_listener", default=None
)


@contextlib.contextmanager
def edge_programs_to(listener: Callable[[EdgePrograms], None]) -> Iterator[None]:
    """Hand `listener` what is lowered in this block, for tools that emit programs themselves.

    The graphs are copies, because emission changes them; they share weights and delegates with what is emitted here.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def somebody_listens() -> bool:
    """Whether what is lowered is handed to somebody, and has to be kept for them."""
    return _listener.get() is not None


def hear(programs: Mapping[str, ExportedProgram], constant_methods: Mapping[str, Any], state: str) -> None:
    """Give whoever listens the programs before they are emitted."""
    if (listener := _listener.get()) is not None:
        copies = {name: with_own_graph(program) for name, program in programs.items()}
        listener(EdgePrograms(copies, constant_methods, state))


def emission_config() -> ExecutorchBackendConfig:
    """How programs of several methods that share one state are emitted."""
    return ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
        emit_mutable_buffer_names=True,
    )


def emit(edge: EdgeProgramManager, config: ExecutorchBackendConfig, state: str) -> ExecutorchProgramManager:
    """Let ExecuTorch emit a program; then put its initial state where it belongs, and a checksum at the end.

    Args:
        edge: The methods.
        config: `emission_config()`.
        state: "shared": in the program, once, where ExecuTorch writes a copy for each method. "data": in a data file,
            under the name of the buffer. "io": nowhere.
    """
    executable = EdgeProgramManager.to_executorch(edge, config)
    emitted = member(executable, "_emitter_output")
    if state == "data":
        _look_up_state(emitted)
    if state == "shared":
        _write_state_once(emitted)
    if state != "io":
        program, data = serialize_for_executorch(
            emitted, config, member(executable, "_data_serializer"), member(executable, "_named_data")
        )
        set_member(executable, "_pte_data", program)
        set_member(executable, "_tensor_data", data)
    digest, content = checksum.Digest(), member(executable, "_pte_data")
    content.write_to_file(digest)
    content.append(digest.trailer())
    return executable


def _look_up_state(emitted: EmitterOutput) -> None:
    """Take the initial state from a data file. Views of it have its memory, and nothing to be looked up."""
    emitted.mutable_data = None
    for tensor in _planned_tensors(emitted.program):
        extra = tensor.extra_tensor_info
        if extra is not None and extra.fully_qualified_name == STATE:
            tensor.data_buffer_idx = 0
            if len(tensor.sizes) == 1:
                extra.location = schema.TensorDataLocation.EXTERNAL
            else:
                tensor.extra_tensor_info = None


def _write_state_once(emitted: EmitterOutput) -> None:
    """Let all methods start from one copy of the initial state, which is all that is planned and has data.

    Where a constant has the same bytes (as many zeros, say), ExecuTorch gives the number of that constant.
    """
    state = [tensor for tensor in _planned_tensors(emitted.program) if tensor.data_buffer_idx]
    written = [buffer for buffer in emitted.mutable_data or () if buffer.storage]
    first = written[0] if written else emitted.program.constant_buffer[state[0].data_buffer_idx]
    emitted.mutable_data = [schema.Buffer(b""), first]
    for tensor in state:
        tensor.data_buffer_idx = 1


def _planned_tensors(program: schema.Program) -> Iterator[schema.Tensor]:
    for plan in program.execution_plan:
        for value in plan.values:
            if isinstance(value.val, schema.Tensor) and value.val.allocation_info:
                yield value.val


def with_own_graph(program: ExportedProgram, kind: type[ExportedProgram] = ExportedProgram) -> ExportedProgram:
    """The program with a graph of its own, and with the same tensors and delegates, as an instance of `kind`."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(program.graph, copies))
    for old, new in copies.items():
        new.name = old.name  # a copy of an input named like a Python builtin would get another name
        if new.op == "placeholder":
            new.target = new.name  # by which the emitter looks for what it stands for
    graph.output_node().meta = dict(program.graph.output_node().meta)
    return kind(
        root=program.graph_module,
        graph=graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=program.verifiers,
    )
