"""The state as input and output: the same numbers as with the shared buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.graph.program import STATE, STATE_INPUT
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch


# On XNNPACK the contract of the backend (test_backends.py) shows it.
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=pytest.mark.slow) for b in ("portable", "xnnpack"))]
)
def test_same_numbers_as_with_the_shared_buffer(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = TokenWise().eval()
    labels = torch.randint(0, 11, (3, 5))
    inputs, sessions = (labels,), []
    lora = LoraConfig(r=3, target_modules=("up", "head"))
    for state in ("shared", "io"):
        program = mobizo.compile(model, inputs, lora, ZOConfig(queries=2), backend=backend, state=state)
        if backend != "eager":
            program = mobizo.load(program.save(tmp_path / f"{state}.pte"))
        assert program.manifest.state == state
        sessions.append(Session(program))
    start = torch.randn(sessions[0].program.parameters, generator=torch.Generator().manual_seed(3)) * 0.1
    for session in sessions:
        session.load_state(start)
    for seed in range(3):
        shared, passed = (s.train_step(inputs, labels, seed=seed, learning_rate=0.1, eps=0.02) for s in sessions)
        assert torch.equal(shared.lane_losses, passed.lane_losses)
        assert torch.equal(sessions[0].state(), sessions[1].state())
    assert not torch.equal(sessions[1].state(), start)
    sessions[0].replay(9, [1.0, -2.0], 0.1)
    sessions[1].replay(9, [1.0, -2.0], 0.1)
    assert torch.equal(sessions[0].state(), sessions[1].state())
    assert torch.equal(*(session.evaluate(inputs) for session in sessions))


def test_what_a_host_passes() -> None:
    inputs, _ = tiny_batch()
    program = mobizo.compile(TinyCausalLM(layers=1).eval(), inputs, LoraConfig(r=3), backend="eager", state="io")
    for name, method in program.methods.items():
        assert list(method.inputs)[-1] == STATE_INPUT
        assert (method.outputs[-1:] == (STATE_INPUT,)) == (name != "evaluate")
        assert STATE not in method.exported.graph_signature.inputs_to_buffers.values()


def test_unknown_kind_of_state() -> None:
    inputs, _ = tiny_batch()
    with pytest.raises(ConfigError, match="state is 'none'"):
        mobizo.compile(TinyCausalLM(layers=1).eval(), inputs, backend="eager", state="none")
