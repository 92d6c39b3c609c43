"""The real model in the stock runtime: a slice of it in every run, all of it in `make test-all`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, LoraConfig, Session, ZOConfig
from mobizo_compiler.compiling.captured_forward import CapturedForward
from mobizo_compiler.errors import CaptureError
from mobizo_compiler.reference import ReferenceStep

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EPS, LEARNING_RATE = 1e-2, 1e-4
LOSS_ERROR = 3e-6  # fifty times the unit roundoff of float32


def prompts(tokenizer: Any, rows: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    texts = ["A quiet film that says much. It was great", "Two hours that feel like four. It was terrible"]
    tokenizer.padding_side = "right"
    texts = [texts[row % 2] for row in range(rows)]
    encoded = tokenizer(texts, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    labels = torch.full((rows, tokens), -100)
    last = inputs["attention_mask"].sum(1) - 1
    labels[torch.arange(rows), last] = inputs["input_ids"][torch.arange(rows), last]
    return inputs, labels


def agree_over_five_steps(tokenizer: Any, model: Any, lora: LoraConfig, queries: int, rows: int, tokens: int) -> None:
    inputs, labels = prompts(tokenizer, rows, tokens)
    program = mobizo.compile(model, inputs, lora, ZOConfig(queries=queries), CausalLMLoss(max_labels=1))
    session = Session(program)
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(0)) * 0.02
    session.load_state(start)
    reference.state.copy_(start)
    # Two engines add products in different orders: a loss is off by LOSS_ERROR of its size. The projected gradient is
    # off by that over eps, and the step moves B along z by learning_rate times as much, which moves the next losses
    # by the projected gradient times that. |z| < 6.
    drift = state_error = 0.0
    for seed in range(5):
        found = session.train_step(inputs, labels, seed=seed, learning_rate=LEARNING_RATE, eps=EPS)
        wanted = reference.train_step(inputs, labels, seed=seed, learning_rate=LEARNING_RATE, eps=EPS)
        loss_error = LOSS_ERROR * float(wanted.lane_losses.max()) + drift
        torch.testing.assert_close(found.lane_losses, wanted.lane_losses, rtol=0, atol=loss_error)
        torch.testing.assert_close(found.projected_gradient, wanted.projected_gradient, rtol=0, atol=loss_error / EPS)
        drift += LEARNING_RATE * loss_error / EPS * float(wanted.projected_gradient.abs().max())
        state_error += LEARNING_RATE * loss_error / EPS * 6
        torch.testing.assert_close(session.state(), reference.state, rtol=0, atol=state_error)
    movement = float((session.state() - start).abs().max())
    assert movement > 10 * state_error, f"the state moved by {movement}, hardly more than {state_error}"
    adapted = session.evaluate(inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(adapted[real], reference.evaluate(inputs).logits[real], rtol=0, atol=5e-3)
    session.load_state(torch.zeros_like(start))
    moved = (session.evaluate(inputs).logits[real] - adapted[real]).abs().max()
    assert moved > 0.1, f"evaluate must follow the state, but logits moved by {moved}"
    reference.remove()


@pytest.mark.slow
def test_two_layers_with_all_seven_targets(smollm2: tuple[Any, Any]) -> None:
    tokenizer, model = smollm2
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=ALL_TARGETS)
    agree_over_five_steps(tokenizer, model, lora, queries=2, rows=3, tokens=19)


@pytest.mark.slow
def test_the_whole_model() -> None:
    from examples.smollm2 import load_smollm2

    tokenizer, model = load_smollm2()
    agree_over_five_steps(tokenizer, model, LoraConfig(), queries=4, rows=2, tokens=32)


@pytest.mark.slow
def test_the_whole_model_to_peft_and_back(tmp_path: Path) -> None:
    """20 steps on XNNPACK; peft puts the adapter on the original model; the session takes it back."""
    from peft import PeftModel

    from examples.demo import SETUPS, compile_program, example_inputs
    from examples.rotten_tomatoes import Prompter, load_sentences, split_by_movie
    from examples.smollm2 import load_smollm2

    setup = SETUPS["all-blocks"]
    tokenizer, program, _ = compile_program(Console(), "xnnpack", "choice", setup=setup)
    prompter, session = Prompter(tokenizer, 48), Session(program)
    train = split_by_movie(load_sentences())["train"]
    for seed in range(20):
        inputs, labels, _ = prompter.encode(train[2 * seed : 2 * seed + 2])
        session.train_step(inputs, labels, seed=seed, learning_rate=2e-2)
    state, inputs = session.state(), example_inputs(prompter, setup.rows)
    real = inputs["attention_mask"].bool()
    found = session.evaluate(inputs).logits[real]

    folder = session.export_adapter(tmp_path / "adapter")
    with torch.no_grad():
        model = load_smollm2()[1]
        plain = model(**inputs).logits[real]
        wanted = PeftModel.from_pretrained(model, str(folder)).eval()(**inputs).logits[real]
    size = float(wanted.abs().max())
    error, effect = float((found - wanted).abs().max()) / size, float((wanted - plain).abs().max()) / size
    print(
        f"r={setup.lora.r}, {len(state):,} parameters: logits differ by {error:.2e}, "
        f"training moved them by {effect:.2e}"
    )
    assert error < 1e-4 and effect > 100 * error

    again = Session(program)
    again.import_adapter(folder)
    assert torch.equal(again.state(), state)


class _Seen(Exception):
    """What was looked at has passed; nothing has to be lowered."""


@pytest.mark.slow
def test_rounding_is_not_taken_for_a_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """With inputs rounded to 8 bits, logits behind a cache are others, by some hundredths of the largest."""
    from examples.smollm2 import load_smollm2

    found: list[CapturedForward] = []

    class Seen(CapturedForward):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)
            raise _Seen

    monkeypatch.setattr("mobizo_compiler.api.CapturedForward", Seen)
    monkeypatch.setattr("mobizo_compiler.compiling.captured_forward.WRONG", 1e-3)
    tokenizer, model = load_smollm2()
    last = LoraConfig(r=2, target_modules=("q_proj",), layers_to_transform=29)
    generate, inputs = mobizo.GenerateConfig(64), prompts(tokenizer, 1, 16)[0]
    with pytest.raises(_Seen):
        mobizo.compile(model, inputs, last, ZOConfig(queries=1), quantization="8da4w", generate=generate)
    monkeypatch.setattr(CapturedForward, "_smooth", lambda self: self)
    with pytest.raises(CaptureError, match="other logits for token"):
        found[0]._check_cache()
