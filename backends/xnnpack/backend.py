"""Lowers to XNNPACK delegates, with what XNNPACK does not take in portable kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mobizo_compiler.backends.core_aten import CoreAten
from mobizo_compiler.backends.lowering import ExecuTorchArtifact, lower_to_executorch
from mobizo_compiler.backends.xnnpack.decompose_attention import DecomposeAttention
from mobizo_compiler.backends.xnnpack.mean_as_linear import MeanAsLinear
from mobizo_compiler.backends.xnnpack.repeat_as_product import RepeatAsProduct
from mobizo_compiler.backends.xnnpack.spell_out_gelu import SpellOutGelu
from mobizo_compiler.manifest import Manifest
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import GraphProgram


class XnnpackBackend:
    """The default on CPUs."""

    name = "xnnpack"

    def unavailable(self) -> None:
        """It comes with the packages that this one needs."""

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Nothing is refused: what XNNPACK does not take runs in portable kernels."""
        return []

    def passes(self) -> Sequence[Pass]:
        """Keep attention and norms inside delegates, and GELU what it is."""
        return (DecomposeAttention(), MeanAsLinear(), SpellOutGelu(), RepeatAsProduct(), Canonicalize(), CoreAten())

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> ExecuTorchArtifact:
        """Lower through ExecuTorch with the XNNPACK partitioner."""
        from mobizo_compiler.backends.xnnpack.partition import FrugalXnnpackPartitioner

        return lower_to_executorch(methods, manifest, [FrugalXnnpackPartitioner()])
