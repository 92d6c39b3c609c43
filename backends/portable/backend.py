"""Lowers without a delegate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mobizo_compiler.backends.lowering import ExecuTorchArtifact, lower_to_executorch
from mobizo_compiler.backends.spell_out_quantization import SpellOutQuantization
from mobizo_compiler.manifest import Manifest
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import GraphProgram


class PortableBackend:
    """The slowest and most general backend on a device."""

    name = "portable"
    data_files = True

    def unavailable(self) -> None:
        """It comes with the packages that this one needs."""

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Nothing is refused here: an operator without a kernel is an error of lowering that names it."""
        return []

    def passes(self) -> Sequence[Pass]:
        """Quantized layers in plain operators."""
        return (SpellOutQuantization(), Canonicalize())

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> ExecuTorchArtifact:
        """Lower through ExecuTorch with no partitioner."""
        return lower_to_executorch(methods, manifest, [])
