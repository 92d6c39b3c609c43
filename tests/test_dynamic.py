"""One program for every length up to a maximum, and every number of rows where it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, LoraConfig, MSELoss, Session, ZOConfig
from mobizo_compiler.errors import CaptureError, ExampleInputError, InputError, UnsupportedGraphError
from mobizo_compiler.testing import Oracle, TinyCausalLM, tiny_batch

LORA, ZO = LoraConfig(r=3, lora_alpha=5), ZOConfig(queries=2)
LENGTH = Dim("tokens", min=2, max=16)
LENGTHS = {"input_ids": {1: LENGTH}, "attention_mask": {1: LENGTH}}


def model() -> TinyCausalLM:
    torch.manual_seed(1)
    return TinyCausalLM(layers=1).eval()


def batch(rows: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs, _ = tiny_batch(rows, tokens)
    return inputs, torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)


def one_step(program: mobizo.Program, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lane losses, state after, and logits of a step from the same B."""
    session = Session(program)
    session.load_state(torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.3)
    losses = session.train_step(inputs, labels, seed=3, learning_rate=0.01, eps=0.05).lane_losses
    return losses, session.state(), session.evaluate(inputs)["logits"]


@pytest.mark.parametrize(
    "loss", [pytest.param(CausalLMLoss(), marks=pytest.mark.slow), CausalLMLoss(max_labels=1)], ids=repr
)
@pytest.mark.parametrize("backend", ["eager", pytest.param("xnnpack", marks=pytest.mark.slow)])
def test_short_inputs_give_what_a_program_for_that_length_gives(backend: str, loss: CausalLMLoss) -> None:
    inputs, labels = batch(3, 7)
    options: dict[str, Any] = {"lora": LORA, "zo": ZO, "loss": loss}
    dynamic = mobizo.compile(model(), inputs, backend=backend, dynamic_shapes=LENGTHS, **options)
    assert dynamic.manifest.inputs[0].shape == (3, "tokens")
    for tokens in (2, 16) if backend == "eager" else (2, 5, 7, 16):
        inputs, labels = batch(3, tokens)
        if loss.max_labels:
            labels[:, :-1] = -100
            labels[:, -1] = inputs["input_ids"][:, -1]
        alone = mobizo.compile(model(), inputs, backend="eager", **options)
        for found, wanted in zip(one_step(dynamic, inputs, labels), one_step(alone, inputs, labels), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_any_number_of_rows_up_to_a_maximum(tmp_path: Any) -> None:
    rows = Dim("rows", max=5)
    shapes = {name: {0: rows, **dims} for name, dims in LENGTHS.items()}
    program = mobizo.compile(model(), batch(3, 7)[0], LORA, ZO, backend="portable", dynamic_shapes=shapes)
    program = mobizo.load(program.save(tmp_path / "dynamic.pte"))
    oracle = Oracle(model(), program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    for count, tokens in ((1, 7), (2, 3), (3, 7), (5, 16)):
        inputs, labels = batch(count, tokens)
        oracle.state = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)).double() * 0.3
        wanted = oracle.train_step(inputs, labels, seed=3, learning_rate=0.01, eps=0.05)
        losses, state, logits = one_step(program, inputs, labels)
        torch.testing.assert_close(losses.double(), wanted.lane_losses, rtol=0, atol=1e-5)
        torch.testing.assert_close(state.double(), oracle.state, rtol=0, atol=1e-5)
        assert logits.shape == (count, tokens, 23)
    session = Session(program)
    step = {"seed": 1, "learning_rate": 0.1, "eps": 0.1}
    for inputs, labels, message in (
        (*batch(6, 7), "rows = 6, outside 1..5"),
        (*batch(3, 17), "tokens = 17, outside 2..16"),
        (batch(3, 7)[0], batch(3, 8)[1], "tokens = 8, an input before it has 7"),
        ({**batch(3, 7)[0], "attention_mask": torch.ones(2, 7, dtype=torch.int64)}, batch(3, 7)[1], "rows = 2, an in"),
    ):
        with pytest.raises(InputError, match=message):
            session.train_step(inputs, labels, **step)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"ids": {1: LENGTH}}, "names input 'ids'"),
        ({"input_ids": {2: LENGTH}}, "the input has 2 axes"),
        ({"input_ids": {1: Dim("tokens")}}, "named size with a maximum"),
        ({"input_ids": {1: 16}}, "named size with a maximum"),
    ],
)
def test_bad_dynamic_shapes(shapes: Any, message: str) -> None:
    with pytest.raises(ExampleInputError, match=message):
        mobizo.compile(model(), batch(3, 7)[0], LORA, ZO, backend="eager", dynamic_shapes=shapes)


def test_a_size_that_the_model_fixes_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x + torch.ones(5, 4))

    x = torch.randn(3, 5, 4)
    with pytest.raises(CaptureError, match="dynamic"):
        mobizo.compile(
            Fixed().eval(), (x,), LORA, ZO, MSELoss(), backend="eager", dynamic_shapes=({1: Dim("tokens", max=9)},)
        )


def test_rows_behind_a_dynamic_axis_are_refused() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x.transpose(0, 1)).transpose(0, 1)

    x = torch.randn(3, 5, 4)
    with pytest.raises(UnsupportedGraphError, match="rows behind an axis of dynamic size"):
        mobizo.compile(
            TokensFirst().eval(), (x,), LORA, ZO, MSELoss(), backend="eager", dynamic_shapes=({1: Dim("t", max=9)},)
        )
