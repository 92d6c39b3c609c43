"""Small models to test compilers and backends with. Nothing in them is square, so that a transposed matrix shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenWise(nn.Module):
    """Two linear layers on embedded tokens: the smallest model with a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.head = nn.Linear(20, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [rows, tokens, 11]."""
        logits: Tensor = self.head(torch.tanh(self.up(self.embedding(tokens))))
        return logits


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_width = heads, key_heads, head_width
        self.norm, self.norm2 = _Norm(width), _Norm(width)
        self.q_proj = nn.Linear(width, heads * head_width, bias=False)
        self.k_proj = nn.Linear(width, key_heads * head_width, bias=False)
        self.v_proj = nn.Linear(width, key_heads * head_width, bias=False)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)
        self.up_proj, self.down_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        normed = self.norm(x)
        query = self.q_proj(normed).view(rows, tokens, self.heads, self.head_width).transpose(1, 2)
        key = self.k_proj(normed).view(rows, tokens, self.key_heads, self.head_width).transpose(1, 2)
        value = self.v_proj(normed).view(rows, tokens, self.key_heads, self.head_width).transpose(1, 2)
        repeat = self.heads // self.key_heads
        size = (rows, self.heads, tokens, self.head_width)
        key = key[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(size)
        value = value[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(size)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.o_proj(attended.transpose(1, 2).reshape(rows, tokens, -1))
        x = x + self.down_proj(F.silu(self.up_proj(self.norm2(x))))
        return x


class TinyCausalLM(nn.Module):
    """A decoder like Llama's: grouped queries, RMSNorm, padding mask; keyword inputs and a dict of outputs."""

    def __init__(self, layers: int = 2, vocabulary: int = 23, width: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(64, width) * 0.1)
        self.layers = nn.ModuleList(_Block(width, heads=4, key_heads=2, head_width=6, hidden=28) for _ in range(layers))
        self.norm = _Norm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """`{"logits": [rows, tokens, vocabulary]}`."""
        tokens = input_ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).tril()
        mask = causal[None, None] & attention_mask[:, None, None, :].to(torch.bool)
        x = self.embedding(input_ids) + self.position[:tokens]
        for layer in self.layers:
            x = layer(x, mask)
        return {"logits": self.lm_head(self.norm(x))}


class TinyEncoder(nn.Module):
    """An encoder like BERT's, on features: LayerNorm, both forms of GELU, attention as products, a mean, classes."""

    def __init__(self, width: int = 24, heads: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.embedding, self.norm, self.norm2 = nn.Linear(12, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up, self.mid, self.down = nn.Linear(width, 28), nn.Linear(28, 20), nn.Linear(20, width)
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """[rows, tokens, 12] to [rows, classes]."""
        rows, tokens, _ = features.shape
        x = self.embedding(features)
        normed = self.norm(x)
        query, key, value = (
            layer(normed).reshape(rows, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, dim=-1)
        x = x + (weights @ value).transpose(1, 2).reshape(x.shape)
        hidden = F.gelu(self.mid(F.gelu(self.up(self.norm2(x)))), approximate="tanh")
        result: Tensor = self.head((x + self.down(hidden)).mean(1))
        return result


def tiny_batch(rows: int = 3, tokens: int = 7, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels for `TinyCausalLM`: padded on the right, and a prompt that is not labelled.

    >>> inputs, labels = tiny_batch()
    >>> inputs["input_ids"].shape, int((labels[0] != -100).sum())
    (torch.Size([3, 7]), 4)
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 23, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[0, tokens - 1 :] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels
