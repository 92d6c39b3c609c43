"""Models in half precision: they become the programs of their float32 copies, without such a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mobizo_compiler as mobizo
from mobizo_compiler import GenerateConfig, LoraConfig, Session, ZOConfig
from mobizo_compiler.errors import CaptureError, UnsupportedGraphError
from mobizo_compiler.passes.full_precision import is_half
from mobizo_compiler.testing import TokenWise, zoo

ZOO = zoo()
DECODERS = [name for name, case in ZOO.items() if case.family == "decoder" and name != "jetmoe"]  # its rows meet
QUICK = ("llama",)
EXACT = ZOConfig(estimator="exact")
TWO_SIDED = ZOConfig(queries=2)


def files(dtype: torch.dtype, folder: Path, **options: Any) -> list[bytes]:
    """The program of a small Llama in half precision, and of its copy in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    found = []
    for name in ("half", "whole"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).eval().to(dtype)
        model = model.float() if name == "whole" else model
        ids = torch.arange(12).reshape(2, 6)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        mobizo.compile(model, inputs, LoraConfig(r=3), **options).save(folder / name)
        assert is_half(model) == (name == "half")
        found.append((folder / name).read_bytes())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(torch.bfloat16, {"backend": "xnnpack", "zo": EXACT, "quantization": "8da4w"}, id="exact-8da4w"),
        *(
            pytest.param(dtype, options, id=f"{name}-{dtype}")
            for dtype in (torch.bfloat16, torch.float16)
            for name, options in {
                "portable": {"backend": "portable", "zo": TWO_SIDED},
                "generate": {"backend": "xnnpack", "zo": TWO_SIDED, "generate": GenerateConfig(16)},
            }.items()
        ),
    ],
)
def test_the_file_is_that_of_the_float32_copy(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    half, whole = files(dtype, tmp_path, **options)
    assert half == whole


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in DECODERS])
def test_every_decoder_trains(name: str) -> None:
    """The steps are those of the float32 copy, to the bit: weights are rounded before either sees them."""
    states = []
    for whole in (False, True):
        case = ZOO[name]
        torch.manual_seed(0)
        model = case.model().eval().bfloat16()
        model = model.float() if whole else model
        program = mobizo.compile(
            model,
            case.inputs(),
            LoraConfig(r=3, target_modules=case.target_modules),
            TWO_SIDED,
            case.loss,
            backend="eager",
            **case.options,
        )
        session = Session(program)
        labels = torch.zeros(program.manifest.labels.shape, dtype=torch.int64)  # type: ignore[arg-type]
        inputs = case.inputs()
        for seed in range(3):
            session.train_step(inputs, labels, seed=seed, learning_rate=1e-2)
        states.append(session.state().clone())
    assert torch.equal(*states) and bool(states[0].any())


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    """Weights, tied ones too, and buffers are the same objects afterwards, also where the capture fails."""

    class Refuses(TokenWise):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    for model in (TokenWise().eval().bfloat16(), Refuses().eval().half()):
        before = {name: (id(t), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}
        ids = (torch.zeros(2, 5, dtype=torch.int64),)
        try:
            mobizo.compile(model, ids, LoraConfig(r=2, target_modules=("up",)), backend="eager")
        except CaptureError:
            assert isinstance(model, Refuses)
        assert before == {name: (id(t), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}


def test_inputs_of_half_precision_are_taken_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).eval().bfloat16()
    x = torch.randn(4, 6).bfloat16()
    program = mobizo.compile(model, (x,), LoraConfig(r=2), ZOConfig(queries=1), mobizo.MSELoss(), backend="eager")
    assert [spec.dtype for spec in program.manifest.inputs] == ["float32"]
    with torch.no_grad():
        torch.testing.assert_close(Session(program).evaluate((x.float(),)), model.float()(x.float()))


@pytest.mark.parametrize("other", [lambda w: w.t(), lambda w: w[:4], lambda w: w[4:]], ids=["turned", "first", "last"])
def test_weights_that_are_views_of_one_another(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    first = nn.Linear(8, 8, bias=False)
    view = other(first.weight.detach())
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(view.shape[1], view.shape[0], bias=False)).eval().bfloat16()
    model[2].weight = nn.Parameter(other(model[0].weight.detach()))
    x = torch.randn(4, 8)
    lora = LoraConfig(r=2, target_modules=("0",))
    program = mobizo.compile(model, (x,), lora, ZOConfig(queries=1), mobizo.MSELoss(), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(Session(program).evaluate((x,)), model.float()(x))


def test_a_graph_that_means_something_else_is_refused() -> None:
    """A model that looks at its own precision computes other numbers in another one."""

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return 2 * y if self.weight.dtype == torch.bfloat16 else y

    model = nn.Sequential(nn.Linear(6, 9), Looks(9, 3)).eval().bfloat16()
    x = torch.randn(4, 6).bfloat16()
    with pytest.raises(CaptureError, match=r"other numbers than the model in torch.bfloat16: output 0 differs"):
        mobizo.compile(model, (x,), LoraConfig(r=2), ZOConfig(queries=1), mobizo.MSELoss(), backend="eager")


def test_a_graph_that_was_exported_in_half_precision_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)).eval().bfloat16()
    x = torch.randn(4, 6).bfloat16()
    exported = torch.export.export(model, (x,))
    with pytest.raises(UnsupportedGraphError, match=r"computes in torch\.bfloat16") as raised:
        mobizo.compile(exported, (x,), LoraConfig(r=2), ZOConfig(queries=1), mobizo.MSELoss(), backend="eager")
    assert "the module itself" in str(raised.value.hint)
