"""Losses: traceable functions from a model's outputs and labels to the loss of every row.

A loss need not be differentiable: the gradient is estimated from its values alone. It must keep rows apart: the loss
of a row may depend on that row only.

Shape suffixes: N rows, T tokens, K labelled tokens, V vocabulary, C classes or choices.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mobizo_compiler.errors import ConfigError, LossError
from mobizo_compiler.extensions import DataclassRegistry
from mobizo_compiler.options import JsonConfig, check_int


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """What labels a loss takes for given outputs.

    Args:
        shape: Sizes; the first is rows, or None where the loss cannot tell.
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


@dataclasses.dataclass(frozen=True)
class Loss(JsonConfig, abc.ABC):
    """What the compiler needs of a loss: a frozen dataclass, whose fields are its options.

    An entry point or `register_loss` gives it a name. A plain function is a loss too; see `compile`.
    """

    @abc.abstractmethod
    def label_spec(self, outputs: Any) -> LabelSpec:
        """The labels for these (fake) outputs of the model."""

    @abc.abstractmethod
    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses of each row, float32 [rows], and how many values it is the sum of, float32 [rows]."""


@dataclasses.dataclass(frozen=True)
class _TokenLoss(Loss):
    """Cross-entropy over the vocabulary at labelled tokens; what the losses of language models share."""

    ignore_index: int = -100
    max_labels: int | None = None
    first: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.max_labels is not None:
            check_int(f"{type(self).__name__}.max_labels", self.max_labels, 1, 1 << 20)
        check_int(f"{type(self).__name__}.ignore_index", self.ignore_index, -(2**31), -1)

    def label_spec(self, outputs: Any) -> LabelSpec:
        """int64 [rows, tokens], a token id (or class) or `ignore_index`."""
        return _token_labels(self, outputs, self.first)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the labelled tokens of each row, and their number."""
        logits_NTV, target_NT, counts_NT = _labelled(self, outputs, labels, self.first)
        return _cross_entropy(logits_NTV, target_NT.clamp(min=0), counts_NT)


@dataclasses.dataclass(frozen=True)
class CausalLMLoss(_TokenLoss):
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

    first: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class MaskedLMLoss(_TokenLoss):
    """Cross-entropy at every labelled token, not shifted: masked language models and token classification.

    Encoder-decoder models take it too: their `decoder_input_ids` are the labels shifted by one, so that the logits of
    position t predict label t. The loss of a lane is the mean over its labelled tokens.

    Args:
        ignore_index: Label of tokens that do not count.
        max_labels: As for `CausalLMLoss`.

    >>> MaskedLMLoss()(torch.zeros(1, 3, 4), torch.tensor([[2, -100, 1]]))
    (tensor([2.7726]), tensor([2.]))
    """


@dataclasses.dataclass(frozen=True)
class SequenceClassificationLoss(Loss):
    """Cross-entropy between the classes of a whole row (a sentence, an image, a recording).

    Args:
        ignore_index: Label of rows that do not count.

    >>> SequenceClassificationLoss()(torch.zeros(2, 4), torch.tensor([3, -100]))
    (tensor([1.3863, -0.0000]), tensor([1., 0.]))
    """

    ignore_index: int = -100

    def __post_init__(self) -> None:
        check_int("SequenceClassificationLoss.ignore_index", self.ignore_index, -(2**31), -1)

    def label_spec(self, outputs: Any) -> LabelSpec:
        """int64 [rows], a class or `ignore_index`."""
        rows, classes = _output(self, outputs, "[rows, classes]").shape
        return LabelSpec((rows,), torch.int64, 0, int(classes) - 1, self.ignore_index)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each row, and 1, or 0 for rows that do not count."""
        logits_NC = _full_precision(_output(self, outputs, "[rows, classes]"))
        counts_N = (labels != self.ignore_index).to(logits_NC.dtype)
        picked_N1 = F.log_softmax(logits_NC, dim=-1).gather(1, labels.clamp(min=0).unsqueeze(-1))
        return -_where(counts_N > 0.0, picked_N1.squeeze(-1)), counts_N


@dataclasses.dataclass(frozen=True)
class MSELoss(Loss):
    """Mean squared error of a row: regression, also of hidden states or embeddings.

    Args:
        output: Name of the output to compare; the logits, or the only output, if None.

    >>> MSELoss()(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
    (tensor([5.]), tensor([1.]))
    """

    output: str | None = None

    def label_spec(self, outputs: Any) -> LabelSpec:
        """float32, the shape of the output."""
        return LabelSpec(tuple(_output(self, outputs, None, self.output).shape), torch.float32)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over everything of a row, and 1."""
        error = (_full_precision(_output(self, outputs, None, self.output)) - labels).square()
        axes = tuple(range(1, error.dim()))
        error_N = error.mean(dim=axes) if axes else error
        return error_N, torch.ones_like(error_N)


@dataclasses.dataclass(frozen=True)
class CallableLoss(Loss):
    """A plain function `fn(outputs, labels) -> losses [rows]` as a loss; `compile(loss=fn)` makes one.

    Args:
        function: Traceable; gets what the model returns.
        shape: Sizes of the labels after rows.
        dtype: Type of the labels.
    """

    function: Callable[[Any, Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def label_spec(self, outputs: Any) -> LabelSpec:
        """The shape and dtype of the example labels."""
        return LabelSpec((None, *self.shape), self.dtype)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The function's losses, float32 [rows], and 1 for each."""
        losses_N = self.function(outputs, labels)
        if not isinstance(losses_N, Tensor) or losses_N.dim() != 1:
            found = f"a tensor of shape {tuple(losses_N.shape)}" if isinstance(losses_N, Tensor) else repr(losses_N)
            raise LossError(
                f"{self!r} must return one loss per row, [rows]; it returns {found}",
                hint='use reduction="none", and the mean over all axes but the rows',
            )
        losses_N = losses_N.to(torch.float32)
        return losses_N, torch.ones_like(losses_N)

    def to_json(self) -> dict[str, Any]:
        """What can be told of a function: its name, and what labels it takes."""
        return {"function": self._named, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """A `ConfigError`: no file holds the function."""
        raise ConfigError(
            f"the loss is the function {values.get('function')!r}, which cannot be made from its name",
            hint="pass the function itself: loss=CallableLoss(function, shape, dtype), or derive a class from Loss",
        )

    @property
    def _named(self) -> str:
        return str(getattr(self.function, "__qualname__", type(self.function).__name__))

    def __repr__(self) -> str:
        return f"CallableLoss({self._named})"


@dataclasses.dataclass(frozen=True)
class ChoiceLoss(Loss):
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
        plain = _token_labels(self, outputs, first=1)
        assert plain.high is not None
        if max(self.choices) > plain.high:
            raise LossError(f"choice {max(self.choices)} is outside of the model's vocabulary of {plain.high + 1}")
        return dataclasses.replace(plain, choices=self.choices)

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy among the choices, summed over the labelled tokens of each row, and their number."""
        logits_NTV, target_NT, counts_NT = _labelled(self, outputs, labels, first=1)
        logits_NTC = torch.cat([logits_NTV[:, :, token : token + 1] for token in self.choices], dim=-1)
        index_NT = torch.zeros_like(target_NT)
        for position, token in enumerate(self.choices[1:], start=1):
            index_NT = index_NT + (target_NT == token).to(torch.int64) * position
        return _cross_entropy(logits_NTC, index_NT, counts_NT)


TokenClassificationLoss = MaskedLMLoss

LOSSES = DataclassRegistry(
    "loss",
    "mobizo_compiler.losses",
    Loss,  # type: ignore[type-abstract]
    {
        "causal-lm": "mobizo_compiler.step.losses:CausalLMLoss",
        "choice": "mobizo_compiler.step.losses:ChoiceLoss",
        "function": "mobizo_compiler.step.losses:CallableLoss",
        "masked-lm": "mobizo_compiler.step.losses:MaskedLMLoss",
        "mse": "mobizo_compiler.step.losses:MSELoss",
        "sequence-classification": "mobizo_compiler.step.losses:SequenceClassificationLoss",
    },
)


def register_loss(name: str, loss: type[Loss]) -> None:
    """Let `compile(loss=name)` mean this class in the running process. An entry point does so in all of them.

    Raises:
        ConfigError: The name is taken, or it is no frozen dataclass derived from `Loss`.
    """
    LOSSES.register(name, loss)


def get_loss(loss: str | Mapping[str, Any] | Loss) -> Loss:
    """A loss from its name, from its JSON as the manifest has it, or itself.

    Raises:
        ConfigError: There is no such loss, or an option of it is out of range.
        ExtensionUnavailableError: It is in a package that is broken.

    >>> get_loss({"name": "causal-lm", "max_labels": 1})
    CausalLMLoss(ignore_index=-100, max_labels=1)
    """
    if callable(loss) and not isinstance(loss, (Loss, type)):
        raise ConfigError(
            f"loss must be a Loss, not the function {loss!r}",
            hint="compile(loss=function, example_labels=...) makes one of a function",
        )
    return LOSSES.get(loss)


def _token_labels(loss: _TokenLoss | ChoiceLoss, outputs: Any, first: int) -> LabelSpec:
    rows, tokens, vocabulary = _output(loss, outputs, "[rows, tokens, vocabulary]").shape
    if isinstance(tokens, int) and tokens <= first:
        raise LossError(
            f"{type(loss).__name__} predicts a token from the one before; the logits have {tokens} position in all",
            hint="take rows of two tokens or more, and let the model return all logits (no logits_to_keep=1): "
            "max_labels=1 makes those of the labelled position alone",
        )
    return LabelSpec((rows, tokens), torch.int64, 0, int(vocabulary) - 1, loss.ignore_index, first, loss.max_labels)


def _labelled(loss: _TokenLoss | ChoiceLoss, outputs: Any, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and 1 or 0 for whether a target counts, at all positions or at the labelled ones of each row."""
    logits_NTV = _full_precision(_output(loss, outputs, "[rows, tokens, vocabulary]"))
    target_NT = labels[:, first:]
    counts_NT = (target_NT != loss.ignore_index).to(logits_NTV.dtype)
    most, tokens = loss.max_labels, target_NT.shape[1]
    if most is None or (isinstance(tokens, int) and most >= tokens):
        return (logits_NTV[:, :-1] if first else logits_NTV), target_NT, counts_NT
    # Labelled tokens have distinct scores above 0, so the K best are all of them, whatever the kernel.
    score_T = torch.arange(tokens, 0, -1, dtype=torch.float32, device=counts_NT.device)
    position_NK = torch.topk(counts_NT * score_T, most, dim=1).indices
    index_NKV = position_NK.unsqueeze(-1).expand(-1, -1, logits_NTV.shape[2])
    return logits_NTV.gather(1, index_NKV), target_NT.gather(1, position_NK), counts_NT.gather(1, position_NK)


def _cross_entropy(logits_NTC: Tensor, index_NT: Tensor, counts_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: cross-entropy summed over positions that count, and their number."""
    log_probability_NTC = F.log_softmax(logits_NTC, dim=-1)
    picked_NT = log_probability_NTC.gather(2, index_NT.unsqueeze(-1)).squeeze(-1)
    return -_where(counts_NT > 0.0, picked_NT).sum(dim=1), counts_NT.sum(dim=1)


def _where(counts: Tensor, values: Tensor) -> Tensor:
    """What counts, and 0 for the rest: a product with 0 would keep what is infinite or no number."""
    return torch.where(counts, values, torch.zeros_like(values))


def _full_precision(values: Tensor) -> Tensor:
    """Differences of losses need float32: half precision cannot resolve them."""
    return values.to(torch.float32) if values.dtype in (torch.float16, torch.bfloat16) else values


def _output(loss: object, outputs: Any, shape: str | None, name: str | None = None) -> Tensor:
    """One output of a model: the named one, the logits, the only one or the first; of that many axes."""
    wanted = name or "logits"
    if isinstance(outputs, Tensor):
        found: Any = outputs if name is None else None
    elif hasattr(outputs, wanted):
        found = getattr(outputs, wanted)
    elif isinstance(outputs, Mapping):
        found = outputs.get(wanted)
        if found is None and name is None and len(outputs) == 1:
            found = next(iter(outputs.values()))
    else:
        found = outputs[0] if name is None and isinstance(outputs, (tuple, list)) and outputs else None
    if not isinstance(found, Tensor) or (shape is not None and found.dim() != shape.count(",") + 1):
        kind = type(loss).__name__
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(outputs).__name__
        asked = f"an output named {name!r}" if name else f"logits of shape {shape}" if shape else "logits"
        raise LossError(
            f"{kind} needs {asked}, the model returns {what}",
            hint="return the logits as a tensor, as the first of a tuple, or under the name 'logits'; "
            "or pass a function of outputs and labels as the loss",
        )
    return found
