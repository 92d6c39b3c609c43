"""Lowers to ExecuTorch's CUDA delegate, with the state passed in and out, so that the host reads and writes it.

A buffer that methods share is not possible here: ExecuTorch 1.5 plans shared buffers only where all other tensors are
in main memory, and the delegate only takes tensors in the memory of the GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.backends.aoti.aoti_partitioner import AotiPartitioner
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import Partitioner

from mobizo_compiler.backends.cuda.artifact import CudaArtifact, write_program
from mobizo_compiler.backends.executorch.backend import ExecuTorchBackend
from mobizo_compiler.backends.requirements import missing_for_delegate
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.nodes import source_line
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import STATE_INPUT, GraphProgram
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.passes.decompose_attention import DecomposeAttention
from mobizo_compiler.upstream import inductor_config

DELEGATE = "CudaBackend"


@dataclasses.dataclass(frozen=True)
class CudaBackend(ExecuTorchBackend):
    """The route to a GPU through ExecuTorch; a program is a `.pte` and a `.ptd` file.

    Args:
        autotune: Try many kernels for every shape of a product, which takes minutes; the first of them if not.
    """

    autotune: bool = False
    name = "cuda"
    data_files = False

    def unavailable(self) -> str | None:
        """Kernels are compiled and tuned on the GPU that they are for, so lowering needs all that running does."""
        return missing_for_delegate()

    def unsupported(self, program: GraphProgram) -> list[str]:
        """A state that methods share, and attention as one operator in float32; the rest is Inductor's to say."""
        reasons = [
            f"{source_line(node)}: attention as one operator is a kernel for bfloat16 here; give it four axes and no "
            "dropout, or write it as products and a softmax"
            for node in program.graph.nodes
            if node.target is torch.ops.aten.scaled_dot_product_attention.default
            and node.meta["val"].dtype != torch.bfloat16
        ]
        if STATE_INPUT not in program.inputs:
            reasons.append(
                'ExecuTorch cannot share a buffer between methods beside the memory of a GPU: compile with state="io"'
            )
        return reasons

    def passes(self) -> Sequence[Pass]:
        """Attention as products: the kernel that ExecuTorch puts in its place takes bfloat16 alone."""
        return (DecomposeAttention(), Canonicalize())

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
        options: dict[str, Any] = {"constant_and_index_propagation": False}
        if not self.autotune:  # switched off as a whole, it would leave products to libtorch, which is not there
            options["test_configs.max_mm_configs"] = 1
        with inductor_config.patch(options):
            return write_program(methods, manifest, partitioners(methods))


def partitioners(methods: Mapping[str, GraphProgram]) -> dict[str, Sequence[Partitioner]]:
    """For each method, ExecuTorch's partitioner that gives the delegate all operators.

    `CudaPartitioner` is this class with these specs; its module cannot be imported without triton.
    """
    return {name: [_partitioner(name)] for name in methods}


def _partitioner(method: str) -> Any:
    specs = [CompileSpec("method_name", method.encode()), CompileSpec("target_device", b"cuda:0")]
    return AotiPartitioner(DELEGATE, specs)
