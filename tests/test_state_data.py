"""The initial state in a data file: the stock runtime, with none of our code, starts from it and trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.runtime import Runtime
from torch import Tensor

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.backends import get_backend
from mobizo_compiler.errors import BackendRefusedError
from mobizo_compiler.testing import TokenWise

METHODS = ("train_step", "evaluate", "replay")


TOKENS = torch.arange(15).reshape(3, 5) * 7 % 11


def compiled(backend: str, state: str) -> mobizo.Program:
    torch.manual_seed(1)
    lora = LoraConfig(r=3, target_modules=("up", "head"))
    return mobizo.compile(TokenWise().eval(), (TOKENS,), lora, ZOConfig(queries=2), backend=backend, state=state)


def arguments(seed: int) -> list[Tensor]:
    return [
        TOKENS,
        TOKENS,
        torch.tensor([seed], dtype=torch.int32),
        torch.tensor([0.1]),
        torch.tensor([0.02]),
    ]


def stock(program: Path, data: Path) -> dict[str, Any]:
    """What a host without this package does."""
    loaded = Runtime.get().load_program(program, data_path=data)
    return {name: loaded.load_method(name) for name in METHODS} | {"program": loaded}


def state_of(methods: dict[str, Any]) -> Tensor:
    states = [methods[name]._method.get_attribute("mobizo_lora_b").clone() for name in METHODS]
    assert all(torch.equal(states[0], other) for other in states[1:]), "methods share one state"
    result: Tensor = states[0]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
def test_the_stock_runtime_starts_from_a_data_file(backend: str, tmp_path: Path) -> None:
    inputs, labels = (TOKENS,), TOKENS
    path = compiled(backend, "data").save(tmp_path / "program.pte")
    with_state = compiled(backend, "shared").save(tmp_path / "shared.pte")
    session, other = Session(path), Session(with_state)
    assert session.program.manifest.state == "data" and not session.state().any()
    assert with_state.stat().st_size - path.stat().st_size >= session.state().nbytes, "the state is not in the program"
    start = torch.randn(session.state().shape, generator=torch.Generator().manual_seed(3)) * 0.1
    for one in (session, other):
        one.load_state(start)
    for seed in range(3):
        results = [one.train_step(inputs, labels, seed=seed, learning_rate=0.1, eps=0.02) for one in (session, other)]
        assert torch.equal(results[0].lane_losses, results[1].lane_losses)
    trained = session.state()
    assert torch.equal(trained, other.state()) and not torch.equal(trained, start)

    first, second = session.export_ptd(tmp_path / "trained.ptd"), other.export_ptd(tmp_path / "other.ptd")
    assert first.read_bytes() == second.read_bytes(), "the same state is the same file"
    methods = stock(path, first)
    assert torch.equal(state_of(methods), trained)
    wanted = session.evaluate(inputs)
    assert torch.equal(methods["evaluate"].execute(list(inputs))[0], wanted)

    result = session.train_step(inputs, labels, seed=9, learning_rate=0.1, eps=0.02)
    outputs = methods["train_step"].execute(arguments(9))
    assert torch.equal(outputs[1], result.lane_losses) and torch.equal(state_of(methods), session.state())
    scalars = torch.tensor([9], dtype=torch.int32), outputs[2].clone(), torch.tensor([-0.1])
    methods["replay"].execute(list(scalars))
    session.replay(9, scalars[1], -0.1)
    assert torch.equal(state_of(methods), session.state())
    assert torch.equal(methods["evaluate"].execute(list(inputs))[0], session.evaluate(inputs)), (
        "evaluate follows the state"
    )

    again = Session(path)
    assert not again.state().any(), "a session starts from zero"
    again.import_ptd(first)
    other.import_ptd(first)
    assert torch.equal(again.state(), trained) and torch.equal(other.state(), trained)
    with pytest.raises(Exception, match="load method"):
        Runtime.get().load_program(path).load_method("evaluate")


@pytest.mark.parametrize("backend", ["eager", "aot_inductor"])
def test_backends_without_data_files_refuse(backend: str) -> None:
    with pytest.raises(BackendRefusedError, match=rf"'{backend}' cannot look up their state(.|\n)*import_ptd"):
        compiled(backend, "data")


def test_who_has_caches() -> None:
    for name in ("portable", "xnnpack", "vulkan", "eager", "aot_inductor", "cuda"):
        assert get_backend(name).caches == (name in {"portable", "xnnpack", "eager"})


def test_who_has_data_files() -> None:
    having = {"portable", "xnnpack", "vulkan"}
    for name in ("portable", "xnnpack", "vulkan", "eager", "aot_inductor", "cuda"):
        assert getattr(get_backend(name), "data_files", False) == (name in having)
