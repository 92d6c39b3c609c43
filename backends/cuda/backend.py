"""Lowers to ExecuTorch's CUDA delegate, with the state passed in and out, so that the host reads and writes it.

A buffer that methods share is not possible here: ExecuTorch 1.5 plans shared buffers only where all other tensors are
in main memory, and the delegate only takes tensors in the memory of the GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from executorch.backends.aoti.aoti_partitioner import AotiPartitioner
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import Partitioner

from mobizo_compiler.backends.cuda.artifact import CudaArtifact, write_program
from mobizo_compiler.backends.executorch.backend import ExecuTorchBackend
from mobizo_compiler.backends.requirements import missing_for_delegate
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import STATE_INPUT, GraphProgram
from mobizo_compiler.upstream import inductor_config

DELEGATE = "CudaBackend"


class CudaBackend(ExecuTorchBackend):
    """The route to a GPU through ExecuTorch; a program is a `.pte` and a `.ptd` file."""

    name = "cuda"
    data_files = False

    def unavailable(self) -> str | None:
        """Kernels are compiled and tuned on the GPU that they are for, so lowering needs all that running does."""
        return missing_for_delegate()

    def unsupported(self, program: GraphProgram) -> list[str]:
        """A state that methods share. Inductor compiles every operator of ours, or names the one that it cannot."""
        if STATE_INPUT in program.inputs:
            return []
        return ['ExecuTorch cannot share a buffer between methods beside the memory of a GPU: compile with state="io"']

    def passes(self) -> Sequence[Pass]:
        """None: Inductor has its own."""
        return ()

    def artifact(self, path: Path, manifest: Manifest, verify: bool) -> CudaArtifact:
        """A program with its weights in a second file."""
        artifact = CudaArtifact(path, manifest)
        if verify:
            artifact.check_weights()
        return artifact

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> CudaArtifact:
        """Lower through ExecuTorch. Importing the delegate registers it, and imports triton."""
        importlib.import_module("executorch.backends.cuda.cuda_backend")
        # Products of the noise must wrap around at 32 bits; see the options of the backend aot_inductor.
        with inductor_config.patch(constant_and_index_propagation=False):
            return write_program(methods, manifest, partitioners(methods))


def partitioners(methods: Mapping[str, GraphProgram]) -> dict[str, Sequence[Partitioner]]:
    """For each method, ExecuTorch's partitioner that gives the delegate all operators.

    `CudaPartitioner` is this class with these specs; its module cannot be imported without triton.
    """
    return {name: [_partitioner(name)] for name in methods}


def _partitioner(method: str) -> Any:
    specs = [CompileSpec("method_name", method.encode()), CompileSpec("target_device", b"cuda:0")]
    return AotiPartitioner(DELEGATE, specs)
