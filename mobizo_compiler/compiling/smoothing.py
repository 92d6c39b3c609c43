"""Smoothing: make the inputs of quantized layers easier to round, at the expense of their weights.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): y = W x = (W diag(s)) (x / s). A few channels of x are far larger than
the others, and 8 bits per token leave little for those; s takes from them what the weights can carry.

The paper's s is max|x|^strength / max|W|^(1 - strength) per channel. Here the root mean square stands for max|x|: the
first token of a text has activations a thousand times larger than all others, and a maximum sees that token alone. The
strength is chosen for each input as AWQ does (Lin et al. 2024, arXiv 2306.00978): of two, the one with the smaller
error of the layers that read it, weights and inputs rounded. A weight that its codes hold exactly is left as it is so.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mobizo_compiler.analysis.targets import LinearWeight, find_targets, linear_weight
from mobizo_compiler.graph.eager import EagerRunner
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.paging import give_back
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.quantization.weights import QuantizationConfig, store_weight

STRENGTHS = (0.0, 0.5)
SAMPLES, OUTPUTS = 128, 256  # tokens, and outputs of each layer, that errors are measured on
SMALLEST = 1e-3  # of the largest channel; what is smaller counts as this

Readers = dict[str, tuple[LinearWeight, str, str]]  # weight, recipe and layer by the path of the weight
Layers = list[tuple[Tensor, str, str]]  # the same of one input, with the weights read


def smoothing_of(
    captured: GraphProgram, inputs: list[Tensor], config: QuantizationConfig, output_layers: tuple[str, ...]
) -> dict[str, Tensor]:
    """What the inputs of each layer are multiplied by, 1/s, measured on example inputs.

    Layers that read the same value share one factor, so that the value is still rounded once for all of them.

    Args:
        captured: The model's own graph.
        inputs: Its inputs; texts like those that the program will see.
        config: What is quantized, and how strongly it is smoothed.
        output_layers: Paths of the output layers.

    Returns:
        By the path of the weight: float32 [in_features], with a geometric mean of 1. Inputs that are best left alone
        have none.
    """
    edit = Editor(captured)
    readers: dict[fx.Node, Readers] = {}
    for fqn, calls in find_targets(edit).items():
        for target in calls:
            found = linear_weight(edit, target)
            if found is not None and config.smooths(fqn, fqn in output_layers):
                layer = found, config.recipe_of(fqn, fqn in output_layers), fqn
                readers.setdefault(operand(target.call, target.position), {})[str(edit.tensor_name(found.node))] = layer
    strengths = STRENGTHS if config.smoothing == "auto" else (float(config.smoothing),)
    smoothing: dict[str, Tensor] = {}
    for x, layers in zip(_values(captured, edit, list(readers), inputs), readers.values(), strict=True):
        give_back()
        weights = [(layer.read(edit), recipe, fqn) for layer, recipe, fqn in layers.values()]
        factors = [_factor(x, weights, strength) for strength in strengths]
        errors = [_error(x, weights, factor, config) for factor in factors] if len(factors) > 1 else [0.0]
        best = factors[errors.index(min(errors))]
        if best is not None:
            smoothing |= {name: best for name in layers if name not in smoothing}
    return smoothing


def _values(captured: GraphProgram, edit: Editor, nodes: list[fx.Node], inputs: list[Tensor]) -> list[Tensor]:
    """Some tokens of these values, [tokens, channels]."""
    edit.set_outputs({f"value_{position}": node for position, node in enumerate(nodes)})
    program = edit.finish(captured.facts, (*captured.history, "measure inputs"))
    values = [value.reshape(-1, value.shape[-1]) for value in EagerRunner({"measure": program}).call("measure", inputs)]
    return [value[:: max(1, value.shape[0] // SAMPLES)].clone() for value in values]


def _factor(x: Tensor, layers: Layers, strength: float) -> Tensor | None:
    if not strength:
        return None
    largest = torch.stack([weight.abs().amax(0) for weight, _, _ in layers]).amax(0)
    factor = _floor(largest) ** (1 - strength) / _floor(x.square().mean(0).sqrt()) ** strength
    return (factor / factor.log().mean().exp()).detach()


def _floor(values: Tensor) -> Tensor:
    return values.clamp(min=max(float(values.max()) * SMALLEST, torch.finfo(torch.float32).tiny))


def _error(x: Tensor, layers: Layers, factor: Tensor | None, config: QuantizationConfig) -> float:
    """Square error of the layers, in units of their results, averaged over tokens."""
    total = 0.0
    for whole, recipe, fqn in layers:
        weight = whole[:: max(1, whole.shape[0] // OUTPUTS)]
        smooth, given = (weight, x) if factor is None else (weight / factor, x * factor)
        stored = store_weight(smooth.contiguous(), recipe, config.group_size, fqn, config.asymmetric)
        exact, found = x @ weight.t(), stored.linear(given, None, *stored.parts.values())
        total += float(((found - exact).square().sum(-1) / exact.square().sum(-1).clamp(min=1e-30)).mean())
    return total
