"""Programs of a tiny Llama that are compiled here and run on Arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mobizo_compiler as mobizo
from mobizo_compiler import GenerateConfig, LoraConfig, ZOConfig

ROWS, TOKENS, QUERIES, CONTEXT = 2, 12, 4, 32
RECIPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "8da8w": {"quantization": "8da8w"},
    "8da4w": {"quantization": "8da4w"},
    "exact": {"zo": ZOConfig(estimator="exact")},
    "rademacher": {"zo": ZOConfig(queries=QUERIES, noise="rademacher"), "generate": GenerateConfig(context=CONTEXT)},
}


def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Four batches of random tokens that predict one another."""
    ids = torch.randint(1, 96, (4, ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    return [({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, rows) for rows in ids]


def compiled(recipe: str, path: Path, wrong: bool = False) -> Path:
    """A program file; `wrong` is one whose model has another sign in one weight."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    if wrong:
        weight = model.model.layers[0].mlp.down_proj.weight.data.view(-1)
        weight[weight.abs().argmax()] *= -1
    options = {"zo": ZOConfig(queries=QUERIES), **RECIPES[recipe]}
    return mobizo.compile(model, batches()[0][0], LoraConfig(r=3), loss=mobizo.CausalLMLoss(), **options).save(path)
