"""Lion (Chen et al. 2023, arXiv 2302.06675): signs of a mean that forgets slowly and listens to the last direction."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mobizo_compiler.step import Memory, UpdateRule


@dataclasses.dataclass(frozen=True)
class Lion(UpdateRule):
    """Every number moves by the learning rate; `weight_decay` is that of the base.

    Args:
        beta1: Share of the mean in the step; the rest is the direction of now.
        beta2: Share of the mean that is kept.
    """

    beta1: float = 0.9
    beta2: float = 0.99

    def init(self, parameters: int) -> Memory:
        """The mean of directions."""
        return {"mean": torch.zeros(parameters)}

    def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """-1, 0 or 1 for every number."""
        mixed_P = memory["mean"] * self.beta1 + direction_P * (1 - self.beta1)
        mean_P = memory["mean"] * self.beta2 + direction_P * (1 - self.beta2)
        return torch.sign(mixed_P), {"mean": mean_P}
