"""A loss that reads a few outputs of an adapted layer: those alone are adapted, and the rest stays as it was."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import mobizo_compiler as mobizo
from mobizo_compiler import ChoiceLoss, LoraConfig, Session, ZOConfig
from mobizo_compiler.errors import AdapterError
from mobizo_compiler.format.peft import WEIGHTS
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.step.losses import Loss

pytestmark = pytest.mark.xdist_group("few_outputs")  # one process, so that its programs are made once

CHOICES, WORDS = (31, 7), 50
OTHERS = [word for word in range(WORDS) if word not in CHOICES]
ZO = ZOConfig(queries=3)


def model(tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=WORDS, num_hidden_layers=1, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).eval()


def inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, WORDS, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def labels() -> torch.Tensor:
    found = torch.full((2, 6), -100)
    found[0, 5], found[1, 4] = CHOICES
    return found


@functools.cache
def made(
    backend: str = "eager", train_a: bool = True, loss: Loss | None = None, tied: bool = True, **options: Any
) -> mobizo.Program:
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=("lm_head",), train_a=train_a)
    return mobizo.compile(
        model(tied), inputs(), None if "adapter" in options else lora, ZO, loss or ChoiceLoss(CHOICES),
        backend=backend, **options,
    )  # fmt: skip


def trained(program: mobizo.Program, steps: int = 5) -> Session:
    session = Session(program)
    for step in range(steps):
        session.train_step(inputs(), labels(), seed=step, learning_rate=0.1, eps=0.05)
    return session


@pytest.mark.parametrize(
    ("backend", "train_a", "split"),
    [
        ("eager", False, False),
        ("eager", True, True),
        pytest.param("portable", True, True, marks=pytest.mark.slow),
        pytest.param("xnnpack", True, False, marks=pytest.mark.slow),
        pytest.param("xnnpack", False, True, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_plain_pytorch(backend: str, train_a: bool, split: bool) -> None:
    program = made(backend, train_a, split_prefix=split)
    (site,) = program.sites
    assert site.outputs == tuple(sorted(CHOICES)) and site.size == 2 * 2 and site.out_features == WORDS
    assert program.parameters == 2 * 2 + 2 * 32 * train_a
    session, plain = Session(program), model()
    reference = ReferenceStep(plain, program.sites, program.lora_a_by_fqn, zo=ZO, loss=ChoiceLoss(CHOICES))
    for step in range(5):
        options: dict[str, Any] = {"seed": step, "learning_rate": 0.1, "eps": 0.05}
        found = session.train_step(inputs(), labels(), **options)
        wanted = reference.train_step(inputs(), labels(), **options)
        torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=2e-5)
    torch.testing.assert_close(session.state(), reference.state, rtol=0, atol=1e-3)
    logits, zero_shot = session.evaluate(inputs()).logits, model()(**inputs()).logits.detach()
    torch.testing.assert_close(logits, reference.evaluate(inputs()).logits, rtol=0, atol=1e-3)
    assert (logits - zero_shot)[..., list(CHOICES)].abs().max() > 1e-2
    torch.testing.assert_close(logits[..., OTHERS], zero_shot[..., OTHERS], rtol=0, atol=1e-5)
    b = session.lora_b("lm_head")
    assert b.shape == (2, WORDS) and not b[:, OTHERS].any() and b[:, list(CHOICES)].any()


def test_a_loss_over_all_words_adapts_all() -> None:
    program = made(loss=mobizo.CausalLMLoss())
    assert program.sites[0].outputs == () and program.sites[0].size == 2 * WORDS


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_to_peft_and_back(tied: bool, tmp_path: Path) -> None:
    program = made(tied=tied)
    session = trained(program)
    logits = session.evaluate(inputs()).logits
    session.export_adapter(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(model(tied), str(tmp_path))(**inputs()).logits, logits)
    again = Session(program)
    again.import_adapter(tmp_path)
    assert torch.equal(again.state(), session.state())
    merged = model(tied)
    if tied:
        with pytest.raises(AdapterError, match=r"lm_head shares its weight(.|\n)*weight of its own"):
            session.merge_into(merged)
        assert torch.equal(merged.lm_head.weight, model().lm_head.weight)
        merged.lm_head.weight = torch.nn.Parameter(merged.lm_head.weight.detach().clone())
    session.merge_into(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs()).logits, logits)


@pytest.mark.slow
def test_an_adapter_of_all_words_is_not_cut(tmp_path: Path) -> None:
    """A program that starts from it adapts all; one that does not refuses it, and says how to get the other."""
    whole = Session(made(loss=mobizo.CausalLMLoss(), train_a=False))
    whole.load_state(torch.randn(whole.program.parameters, generator=torch.Generator().manual_seed(0)))
    folder = whole.export_adapter(tmp_path / "whole")
    few = Session(made(train_a=False))
    with pytest.raises(AdapterError, match=r"outputs of layer lm_head that the program does not adapt(.|\n)*adapter="):
        few.import_adapter(folder)
    program = made(adapter=folder)
    assert program.sites[0].outputs == ()
    session = Session(program)
    session.import_adapter(folder)
    torch.testing.assert_close(session.evaluate(inputs()).logits, whole.evaluate(inputs()).logits)

    own = trained(made(train_a=False)).export_adapter(tmp_path / "own")
    assert made(adapter=own).sites[0].outputs == tuple(sorted(CHOICES))
    assert (own / WEIGHTS).exists()


@pytest.mark.slow
def test_a_saved_program_knows_its_outputs(tmp_path: Path) -> None:
    session = trained(made("portable", True, split_prefix=True))
    session.program.save(tmp_path / "program.pte")
    loaded = mobizo.load(tmp_path / "program.pte")
    assert loaded.sites == session.program.sites
    again = Session(loaded)
    again.load_state(session.state())
    assert torch.equal(again.evaluate(inputs()).logits, session.evaluate(inputs()).logits)


def test_words_that_are_read_before_the_head_is_bent() -> None:
    """Soft-capped logits, as in Gemma 2: what is read of them is what is adapted."""

    class Capped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
            capped: torch.Tensor = 5 * torch.tanh(logits / 5)
            return capped

    lora = LoraConfig(r=2, target_modules=("lm_head",))
    program = mobizo.compile(Capped().eval(), inputs(), lora, ZO, ChoiceLoss(CHOICES), backend="eager")
    assert program.sites[0].outputs == tuple(sorted(CHOICES))
