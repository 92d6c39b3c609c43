"""Modules of torch.nn with their rows in unusual places: what a compiler that guesses axes gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_compiler.step.losses import CallableLoss, MSELoss, SequenceClassificationLoss
from mobizo_compiler.testing.case import Case
from mobizo_compiler.testing.models import TinyCausalLM, TokenWise, tiny_batch

ROWS, TOKENS, WIDTH = 3, 5, 12


class BatchSecondAttention(nn.Module):
    """Self-attention of torch with its default [tokens, rows, width]; its projections are raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 16)
        self.attention = nn.MultiheadAttention(16, 4)
        self.down = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, rows, 12] to [tokens, rows, 7]."""
        hidden = self.up(x)
        result: Tensor = self.down(self.attention(hidden, hidden, hidden, need_weights=False)[0] + hidden)
        return result


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` with a padding mask, batch second inside."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 3, dim_feedforward=20, batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """[rows, tokens, 12] and True at padding [rows, tokens] to [rows, 4]."""
        result: Tensor = self.head(self.encoder(x.transpose(0, 1), src_key_padding_mask=padding)[0])
        return result


class Recurrent(nn.Module):
    """A recurrent network, unrolled by the capture, that classifies by its last state."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN], batch_first: bool) -> None:
        super().__init__()
        self.cell = cell(WIDTH, 10, batch_first=batch_first)
        self.last = (slice(None), -1) if batch_first else (-1,)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, tokens, 12], or with tokens first, to [rows, 4]."""
        result: Tensor = self.head(self.cell(x)[0][self.last])
        return result


class ConvolutionNet(nn.Module):
    """Strided, padded and grouped convolutions, batch norm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 10, 1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(10 * 4, 5)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """[rows, 3, 8, 8] to [rows, 5]."""
        hidden = F.relu(self.norm(self.first(image)))
        hidden = self.pool(F.relu(self.pointwise(self.depthwise(hidden))))
        result: Tensor = self.head(hidden.flatten(1))
        return result


class Convolution1d(nn.Module):
    """Dilated convolutions over time with string padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 9, 3, padding="same", dilation=2)
        self.second = nn.Conv1d(9, 6, 2, stride=2)

    def forward(self, sound: Tensor) -> Tensor:
        """[rows, 4, 16] to [rows, 6]."""
        return self.second(torch.tanh(self.first(sound))).mean(-1)  # type: ignore[no-any-return]


class Parameters(nn.Module):
    """Products with parameters that belong to no linear layer: `@`, `einsum`, `addmm`, a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(WIDTH, 9) / 3)
        self.across = nn.Parameter(torch.randn(7, 9) / 3)
        self.out = nn.Parameter(torch.randn(7, 5) / 2)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, tokens, 12] to [rows, tokens, 5]."""
        hidden = torch.tanh(torch.einsum("ntd,de->nte", x, self.into)) @ self.across.T
        return torch.addmm(self.bias, hidden.reshape(-1, 7), self.out).view(*x.shape[:2], 5)


class SharedTable(nn.Module):
    """Inputs without rows: a table that all rows share, a scalar, and an option; nested outputs with None."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, table: Tensor, gain: Tensor, *, normed: bool) -> dict[str, Any]:
        """[rows, tokens, 12], [tokens, 8] and a scalar to a dict of [rows, tokens, 6] and more."""
        hidden = torch.tanh(self.up(x) + table) * gain
        hidden = F.normalize(hidden, dim=-1) if normed else hidden
        return {"logits": self.down(hidden), "more": (hidden, None, 3)}


class FlatWindows(nn.Module):
    """Rows and windows of tokens flattened together, as in Swin; the number of rows is baked in by int()."""

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, 6)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """[rows, 6, 12] to [rows, 6, 6]."""
        rows = self.rows or x.shape[0]
        windows = x.reshape(rows, 3, 2, WIDTH).reshape(rows * 3, 2, WIDTH)
        hidden = torch.tanh(self.up(windows))
        mixed = torch.softmax(hidden @ hidden.transpose(1, 2), -1) @ hidden
        start = torch.zeros(rows, 1, 8)
        return self.down(torch.cat([start, mixed.reshape(rows, 6, 8)], 1)[:, 1:])  # type: ignore[no-any-return]


class TiedTwice(nn.Module):
    """One layer called twice, and a head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(11, 14), nn.Linear(14, 14), nn.Linear(14, 11, bias=False)
        self.down = nn.Linear(14, 9)
        self.up = nn.Linear(9, 14)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[rows, tokens] to [rows, tokens, 11]."""
        hidden = torch.tanh(self.mix(torch.tanh(self.mix(self.embedding(tokens)))))
        hidden = self.up(torch.tanh(self.down(torch.tanh(self.up(torch.tanh(self.down(hidden)))))))
        result: Tensor = self.head(hidden)
        return result


class LastToken(nn.Module):
    """Picks a position of every row by the number of the row, as sequence classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[rows, tokens] to [rows, 4]."""
        last = (tokens != 0).to(torch.int64).cumsum(1).argmax(1)
        hidden = torch.tanh(self.up(self.embedding(tokens).cumsum(1)))
        result: Tensor = self.head(hidden)[torch.arange(tokens.shape[0]), last]
        return result


def error_of_second_axis(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss for outputs [tokens, rows, ...] and labels [rows]: [rows]."""
    return (outputs.mean(dim=(0, 2)) - labels).square()


def _floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return make


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 11, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)),)


def _padded() -> tuple[Tensor, ...]:
    padding = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    padding[1, 3:] = True
    return (*_floats((ROWS, TOKENS, WIDTH))(), padding)


def _shared() -> dict[str, Any]:
    x, table = _floats((ROWS, TOKENS, WIDTH), (TOKENS, 8))()
    return {"x": x, "table": table, "gain": torch.tensor(1.5), "normed": False}


def plain_cases() -> list[Case]:
    """All cases."""
    batch_second = CallableLoss(error_of_second_axis, (), torch.float32)
    classes, mean = SequenceClassificationLoss(), MSELoss()
    first, second = _floats((ROWS, TOKENS, WIDTH)), _floats((TOKENS, ROWS, WIDTH))
    by_second = {"row_axes": {0: 1}}
    return [
        Case("token_wise", "plain", TokenWise, _tokens, target_modules=("up", "head")),
        Case("tiny_causal_lm", "plain", TinyCausalLM, lambda: tiny_batch()[0]),
        Case(
            "attention_batch_second",
            "plain",
            BatchSecondAttention,
            second,
            batch_second,
            ("up", "in_proj_weight", "out_proj", "down"),
            by_second,
        ),
        Case("transformer_encoder", "plain", TorchEncoder, _padded, classes, ("in_proj_weight", "linear1", "linear2")),
        Case("lstm", "plain", lambda: Recurrent(nn.LSTM, True), first, classes, ("weight_ih_l0", "weight_hh_l0")),
        Case(
            "gru_batch_second",
            "plain",
            lambda: Recurrent(nn.GRU, False),
            second,
            classes,
            ("weight_ih_l0", "weight_hh_l0"),
            by_second,
        ),
        Case("rnn", "plain", lambda: Recurrent(nn.RNN, True), first, classes, ("weight_ih_l0", "head")),
        Case("cnn", "plain", ConvolutionNet, _floats((ROWS, 3, 8, 8)), classes, ("first", "pointwise", "head")),
        Case("cnn_1d", "plain", Convolution1d, _floats((ROWS, 4, 16)), mean, ("first", "second")),
        Case("parameters", "plain", Parameters, first, mean, ("into", "across", "out")),
        Case("inputs_without_rows", "plain", SharedTable, _shared, mean, ("up", "down"), {"row_axes": {"table": None}}),
        Case("flat_windows", "plain", FlatWindows, _floats((ROWS, 6, WIDTH)), mean, ("up", "down")),
        Case("fixed_rows", "plain", lambda: FlatWindows(ROWS), _floats((ROWS, 6, WIDTH)), mean, ("up", "down")),
        Case("tied_twice", "plain", TiedTwice, _tokens, target_modules=("mix", "down", "up", "head")),
        Case("last_token", "plain", LastToken, _tokens, classes, ("up", "head")),
    ]
