"""Losses: traceable functions from a model's outputs and labels to the loss of every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mobizo_compiler.config import JsonConfig, check_int
from mobizo_compiler.errors import LossError


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """What labels a loss takes for given outputs.

    Args:
        shape: Sizes; the first is rows.
        dtype: Type of the elements.
        low: Smallest label that counts; None if any number is a label.
        high: Largest label that counts.
        ignore_index: The label that does not count; None if all count.
        first: Labels before this position of a row never count (1 where the loss shifts by one token).
        max_labels: How many labels of a row may count; None if all may.
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype
    low: int | None = None
    high: int | None = None
    ignore_index: int | None = None
    first: int = 0
    max_labels: int | None = None


@runtime_checkable
class Loss(Protocol):
    """What the compiler needs of a loss. Implementations are frozen dataclasses."""

    def label_spec(self, outputs: Any) -> LabelSpec:
        """The labels for these (fake) outputs of the model."""

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses of each row, float32 [rows], and how many values it is the sum of, float32 [rows]."""


@dataclasses.dataclass(frozen=True)
class CausalLMLoss(JsonConfig):
    """Next-token cross-entropy with the labels of transformers: the shape of `input_ids`, shifted inside.

    Token t is predicted from position t - 1. The loss of a lane is the mean over its labelled tokens, as in
    `transformers.loss.loss_utils.ForCausalLMLoss`.

    Args:
        ignore_index: Label of tokens that do not count.
        max_labels: How many tokens of a row may be labelled; None if all may. The head then runs on that many
            positions of a row instead of all: for a classifier that answers with one token, 1.

    >>> logits = torch.zeros(1, 3, 4)
    >>> CausalLMLoss()(logits, torch.tensor([[-100, 2, -100]]))
    (tensor([1.3863]), tensor([1.]))
    """

    ignore_index: int = -100
    max_labels: int | None = None

    def __post_init__(self) -> None:
        if self.max_labels is not None:
            check_int("CausalLMLoss.max_labels", self.max_labels, 1, 1 << 20)
        check_int("CausalLMLoss.ignore_index", self.ignore_index, -(2**31), -1)

    def label_spec(self, outputs: Any) -> LabelSpec:
        """int64 [rows, tokens], a token id or `ignore_index`."""
        rows, tokens, vocabulary = _logits(outputs).shape
        return LabelSpec((rows, tokens), torch.int64, 0, int(vocabulary) - 1, self.ignore_index, 1, self.max_labels)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the labelled tokens of each row, and their number."""
        logits_NTV, target_NT = _logits(outputs), labels[:, 1:]
        if logits_NTV.dtype in (torch.float16, torch.bfloat16):
            logits_NTV = logits_NTV.to(torch.float32)
        counts_NT = (target_NT != self.ignore_index).to(logits_NTV.dtype)
        if self.max_labels is None or self.max_labels >= target_NT.shape[1]:
            logits_NTV = logits_NTV[:, :-1]
        else:
            # Labelled tokens have distinct scores above 0, so the K best are all of them, whatever the kernel.
            score_T = torch.arange(target_NT.shape[1], 0, -1, dtype=torch.float32)
            position_NT = torch.topk(counts_NT * score_T, self.max_labels, dim=1).indices
            index_NTV = position_NT.unsqueeze(-1).expand(-1, -1, logits_NTV.shape[2])
            logits_NTV = logits_NTV.gather(1, index_NTV)
            target_NT, counts_NT = target_NT.gather(1, position_NT), counts_NT.gather(1, position_NT)
        log_probability_NTV = F.log_softmax(logits_NTV, dim=-1)
        index_NT1 = target_NT.clamp(min=0).unsqueeze(-1)
        picked_NT = log_probability_NTV.gather(2, index_NT1).squeeze(-1)
        return -(picked_NT * counts_NT).sum(dim=1), counts_NT.sum(dim=1)


def _logits(outputs: Any) -> Tensor:
    """The logits [rows, tokens, vocabulary] in what a model returns."""
    if isinstance(outputs, Tensor):
        found: Any = outputs
    elif hasattr(outputs, "logits"):
        found = outputs.logits
    elif isinstance(outputs, Mapping):
        found = outputs.get("logits")
    else:
        found = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(outputs).__name__
        raise LossError(
            f"CausalLMLoss needs logits of shape [rows, tokens, vocabulary], the model returns {shape}",
            hint="return the logits as a tensor, as the first of a tuple, or under the name 'logits'",
        )
    return found
