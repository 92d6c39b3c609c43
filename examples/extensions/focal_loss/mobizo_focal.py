"""Focal loss (Lin et al. 2017) for the next token: what is predicted well already counts less."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.step import LabelSpec, Loss


@dataclasses.dataclass(frozen=True)
class FocalLoss(Loss):
    """-(1 - p)^gamma log p for the probability p of each labelled token; labels as for `CausalLMLoss`.

    Args:
        gamma: How much less; 0 is cross-entropy.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 10:
            raise ConfigError(f"FocalLoss.gamma is {self.gamma}; it must be in 0..10")

    def label_spec(self, outputs: Any) -> LabelSpec:
        """int64 [rows, tokens]: a token, or -100 where nothing is to be learnt; the first token never counts."""
        rows, tokens, vocabulary = outputs["logits"].shape
        return LabelSpec((rows, tokens), torch.int64, low=0, high=vocabulary - 1, ignore_index=-100, first=1)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row: the sum over its labelled tokens, and their number."""
        log_p_NTV = torch.log_softmax(outputs["logits"][:, :-1].float(), dim=-1)
        target_NT = labels[:, 1:]
        log_p_NT = log_p_NTV.gather(2, target_NT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        counts_NT = (target_NT != -100).float()
        losses_NT = -((1 - log_p_NT.exp()) ** self.gamma) * log_p_NT * counts_NT
        return losses_NT.sum(dim=1), counts_NT.sum(dim=1)
