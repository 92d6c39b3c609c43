"""Lowering through ExecuTorch, and running the result on its stock runtime. Shared by backends that are delegates.

Partitioners take state for constants (they have no test of mutability), so state is kept out of every delegate and
that is checked after lowering. All methods share one state and, in the file, one copy of delegated weights.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.partitioner import Partitioner
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult

from mobizo_compiler.backends.executorch.cache import runner_methods, write_in_place
from mobizo_compiler.backends.executorch.delegate_results import known_results
from mobizo_compiler.backends.executorch.edge import few_interpretations
from mobizo_compiler.backends.executorch.emit import emission_config, emit, hear, somebody_listens, with_own_graph
from mobizo_compiler.backends.executorch.forget import forgetting
from mobizo_compiler.backends.executorch.one_copy import share_equal_data
from mobizo_compiler.backends.executorch.partition import KeepStateOutside
from mobizo_compiler.backends.executorch.program_file import (
    LORA_A_METHOD,
    MANIFEST_METHOD,
    Delegation,
    ExecuTorchArtifact,
)
from mobizo_compiler.backends.executorch.weights_on_disk import weights_on_disk
from mobizo_compiler.errors import LoweringError, MobizoError
from mobizo_compiler.format.files import ScratchFolder
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.program import STATE, STATE_INPUT, GraphProgram
from mobizo_compiler.graph.sources import written_when_asked_for
from mobizo_compiler.quiet import quiet
from mobizo_compiler.upstream import OpOverload

aten = torch.ops.aten
Partitioners = Sequence[Partitioner] | Mapping[str, Sequence[Partitioner]]


class _Functional(ExportedProgram):
    """A program that is interpreted again only where that changes something.

    ExecuTorch does so once to rid every method of in-place operators, and once to decompose operators. Our passes leave
    none of either where a backend has `CoreAten`, and the two took a quarter of a compilation.
    """

    def run_decompositions(self, decomp_table: Mapping[Any, Any] | None = None, *rest: Any) -> ExportedProgram:
        """The program itself, where it calls nothing that is in the table or that is always decomposed."""
        targets = {node.target for node in self.graph.nodes if node.op == "call_function"}
        left = {target for target in targets if target in (decomp_table or ()) or _composite_view(target)}
        return super().run_decompositions(decomp_table, *rest) if left or decomp_table is None else self


def _composite_view(target: Any) -> bool:
    """Whether an operator may return a view, and is made of others: no table keeps those whole."""
    if not isinstance(target, OpOverload):
        return False
    composite = target.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd)
    return composite and any(argument.alias_info is not None for argument in target._schema.arguments)


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
    folder = ScratchFolder()
    path = folder.path / "program.pte"
    with forgetting(), written_when_asked_for(), weights_on_disk(outlive=somebody_listens()):
        with explained(methods, manifest.backend):
            executable, delegation = _lower(methods, manifest, lora_a, partitioners)
        with path.open("wb") as file:
            executable.write_to_file(file)
    del executable
    share_equal_data(path)
    artifact = ExecuTorchArtifact(path, manifest, delegation)
    weakref.finalize(artifact, folder.remove)
    return artifact


@contextlib.contextmanager
def explained(methods: Mapping[str, GraphProgram], backend: str) -> Iterator[None]:
    """Lower in this block: quietly, with our errors, and with the programs as they were afterwards.

    ExecuTorch takes the constants that go into a delegate out of the program that it is given.
    """
    kept = {name: dict(program.exported.constants) for name, program in methods.items()}
    try:
        with quiet():
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
    constant_methods = {
        MANIFEST_METHOD: manifest.to_json(),
        LORA_A_METHOD: lora_a,
        **runner_methods(manifest.generate),
    }
    with few_interpretations():
        edge = to_edge_transform_and_lower(
            {name: with_own_graph(program.exported, _Functional) for name, program in methods.items()},
            transform_passes=[_without_copies],
            partitioner={name: [KeepStateOutside(inner) for inner in by_method.get(name, ())] for name in methods},
            constant_methods=constant_methods,
            compile_config=EdgeCompileConfig(
                _check_ir_validity=False,
                _core_aten_ops_exception_list=[torch.ops.aten.bitwise_right_shift.Tensor_Scalar],
            ),
        )
    lowered = {name: edge.exported_program(name) for name in methods}
    delegation = {name: delegation_of(program) for name, program in lowered.items()}
    for name, program in lowered.items():
        _check_state(name, program, methods[name])
        for node in program.graph.nodes:
            if program.graph_signature.inputs_to_buffers.get(node.name) == STATE:
                node.meta["et_init_buffer"] = True
        _sizes_for_strides(program)
    write_in_place(lowered)
    hear(lowered, constant_methods, manifest.state)
    with known_results(lowered.values()):
        return emit(edge, emission_config(), manifest.state), delegation


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


def delegation_of(program: ExportedProgram) -> Delegation:
    """What of a lowered method is in delegates."""
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
