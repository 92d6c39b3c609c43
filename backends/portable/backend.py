"""Lowers without a delegate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mobizo_compiler.backends.executorch.backend import ExecuTorchBackend
from mobizo_compiler.backends.executorch.program_file import ExecuTorchArtifact
from mobizo_compiler.backends.shared_passes.core_aten import CoreAten
from mobizo_compiler.backends.shared_passes.spell_out_quantization import SpellOutQuantization
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.passes.decompose_attention import DecomposeAttention


class PortableBackend(ExecuTorchBackend):
    """The slowest and most general backend on a device."""

    name = "portable"
    caches = True

    def unavailable(self) -> None:
        """It comes with the packages that this one needs."""

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Nothing is refused here: an operator without a kernel is an error of lowering that names it."""
        return []

    def passes(self) -> Sequence[Pass]:
        """Attention as products, and quantized layers in plain operators."""
        return (DecomposeAttention(), SpellOutQuantization(), Canonicalize(), CoreAten())

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> ExecuTorchArtifact:
        """Lower through ExecuTorch with no partitioner."""
        from mobizo_compiler.backends.executorch.lower import lower_to_executorch  # brings ExecuTorch's exporter

        return lower_to_executorch(methods, manifest, [])
