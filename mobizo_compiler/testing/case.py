"""`Case`: one entry of the zoo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mobizo_compiler.step.losses import CausalLMLoss, Loss

_CAUSAL_LM = CausalLMLoss()


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model with inputs, a loss and modules to adapt.

    Args:
        name: Name of the architecture.
        family: "plain", "decoder", "encoder", "encoder-decoder", "vision", "speech", "multimodal" or "other".
        build: Makes the float32 model with random weights.
        inputs: Makes inputs of three rows, the same ones each time.
        loss: A loss that fits what the model returns.
        target_modules: Ends of the names of modules to adapt; None is the compiler's default.
        options: More options of `compile`.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loss: Loss = _CAUSAL_LM
    target_modules: tuple[str, ...] | str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def model(self) -> nn.Module:
        """The model in eval mode, with the same weights each time."""
        torch.manual_seed(0)
        return self.build().eval()
