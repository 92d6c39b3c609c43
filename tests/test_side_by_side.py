"""Several lists of inputs through one graph: the same bits as one by one, and what they share is computed once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler.graph import eager
from mobizo_compiler.graph.eager import EagerRunner, run_side_by_side
from mobizo_compiler.graph.program import STATE_INPUT

IDS = torch.arange(12).reshape(2, 6)


def program(dtype: torch.dtype = torch.float32, **options: Any) -> mobizo.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 13)).eval().to(dtype)
    lora = mobizo.LoraConfig(r=2, target_modules=("3",))
    return mobizo.compile(model, (IDS,), lora, backend="portable", state="io", **options)


@pytest.mark.parametrize("options", [{}, {"quantization": "8da4w"}, {"dtype": torch.bfloat16}], ids=str)
def test_the_same_bits(options: dict[str, Any]) -> None:
    compiled = program(**options)
    evaluate, state = compiled.methods["evaluate"], compiled.initial_state()
    assert STATE_INPUT in evaluate.inputs
    inputs = [[IDS, state + scale * torch.randn_like(state)] for scale in (0.0, 0.1, 0.2)]
    alone = []
    for given, own in inputs:
        runner = EagerRunner({"evaluate": evaluate})
        runner.state().copy_(own)
        alone.append(runner.call("evaluate", [given]))
    found = run_side_by_side(evaluate, inputs)
    assert len(found) == 3 and not torch.equal(found[0][0], found[1][0])
    for one, another in zip(found, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, another, strict=True))


def test_what_they_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = program(torch.bfloat16)
    evaluate, state = compiled.methods["evaluate"], compiled.initial_state()
    calls, read = Counter[str](), Counter[int]()
    call_function, as_read = eager._SideBySide.call_function, eager.as_read

    def counted(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        calls[str(target)] += 1
        return call_function(self, target, args, kwargs)

    def counted_read(stored: Tensor, value: Any) -> Tensor:
        read[stored.data_ptr()] += stored.dtype == torch.bfloat16
        return as_read(stored, value)

    monkeypatch.setattr(eager._SideBySide, "call_function", counted)
    monkeypatch.setattr(eager, "as_read", counted_read)
    run_side_by_side(evaluate, [[IDS, state.clone()] for _ in range(5)])
    assert calls["aten.embedding.default"] == calls["aten.gelu.default"] == 1, "no adapter reaches these"
    assert max(calls.values()) >= 5
    assert set(read.values()) <= {0, 1}, "a weight is made float32 once"
