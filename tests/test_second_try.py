"""A capture with a symbolic number of rows that fails is tried again with a fixed number, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, MSELoss, Session, ZOConfig, passes
from mobizo_compiler.errors import AdapterError, PassContractError, RowMixingError
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.testing import TokenWise
from mobizo_compiler.testing.plain import FlatWindows

TOKENS = (torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0)),)
LORA = LoraConfig(r=2, target_modules=("up",))


def compiled(model: nn.Module, inputs: Any = TOKENS, **options: Any) -> tuple[mobizo.Program, list[str]]:
    said: list[str] = []
    program = mobizo.compile(
        model.eval(), inputs, LORA, ZOConfig(queries=1), backend="eager", progress=said.append, **options
    )
    return program, said


def test_the_reason_for_a_second_try_is_said() -> None:
    _, said = compiled(FlatWindows(3), (torch.randn(3, 6, 12),), loss=MSELoss())
    assert [line.partition(" ")[0] for line in said] == ["capture", "again", "capture", "rewrite", "lower", "check"]
    assert "again with 3 rows, because their number cannot be a symbol: torch.export cannot capture" in said[1]
    assert compiled(TokenWise())[1] == ["capture", "rewrite", "lower", "check"]


@pytest.mark.parametrize("error", [AttributeError("a bug"), AdapterError("of the adapter")])
def test_an_error_that_symbols_do_not_explain_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed rows would hide it."""
    rewrite, rows = passes.InsertMPLoRA.rewrite, []

    def stumbles(self: passes.InsertMPLoRA, edit: Editor) -> None:
        rows.append(edit.before.fixed_rows)
        if edit.before.fixed_rows is None:
            raise error
        rewrite(self, edit)

    monkeypatch.setattr(passes.InsertMPLoRA, "rewrite", stumbles)
    expected = PassContractError if isinstance(error, AttributeError) else AdapterError
    with pytest.raises(expected, match=r"insert_mp_lora failed: AttributeError: a bug|of the adapter"):
        compiled(TokenWise())
    assert rows == [None]


class Picked(nn.Module):
    """Gathers along the tokens by positions that all rows share, in one of the forms that `expand` allows."""

    def __init__(self, shape: tuple[int, ...], width: int = 9) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(11, 12), nn.Linear(12, 9)
        self.register_buffer("positions", torch.arange(1, 3))
        self.shape, self.width = shape, width

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens)))
        return hidden.gather(1, self.positions.reshape(self.shape).expand(hidden.shape[0], 2, self.width))


SHAPES = [((1, 2, 1), 9), ((2, 1), 9), ((1, 2, 1), 4)]
SOURCES = ["module", "exported", "dynamic"]


@pytest.mark.parametrize(
    ("shape", "width", "source"),
    [
        pytest.param(*shape, source, marks=() if number == other else pytest.mark.slow)
        for number, shape in enumerate(SHAPES)
        for other, source in enumerate(SOURCES)
    ],
)
def test_gathers_that_share_their_positions(shape: tuple[int, ...], width: int, source: str) -> None:
    """None of them is a pick of positions of its own for each row, and the last one leaves columns out."""
    torch.manual_seed(0)
    model = Picked(shape, width).eval()
    options: dict[str, Any] = {"loss": MSELoss()}
    given: Any = model
    if source == "exported":
        rows = torch.export.Dim("rows", min=2, max=64)
        given = torch.export.export(model, TOKENS, dynamic_shapes=({0: rows},))
    if source == "dynamic":
        options["dynamic_shapes"] = {0: {1: torch.export.Dim("tokens", min=4, max=32)}}
    program = mobizo.compile(given, TOKENS, LORA, ZOConfig(queries=1), backend="eager", **options)
    torch.testing.assert_close(Session(program).evaluate(TOKENS), model(*TOKENS))


def test_a_loss_that_gathers_by_shared_positions() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.up = nn.Embedding(11, 12), nn.Linear(12, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tanh(self.up(self.embedding(tokens)))

    for shape in ((1, 2, 1), (2, 1)):

        def loss(out: Tensor, labels: Tensor, shape: tuple[int, ...] = shape) -> Tensor:
            positions = torch.arange(1, 3).reshape(shape).expand(out.shape[0], 2, out.shape[2])
            return (out.gather(1, positions).mean((1, 2)) - labels).square()

        torch.manual_seed(0)
        model = Hidden().eval()
        program, said = compiled(model, loss=loss, example_labels=torch.ones(3))
        assert said == ["capture", "rewrite", "lower", "check"]
        found = Session(program).train_step(TOKENS, torch.ones(3), seed=1, learning_rate=0.0, eps=1e-3)
        wanted = (model(*TOKENS).detach()[:, 1:3].mean((1, 2)) - 1).square().mean()
        assert found.loss == pytest.approx(float(wanted), abs=1e-4)


def test_rows_that_meet_are_refused_at_once_for_dynamic_shapes() -> None:
    class Meets(TokenWise):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            return logits - logits.mean(0, keepdim=True)

    with pytest.raises(RowMixingError, match="mean over the batch"):
        compiled(Meets(), dynamic_shapes={0: {1: torch.export.Dim("tokens", min=4, max=32)}})
