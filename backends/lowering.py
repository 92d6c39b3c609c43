"""Lowering through ExecuTorch, and running the result on its stock runtime. Shared by backends that are delegates.

Partitioners take state for constants (they have no test of mutability), so state is kept out of every delegate and
that is checked after lowering. All methods share one state and, in the file, one copy of delegated weights.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import io
import logging
import math
import operator
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    schema,
    to_edge_transform_and_lower,
)
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.emit import EmitterOutput
from executorch.exir.passes import MemoryPlanningPass
from executorch.runtime import Runtime
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult

from mobizo_compiler import checksum, data_file
from mobizo_compiler.backends.atomic_copy import copy_whole
from mobizo_compiler.backends.delegates import missing_delegates
from mobizo_compiler.backends.one_copy import HEADER, share_equal_data
from mobizo_compiler.backends.partition import KeepStateOutside
from mobizo_compiler.backends.runtime_options import shared_packed_weights
from mobizo_compiler.errors import ArtifactError, BackendUnavailableError, LoweringError, MobizoError
from mobizo_compiler.manifest import Manifest
from mobizo_compiler.program import STATE, STATE_INPUT, GraphProgram, Site

aten = torch.ops.aten
MANIFEST_METHOD = "mobizo_manifest"
LORA_A_METHOD = "mobizo_lora_a"
Partitioners = Sequence[Partitioner] | Mapping[str, Sequence[Partitioner]]


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


def emission_config() -> ExecutorchBackendConfig:
    """How programs of several methods that share one state are emitted."""
    return ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
        emit_mutable_buffer_names=True,
    )


def lower_to_executorch(
    methods: Mapping[str, GraphProgram], manifest: Manifest, partitioners: Partitioners
) -> ExecuTorchArtifact:
    """Lower programs that share one state into one `.pte` file in a temporary folder.

    Args:
        methods: The programs, by the name of the method.
        manifest: What the file says about itself.
        partitioners: For all methods, or by method; a method that is not named has none. They are wrapped so that the
            state stays outside of delegates.

    Raises:
        LoweringError: Lowering lost the state of a method.
    """
    lora_a = torch.cat([methods["train_step"].lora_a[site.fqn].flatten() for site in manifest.sites])
    with explained(methods, manifest.backend):
        executable, delegation = _lower(methods, manifest, lora_a, partitioners)
    folder = tempfile.mkdtemp(prefix="mobizo-")
    path = Path(folder) / "program.pte"
    with path.open("wb") as file:
        executable.write_to_file(file)
    share_equal_data(path)
    artifact = ExecuTorchArtifact(path, manifest, delegation)
    weakref.finalize(artifact, shutil.rmtree, folder, ignore_errors=True)
    return artifact


@contextlib.contextmanager
def explained(methods: Mapping[str, GraphProgram], backend: str) -> Iterator[None]:
    """Lower in this block: quietly, with our errors, and with the programs as they were afterwards.

    ExecuTorch takes the constants that go into a delegate out of the program that it is given.
    """
    kept = {name: dict(program.exported.constants) for name, program in methods.items()}
    try:
        with _quiet():
            yield
    except MobizoError:
        raise
    except Exception as error:
        raise LoweringError(
            f"ExecuTorch cannot lower this program for backend {backend!r}: {error}",
            hint="the message above is ExecuTorch's; MOBIZO_DUMP=folder writes the program it was given",
        ) from error
    finally:
        for name, program in methods.items():
            program.exported.constants.update(kept[name])


def _lower(
    methods: Mapping[str, GraphProgram], manifest: Manifest, lora_a: Tensor, partitioners: Partitioners
) -> tuple[ExecutorchProgramManager, dict[str, Delegation]]:
    by_method = partitioners if isinstance(partitioners, Mapping) else dict.fromkeys(methods, partitioners)
    constant_methods = {MANIFEST_METHOD: manifest.to_json(), LORA_A_METHOD: lora_a}
    edge = to_edge_transform_and_lower(
        {name: program.exported for name, program in methods.items()},
        transform_passes=[_without_copies],
        partitioner={name: [KeepStateOutside(inner) for inner in by_method.get(name, ())] for name in methods},
        constant_methods=constant_methods,
        compile_config=EdgeCompileConfig(
            _check_ir_validity=False,
            _core_aten_ops_exception_list=[torch.ops.aten.bitwise_right_shift.Tensor_Scalar],
        ),
    )
    lowered = {name: edge.exported_program(name) for name in methods}
    delegation = {name: _delegation(program) for name, program in lowered.items()}
    for name, program in lowered.items():
        _check_state(name, program, methods[name])
        for node in program.graph.nodes:
            if program.graph_signature.inputs_to_buffers.get(node.name) == STATE:
                node.meta["et_init_buffer"] = True
        _sizes_for_strides(program)
    if (listener := _listener.get()) is not None:
        copies = {name: _with_own_graph(program) for name, program in lowered.items()}
        listener(EdgePrograms(copies, constant_methods, manifest.state))
    return emit(edge, emission_config(), manifest.state), delegation


def _with_own_graph(program: ExportedProgram) -> ExportedProgram:
    """The program with a graph of its own, and with the same tensors and delegates."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(program.graph, copies))
    for old, new in copies.items():
        new.name = old.name  # a copy of an input named like a Python builtin would get another name
    graph.output_node().meta = dict(program.graph.output_node().meta)
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=program.verifiers,
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
    emitted = executable._emitter_output
    if state == "data":
        _look_up_state(emitted)
    if state == "shared":
        _write_state_once(emitted)
    if state != "io":
        executable._pte_data, executable._tensor_data = serialize_for_executorch(
            emitted, config, executable._data_serializer, executable._named_data
        )
    digest = checksum.Digest()
    executable._pte_data.write_to_file(digest)
    executable._pte_data.append(digest.trailer())
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
    """Let all methods start from one copy of the initial state."""
    first: dict[bytes, int] = {}
    kept: list[schema.Buffer] = []
    position: dict[int, int] = {}
    for index, buffer in enumerate(emitted.mutable_data or ()):
        if buffer.storage not in first:
            first[buffer.storage] = len(kept)
            kept.append(buffer)
        position[index] = first[buffer.storage]
    for tensor in _planned_tensors(emitted.program):
        if tensor.data_buffer_idx:
            tensor.data_buffer_idx = position[tensor.data_buffer_idx]
    emitted.mutable_data = kept


def _planned_tensors(program: schema.Program) -> Iterator[schema.Tensor]:
    for plan in program.execution_plan:
        for value in plan.values:
            if isinstance(value.val, schema.Tensor) and value.val.allocation_info:
                yield value.val


def _without_copies(graph_module: fx.GraphModule) -> PassResult:
    """Drop copies that were there for the sake of strides: in this dialect every operator makes a contiguous result.

    Copies of inputs and copies that are outputs stay, because they are what keeps the two apart.
    """
    graph, dropped = graph_module.graph, False
    for node in list(graph.nodes):
        if node.op != "call_function" or "clone" not in node.target.__name__:
            continue
        source = node.args[0]
        contiguous = node.meta["val"].is_contiguous() and source.meta["val"].is_contiguous()
        if contiguous and source.op == "call_function" and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            dropped = True
    graph_module.recompile()
    return PassResult(graph_module, dropped)


def _sizes_for_strides(program: ExportedProgram) -> None:
    """Tracing may read a dynamic size off the stride of an input, for which the runtime has no operator."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.sym_stride, aten.sym_stride.int):
            source, axis = node.args
            with graph.inserting_before(node):
                size = None
                for inner in range(axis + 1, source.meta["val"].dim()):  # inputs are contiguous
                    found = graph.call_function(aten.sym_size.int, (source, inner))
                    found.meta["val"] = source.meta["val"].shape[inner]
                    size = found if size is None else graph.call_function(operator.mul, (size, found))
                    size.meta["val"] = found.meta["val"] if size is found else node.meta["val"]
            node.replace_all_uses_with(size)
            graph.erase_node(node)
    program.graph_module.recompile()


@dataclasses.dataclass(frozen=True)
class Delegation:
    """What of a method runs inside delegates."""

    delegates: int
    outside: Mapping[str, int]


class ExecuTorchArtifact:
    """A `.pte` file; it is mapped, not read, when it runs."""

    def __init__(self, path: Path, manifest: Manifest, delegation: Mapping[str, Delegation] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.delegation = delegation or {}

    @property
    def cannot_run(self) -> str | None:
        """Why this program can be saved, but not run in this process; None if it can."""
        missing = missing_delegates(self.path)
        return f"the ExecuTorch runtime here has no {' and no '.join(missing)}" if missing else None

    def runner(self) -> ExecuTorchRunner:
        """Load every method.

        Raises:
            BackendUnavailableError: The runtime lacks a delegate or kernel that the program needs.
        """
        if reason := self.cannot_run:
            raise BackendUnavailableError(
                reason,
                where=str(self.path),
                hint="run the program where the runtime was built with that backend, or load the backend's library "
                "into this process before",
            )
        return ExecuTorchRunner(self)

    def save(self, path: Path) -> None:
        """Copy the file to a temporary name beside `path`, flush it, and rename it."""
        copy_whole(self.path, path)


class ExecuTorchRunner:
    """The methods of one file on the stock runtime, with their shared state."""

    def __init__(self, artifact: ExecuTorchArtifact) -> None:
        self._artifact = artifact  # keeps a temporary file on disk
        self._passed = torch.zeros(artifact.manifest.state_size) if artifact.manifest.state == "io" else None
        with self._data_path() as data_path, shared_packed_weights():
            self._program = _load(artifact.path, data_path)
            # Every load resets the shared state, so all methods are loaded before any of them runs.
            self._methods = {name: self._load_method(name) for name in artifact.manifest.methods}

    @contextlib.contextmanager
    def _data_path(self) -> Iterator[Path | None]:
        """Where methods look up the initial state while they load: a file of zeros, for a session sets it itself."""
        if self._artifact.manifest.state != "data":
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="mobizo-") as folder:
            path = Path(folder) / "state.ptd"
            path.write_bytes(data_file.packed(torch.zeros(self._artifact.manifest.state_size)))
            yield path

    def _load_method(self, name: str) -> Any:
        try:
            method = self._program.load_method(name)
        except Exception as error:
            raise BackendUnavailableError(
                f"the runtime on this machine cannot load method {name!r}: {error}",
                where=str(self._artifact.path),
                hint="a kernel or delegate that the program needs is not registered in this runtime",
            ) from error
        return method

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run one method."""
        if self._passed is None or method == "prefix":
            return list(self._methods[method].execute(list(inputs)))
        results = list(self._methods[method].execute([*inputs, self._passed]))
        if method in ("train_step", "replay"):
            self._passed.copy_(results.pop())
        return results

    def state(self) -> Tensor:
        """The live state."""
        if self._passed is not None:
            return self._passed
        alias: Tensor = self._methods["train_step"]._method.get_attribute(STATE)
        return alias


def load_program_file(path: Path, verify: bool) -> tuple[ExecuTorchArtifact, Manifest, dict[str, Tensor]]:
    """The artifact, manifest and A of a program file, without loading the network.

    Raises:
        ArtifactError: There is no such file, or it is truncated, damaged or foreign.
    """
    _check_file(path)
    if verify:
        checksum.check(path)
    program = _load(path)
    if MANIFEST_METHOD not in program.method_names:
        raise ArtifactError(
            f"this is an ExecuTorch program, but not one of this compiler: its methods are "
            f"{sorted(program.method_names)}",
            where=str(path),
            hint="compile the model with mobizo_compiler.compile",
        )
    try:
        text = program.load_method(MANIFEST_METHOD).execute([])[0]
        flat = program.load_method(LORA_A_METHOD).execute([])[0].clone()
    except Exception as error:
        raise ArtifactError(f"the manifest cannot be read: {error}", where=str(path)) from error
    manifest = Manifest.from_json(text, str(path))
    return ExecuTorchArtifact(path, manifest), manifest, _split_lora_a(manifest.sites, flat)


def _split_lora_a(sites: Sequence[Site], flat: Tensor) -> dict[str, Tensor]:
    parts = torch.split(flat, [math.prod(site.a_shape) for site in sites])
    return {site.fqn: part.reshape(site.a_shape) for site, part in zip(sites, parts, strict=True)}


def _load(path: Path, data_path: Path | None = None) -> Any:
    try:
        with _quiet():
            return Runtime.get().load_program(path, data_path=data_path)
    except Exception as error:
        raise ArtifactError(f"the ExecuTorch runtime cannot load this file: {error}", where=str(path)) from error


def _check_file(path: Path) -> None:
    """Compare the file's length with what its header says, so that a truncated file is never mapped."""
    if not path.is_file():
        raise ArtifactError("there is no such file", where=str(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or head[4:6] != b"ET":
        raise ArtifactError("this is not an ExecuTorch program", where=str(path))
    _, _, magic, _, program_size, segments_at, segments_size = HEADER.unpack(head)
    if magic != b"eh00":
        raise ArtifactError(
            "this ExecuTorch program has no extended header, so it is not of this compiler", where=str(path)
        )
    expected = max(program_size, segments_at + segments_size)
    if size < expected:
        raise ArtifactError(
            f"the file is truncated: it has {size} bytes, its header says {expected}",
            where=str(path),
            hint="copy it again, or compile the model again",
        )


def _check_state(method: str, lowered: ExportedProgram, program: GraphProgram) -> None:
    if STATE_INPUT in program.inputs or not program.sites:
        return
    signature = lowered.graph_signature
    if STATE not in signature.inputs_to_buffers.values():
        raise LoweringError(
            f"lowering took the state out of method {method!r}: a partitioner made it a constant",
            hint="the partitioner must leave mutable buffers outside of its delegates",
        )
    expected = set(program.exported.graph_signature.buffers_to_mutate.values())
    if set(signature.buffers_to_mutate.values()) != expected:
        raise LoweringError(
            f"method {method!r} changes {sorted(signature.buffers_to_mutate.values())} after lowering, "
            f"not {sorted(expected)}: an update was dropped"
        )


def _delegation(program: ExportedProgram) -> Delegation:
    outside: dict[str, int] = {}
    delegates = 0
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target.__name__ == "getitem":
            continue
        if node.target.__name__ == "executorch_call_delegate":
            delegates += 1
        else:
            name = str(getattr(node.target, "_name", node.target.__name__)).removeprefix("aten::")
            outside[name] = outside.get(name, 0) + 1
    return Delegation(delegates, dict(sorted(outside.items(), key=lambda item: (-item[1], item[0]))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what ExecuTorch logs and warns about in every run; errors still show."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
