"""Layers that arrive quantized by torchao: adapters on them, and what XNNPACK makes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.reference import ReferenceStep

RECIPES: dict[str, Any] = {
    "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    "8da8w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
    "8w": Int8WeightOnlyConfig(),
    "4w": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


SLOW = (("8da4w", "xnnpack"), ("8da8w", "xnnpack"), ("8w", "xnnpack"), ("4w", "xnnpack"))


class Wide(nn.Module):
    """Widths that groups of 32 divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(11, 32), nn.Linear(32, 64), nn.Linear(64, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.up(self.embedding(tokens))))
        return result


def quantized(recipe: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Wide().eval()
    quantize_(model, RECIPES[recipe], filter_fn=lambda module, fqn: fqn == "up")
    return model, torch.randint(0, 11, (3, 5))


@pytest.mark.parametrize("recipe", ["4w", "8da4w"])
def test_the_gradient_through_quantized_layers(recipe: str) -> None:
    """Straight through the rounding of inputs, with the weights as they are stored: that of the decoded layer.

    XNNPACK holds scales of groups in bfloat16 where it rounds inputs. Where it does not, they stay what they are.
    """
    model, tokens = quantized(recipe)
    decoded = copy.deepcopy(model)
    decoded.up.weight = nn.Parameter(model.up.weight.dequantize(), requires_grad=False)  # type: ignore[union-attr, operator]
    lora, zo = LoraConfig(r=3, lora_alpha=5, target_modules=("up",)), ZOConfig(estimator="exact")
    gradients = []
    for layer, backend in ((decoded, "eager"), (model, "eager"), (model, "xnnpack")):
        session = Session(mobizo.compile(layer, (tokens,), lora, zo, backend=backend))
        session.train_step((tokens,), tokens, seed=0, learning_rate=-1.0)
        gradients.append(session.state())
    wanted = gradients[0]
    assert wanted.abs().max() > 0.01
    # An input is off by half of 1/255 of its range, which the rest of the forward pass sees; bfloat16 by 2^-9.
    tolerance = 1e-6 if recipe == "4w" else 0.02 * float(wanted.abs().max())
    for found in gradients[1:]:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=tolerance)


# On XNNPACK the recipe that it has kernels of its own for.
CELLS = [
    pytest.param(recipe, backend, marks=pytest.mark.slow if (recipe, backend) in SLOW else ())
    for recipe in RECIPES
    for backend in ("eager", "xnnpack")
]


@pytest.mark.parametrize(("recipe", "backend"), CELLS)
def test_adapters_on_quantized_layers(recipe: str, backend: str) -> None:
    """Against a hook on the quantized module, which adds the adapter to what the module returns."""
    model, tokens = quantized(recipe)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=("up",))
    program = mobizo.compile(model, (tokens,), lora, ZOConfig(queries=2), backend=backend)
    session = Session(program)
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    session.load_state(start)
    reference.state.copy_(start)
    # The engines round activations to int8 at slightly different places: a step of one entry moves a logit by less
    # than the largest weight times the step, 0.2 * 0.03, and a loss by that over the number of entries.
    tolerance = 3e-6 if backend == "eager" else 3e-4
    found = session.train_step((tokens,), tokens, seed=1, learning_rate=0.01, eps=0.5)
    wanted = reference.train_step((tokens,), tokens, seed=1, learning_rate=0.01, eps=0.5)
    torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=tolerance)
    assert wanted.lane_losses.std() > 20 * tolerance, "the lanes must differ by more than is allowed"
    torch.testing.assert_close(session.state(), reference.state, rtol=0, atol=0.01 * 6 * tolerance / 0.5 + 1e-6)
    reference.remove()


def test_the_base_weights_stay_integers() -> None:
    model, tokens = quantized("8da4w")
    program = mobizo.compile(model, (tokens,), LoraConfig(r=3, target_modules=("up",)), backend="eager")
    kept = {path: tensor.dtype for path, tensor in program.methods["train_step"].tensors().values()}
    assert torch.int8 in kept.values()
    assert all(
        tensor.shape != (64, 32) or tensor.dtype == torch.int8
        for _, tensor in program.methods["train_step"].tensors().values()
    )
