"""Lowers to one Vulkan delegate a method; noise, state and integers stay in portable kernels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mobizo_compiler.backends.executorch.backend import ExecuTorchBackend
from mobizo_compiler.backends.executorch.program_file import ExecuTorchArtifact
from mobizo_compiler.backends.shared_passes.core_aten import CoreAten
from mobizo_compiler.backends.vulkan.at_most_four_axes import AtMostFourAxes
from mobizo_compiler.backends.vulkan.flatten_tokens import FlattenTokens
from mobizo_compiler.backends.vulkan.float32_scales import Float32Scales
from mobizo_compiler.backends.vulkan.operators import name_of
from mobizo_compiler.backends.vulkan.separate_views import SeparateViews
from mobizo_compiler.backends.vulkan.spell_out import SpellOut
from mobizo_compiler.backends.vulkan.vectors_for_scalars import VectorsForScalars
from mobizo_compiler.errors import BackendUnavailableError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.nodes import operand, source_line
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.passes.decompose_attention import DecomposeAttention

LIBRARY_VARIABLE = "MOBIZO_VULKAN_LIBRARY"
GROUP, OUTPUTS = 32, 8


class VulkanBackend(ExecuTorchBackend):
    """For GPUs. It lowers everywhere; programs run where the runtime has ExecuTorch's `VulkanBackend`."""

    name = "vulkan"

    def unavailable(self) -> None:
        """Lowering needs no GPU, and comes with the packages that this one needs."""

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Quantization that the runtime has no kernel for, attention as one operator, and dynamic sizes."""
        reasons = [reason for node in program.graph.nodes for reason in _quantization(node)]
        reasons += [
            f"{source_line(node)}: attention as one operator aborts the process of the Vulkan runtime; give it four "
            "axes and no dropout, or write it as products and a softmax"
            for node in program.graph.nodes
            if node.op == "call_function" and name_of(node) == "scaled_dot_product_attention"
        ]
        if program.dynamic:
            names = ", ".join(size.name for size in program.dynamic.values())
            reasons.append(f"sizes that differ from call to call ({names}) are not built for this backend")
        return reasons

    def passes(self) -> Sequence[Pass]:
        """Tokens as rows of matrices, attention as products, and nothing that a kernel takes for something else."""
        return (
            DecomposeAttention(),
            Float32Scales(),
            VectorsForScalars(),
            SpellOut(),
            Canonicalize(),
            FlattenTokens(),
            AtMostFourAxes(),
            Canonicalize(),
            SeparateViews(),
            CoreAten(),
        )

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> ExecuTorchArtifact:
        """Lower through ExecuTorch with the Vulkan partitioner."""
        from mobizo_compiler.backends.executorch.lower import lower_to_executorch  # brings ExecuTorch's exporter
        from mobizo_compiler.backends.vulkan.partition import OneDelegate

        load_runtime()
        network = {name: program for name, program in methods.items() if name != "replay"}  # which has none
        partitioners = {name: [OneDelegate(list(p.inputs), p.outputs)] for name, p in network.items()}
        return lower_to_executorch(methods, manifest, partitioners)


def load_runtime(library: str | os.PathLike[str] | None = None) -> bool:
    """Load a shared library that brings `VulkanBackend` to the ExecuTorch runtime of this process.

    Args:
        library: Its path; the environment variable MOBIZO_VULKAN_LIBRARY if None. Without either nothing is loaded.

    Returns:
        Whether the runtime has `VulkanBackend` now.

    Raises:
        BackendUnavailableError: The library cannot be loaded.
    """
    from mobizo_compiler.upstream import Runtime

    runtime = Runtime.get()  # first, because the library registers itself with the runtime that is there
    path = library or os.environ.get(LIBRARY_VARIABLE)
    if path and "VulkanBackend" not in runtime.backend_registry.registered_backend_names:
        try:
            ctypes.CDLL(str(Path(path)), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise BackendUnavailableError(
                f"the Vulkan runtime cannot be loaded: {error}",
                where=str(path),
                hint=f"unset {LIBRARY_VARIABLE}; lowering does not need a Vulkan runtime",
            ) from error
    return "VulkanBackend" in runtime.backend_registry.registered_backend_names


def _quantization(node: fx.Node) -> Iterator[str]:
    """Why a quantized weight cannot be multiplied with, if that is so."""
    from mobizo_compiler.backends.vulkan.known_faults import FOUR_BITS  # brings ExecuTorch's exporter

    if node.op != "call_function":
        return
    if name_of(node) != "dequantize_affine":
        weight = next((i for i in node.all_input_nodes if _is_int8_tensor(i)), None)
        if weight is not None and name_of(node) not in ("quantize_affine", "embedding"):
            called = name_of(node).strip("_")
            yield (
                f"{source_line(node)}: {called} of the int8 weight %{weight.name} would run on the CPU in every "
                f"call; {FOUR_BITS}"
            )
        return
    weight = operand(node)
    if not _is_int8_tensor(weight):
        return
    arguments: dict[str, Any] = dict(zip((a.name for a in _schema(node)), node.args, strict=False)) | node.kwargs
    low, high, block = arguments.get("quant_min"), arguments.get("quant_max"), list(arguments["block_size"])
    shape = weight.meta["val"].shape
    if low is None or high is None or low < -8 or high > 7:
        yield (
            f"{source_line(node)}: weights with values from {low} to {high} abort the process of the Vulkan runtime; "
            f"{FOUR_BITS}"
        )
    elif len(block) != 2 or block[0] != 1 or block[1] % GROUP or shape[1] % block[1]:
        yield (
            f"{source_line(node)}: 4-bit weights {tuple(shape)} in blocks of {block} have no kernel; "
            "use groups of 32 along the input"
        )
    elif shape[0] % OUTPUTS:
        yield (
            f"{source_line(node)}: a layer of 4-bit weights with {shape[0]} outputs cannot be lowered; "
            f"make them a multiple of {OUTPUTS}, or leave the layer in float32"
        )
    elif any(name_of(user) not in ("linear", "embedding") for user in node.users):
        yield (
            f"{source_line(node)}: 4-bit weights are multiplied by a gradient here, which has no kernel; use "
            'estimator="two-sided", or leave the layers in float32'
        )


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema").arguments  # noqa: B009  (no operator type has it)


def _is_int8_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dtype == torch.int8
