"""Lowers to XNNPACK delegates, with what XNNPACK does not take in portable kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from mobizo_compiler.backends.executorch.backend import ExecuTorchBackend
from mobizo_compiler.backends.executorch.program_file import ExecuTorchArtifact
from mobizo_compiler.backends.shared_passes.core_aten import CoreAten
from mobizo_compiler.backends.shared_passes.spell_out_quantization import SpellOutQuantization
from mobizo_compiler.backends.xnnpack.decoded_weights import DecodedWeights
from mobizo_compiler.backends.xnnpack.float_exit import FloatExit
from mobizo_compiler.backends.xnnpack.mean_as_linear import MeanAsLinear
from mobizo_compiler.backends.xnnpack.one_unknown_size import OneUnknownSize
from mobizo_compiler.backends.xnnpack.repeat_as_product import RepeatAsProduct
from mobizo_compiler.backends.xnnpack.rotation_as_product import RotationAsProduct
from mobizo_compiler.backends.xnnpack.round_group_scales import RoundGroupScales
from mobizo_compiler.backends.xnnpack.separate_readers import SeparateReaders
from mobizo_compiler.backends.xnnpack.spell_out_gelu import SpellOutGelu
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.nodes import ancestors, operand, source_line
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.passes.decompose_attention import DecomposeAttention

aten = torch.ops.aten


class XnnpackBackend(ExecuTorchBackend):
    """The default on CPUs."""

    name = "xnnpack"
    caches = True

    def unavailable(self) -> None:
        """It comes with the packages that this one needs."""

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Weights in NF4, which slow kernels would decode in every call; all else runs, inside delegates or outside."""
        return [
            f"{source_line(node)}: XNNPACK has no kernels for NF4; weights of 4 bits are quantization='8da4w'"
            for node in program.graph.nodes
            if node.target in (aten.bmm.default, aten.linear.default) and _looked_up(program, node)
        ]

    def passes(self) -> Sequence[Pass]:
        """Keep attention and norms inside delegates, and GELU what it is."""
        return (
            DecomposeAttention(),
            MeanAsLinear(),
            SpellOutGelu(),
            RepeatAsProduct(),
            RotationAsProduct(),
            RoundGroupScales(),
            SpellOutQuantization(keep_dynamic=True),
            DecodedWeights(),
            FloatExit(),
            SeparateReaders(),
            OneUnknownSize(),
            Canonicalize(),
            CoreAten(),
        )

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> ExecuTorchArtifact:
        """Lower through ExecuTorch with the XNNPACK partitioner."""
        from mobizo_compiler.backends.executorch.lower import lower_to_executorch  # brings ExecuTorch's exporter
        from mobizo_compiler.backends.xnnpack.partition import FrugalXnnpackPartitioner

        # `forward` computes one row at a time: it has packed copies in any case, which all methods share.
        in_place = manifest.activation_memory_bytes is not None and manifest.generate is None
        return lower_to_executorch(methods, manifest, [FrugalXnnpackPartitioner(in_place)])


def _looked_up(program: GraphProgram, product: fx.Node) -> bool:
    """Whether the weight of a product is looked up in a table of codes."""
    inputs = program.inputs
    made_of = ancestors([operand(product, 1)])
    return any(n.target is aten.index_select.default for n in made_of) and not any(n.name in inputs for n in made_of)
