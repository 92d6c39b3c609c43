"""Lookups in tables: inputs keep to them however they are reshaped, and positions that go beyond are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
)

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, LoraConfig, SequenceClassificationLoss, Session, ZOConfig
from mobizo_compiler.errors import ExampleInputError, MobizoError, TokenRangeError

SIZES = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 1}
ROBERTA = RobertaConfig(**SIZES, intermediate_size=48, max_position_embeddings=18, type_vocab_size=1, num_labels=3)
OPT = OPTConfig(
    **SIZES, ffn_dim=48, max_position_embeddings=12, word_embed_proj_dim=32, do_layer_norm_before=True, bos_token_id=2
)
GPT2 = GPT2Config(vocab_size=23, n_embd=32, n_layer=1, n_head=4, n_positions=12, pad_token_id=1)


def compiled(config: PretrainedConfig, tokens: int, **inputs: Tensor) -> mobizo.Program:
    torch.manual_seed(0)
    of = AutoModelForSequenceClassification if config is ROBERTA else AutoModelForCausalLM
    ids = torch.randint(3, 23, (2, tokens))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    loss = SequenceClassificationLoss() if config is ROBERTA else CausalLMLoss()
    lora = LoraConfig(r=2, target_modules=None)
    return mobizo.compile(of.from_config(config).eval(), given, lora, ZOConfig(queries=1), loss, backend="eager")


@pytest.mark.parametrize(
    ("config", "table", "most"),
    [
        (ROBERTA, "roberta.embeddings.position_embeddings.weight' has 18 entries", 16),
        pytest.param(OPT, "model.decoder.embed_positions.weight' has 14 entries", 12, marks=pytest.mark.slow),
        (GPT2, "transformer.wpe.weight' has 12 entries", 12),
    ],
    ids=["roberta", "opt", "gpt2"],
)
def test_rows_that_are_longer_than_a_table_of_positions(config: PretrainedConfig, table: str, most: int) -> None:
    with pytest.raises(ExampleInputError, match=rf"{table}(.|\n)*rows of at most {most} tokens"):
        compiled(config, most + 2)
    session = Session(compiled(config, most))
    ids = torch.randint(3, 23, (2, most))
    outputs = session.evaluate({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert outputs.logits.isfinite().all()
    assert session.program.manifest.inputs[0].high == 22
    with pytest.raises(TokenRangeError):
        session.evaluate({"input_ids": ids + 20, "attention_mask": torch.ones_like(ids)})


def test_an_example_beyond_a_table_names_the_table() -> None:
    types = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(ExampleInputError, match=r"token_type_embeddings.weight' has 1 entries(.|\n)*at position 1"):
        compiled(ROBERTA, 8, token_type_ids=types)


class Reshaped(nn.Module):
    """Looks its ids up after they were flattened and cast, and counts positions in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.words, self.places, self.up = nn.Embedding(11, 12), nn.Embedding(8, 12), nn.Linear(12, 11)
        self.how = how

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = ids.shape[1]
        words = self.words(ids.view(-1, tokens).to(torch.int32).unsqueeze(1).to(torch.int64)).squeeze(1)
        counted = mask.cumsum(1)
        places = {
            "counted": counted,
            "clamped": counted.clamp(max=7),
            "wrapped": counted % 8,
            "selected": torch.where(counted > 7, 7, counted),
            "unknown": (counted.float() / 2).long(),
            "before": (counted - 1).clamp(min=0),
        }[self.how]
        return self.up(torch.tanh(words + self.places(places)))


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        *((how, tokens) for how in ("counted", "before") for tokens in (7, 8, 12)),
        *((how, 12) for how in ("clamped", "wrapped", "selected", "unknown")),
        *(
            pytest.param(how, tokens, marks=pytest.mark.slow)  # what is taken with 12 tokens
            for how in ("clamped", "wrapped", "selected", "unknown")
            for tokens in (7, 8)
        ),
    ],
)
def test_bounds_of_positions(how: str, tokens: int) -> None:
    ids = torch.randint(0, 11, (3, tokens))
    arguments: Any = (Reshaped(how).eval(), (ids, torch.ones_like(ids)), LoraConfig(r=2, target_modules=("up",)))
    past = {"counted": tokens > 7, "before": tokens > 8}.get(how, False)
    if past:
        with pytest.raises(ExampleInputError, match=f"rows of at most {7 if how == 'counted' else 8} tokens"):
            mobizo.compile(*arguments, backend="eager")
        return
    program = mobizo.compile(*arguments, backend="eager")
    assert (program.manifest.inputs[0].low, program.manifest.inputs[0].high) == (0, 10)
    assert program.manifest.inputs[1].high is None


def test_dynamic_rows_are_bounded_by_their_maximum() -> None:
    ids = torch.randint(0, 11, (3, 5))
    tokens = torch.export.Dim("tokens", min=2, max=16)
    shapes = {0: {1: tokens}, 1: {1: tokens}}
    with pytest.raises(MobizoError, match="has 8 entries, which are read up to position 16"):
        mobizo.compile(
            Reshaped("counted").eval(), (ids, torch.ones_like(ids)), LoraConfig(r=2, target_modules=("up",)),
            backend="eager", dynamic_shapes=shapes,
        )  # fmt: skip
