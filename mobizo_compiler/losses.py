"""Losses: traceable functions from a model's outputs and labels to the loss of every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mobizo_compiler.config import JsonConfig, check_int
from mobizo_compiler.errors import ConfigError, LossError


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
        choices: The labels that count, where they are few; None if any from `low` to `high` is.
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype
    low: int | None = None
    high: int | None = None
    ignore_index: int | None = None
    first: int = 0
    max_labels: int | None = None
    choices: tuple[int, ...] | None = None


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
        logits_NTV, target_NT, counts_NT = _labelled(outputs, labels, self.ignore_index, self.max_labels)
        return _cross_entropy(logits_NTV, target_NT.clamp(min=0), counts_NT)


@dataclasses.dataclass(frozen=True)
class ChoiceLoss(JsonConfig):
    """Cross-entropy among a few answers, for a model that answers with one token out of a known set.

    `CausalLMLoss` spends most of its gradient on making any of the answers likely at all; here only the choice
    between them counts, which is what a zeroth-order estimate can then learn from. Labels as for `CausalLMLoss`.

    Args:
        choices: Token ids of the answers.
        ignore_index: Label of tokens that do not count.
        max_labels: How many tokens of a row may be labelled; None if all may.

    >>> logits = torch.zeros(1, 3, 9)
    >>> ChoiceLoss(choices=(2, 5))(logits, torch.tensor([[-100, -100, 5]]))
    (tensor([0.6931]), tensor([1.]))
    """

    choices: tuple[int, ...]
    ignore_index: int = -100
    max_labels: int | None = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        for choice in self.choices:
            check_int("ChoiceLoss.choices", choice, 0, 2**31 - 1)
        if len(set(self.choices)) < 2 or len(set(self.choices)) < len(self.choices):
            raise ConfigError(f"ChoiceLoss.choices is {self.choices}; it must have two or more different token ids")
        CausalLMLoss(self.ignore_index, self.max_labels)

    def label_spec(self, outputs: Any) -> LabelSpec:
        """int64 [rows, tokens], one of the choices or `ignore_index`."""
        vocabulary = int(_logits(outputs).shape[2])
        if max(self.choices) >= vocabulary:
            raise LossError(f"choice {max(self.choices)} is outside of the model's vocabulary of {vocabulary}")
        plain = CausalLMLoss(self.ignore_index, self.max_labels).label_spec(outputs)
        return dataclasses.replace(plain, choices=self.choices)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy among the choices, summed over the labelled tokens of each row, and their number."""
        logits_NTV, target_NT, counts_NT = _labelled(outputs, labels, self.ignore_index, self.max_labels)
        logits_NTC = torch.cat([logits_NTV[:, :, token : token + 1] for token in self.choices], dim=-1)
        index_NT = torch.zeros_like(target_NT)
        for position, token in enumerate(self.choices[1:], start=1):
            index_NT = index_NT + (target_NT == token).to(torch.int64) * position
        return _cross_entropy(logits_NTC, index_NT, counts_NT)


def _labelled(outputs: Any, labels: Tensor, ignore_index: int, max_labels: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and 1 or 0 for whether a target counts, at all positions or at the labelled ones of each row."""
    logits_NTV, target_NT = _logits(outputs), labels[:, 1:]
    if logits_NTV.dtype in (torch.float16, torch.bfloat16):
        logits_NTV = logits_NTV.to(torch.float32)
    counts_NT = (target_NT != ignore_index).to(logits_NTV.dtype)
    if max_labels is None or max_labels >= target_NT.shape[1]:
        return logits_NTV[:, :-1], target_NT, counts_NT
    # Labelled tokens have distinct scores above 0, so the K best are all of them, whatever the kernel.
    score_T = torch.arange(target_NT.shape[1], 0, -1, dtype=torch.float32)
    position_NK = torch.topk(counts_NT * score_T, max_labels, dim=1).indices
    index_NKV = position_NK.unsqueeze(-1).expand(-1, -1, logits_NTV.shape[2])
    return logits_NTV.gather(1, index_NKV), target_NT.gather(1, position_NK), counts_NT.gather(1, position_NK)


def _cross_entropy(logits_NTC: Tensor, index_NT: Tensor, counts_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: cross-entropy summed over positions that count, and their number."""
    log_probability_NTC = F.log_softmax(logits_NTC, dim=-1)
    picked_NT = log_probability_NTC.gather(2, index_NT.unsqueeze(-1)).squeeze(-1)
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
