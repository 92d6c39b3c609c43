"""The contract of a backend, as a check that authors of backends run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.device.session import Session
from mobizo_compiler.format.program import Artifact, Program, Runner
from mobizo_compiler.graph.pipeline import Pass


def check_backend(backend: str | Backend) -> None:
    """Compile a small model with the backend, train it, and compare with plain PyTorch.

    Checks the protocol; that steps agree with `mobizo_compiler.reference` on inputs that the program was not compiled
    with; that all methods of a runner share a state, and two runners do not; that learning rate 0 keeps the state's
    bits; that `replay` repeats a step; that results outlive the next call; that a file appears whole; and that the
    state may also be passed in and out (`state="io"`).

    Raises:
        AssertionError: The backend does not keep the contract; the message names it and says how.
        BackendUnavailableError: It cannot be loaded, or cannot run programs on this machine.
    """
    from mobizo_compiler.backends import get_backend
    from mobizo_compiler.errors import BackendUnavailableError

    loaded = get_backend(backend)
    try:
        _check_members(loaded, backend)
        _check_programs(loaded)
    except BackendUnavailableError:
        raise
    except Exception as error:
        raise AssertionError(f"backend {backend if isinstance(backend, str) else loaded.name!r}: {error}") from error


def _check_members(loaded: Backend, asked: str | Backend) -> None:
    assert isinstance(loaded.name, str) and loaded.name, "name must be a non-empty string"
    assert not isinstance(asked, str) or loaded.name == asked, f"name is {loaded.name!r}, its entry point's {asked!r}"
    reason = loaded.unavailable()
    assert reason is None or (isinstance(reason, str) and reason), "unavailable() must return a reason or None"
    steps = tuple(loaded.passes())
    assert all(isinstance(step, Pass) for step in steps), "passes() must return Pass objects"
    assert steps == tuple(loaded.passes()), "passes() must return equal passes every time"


def _check_programs(loaded: Backend) -> None:
    from mobizo_compiler import LoraConfig, Session, ZOConfig, compile
    from mobizo_compiler.reference import ReferenceStep
    from mobizo_compiler.testing.models import TokenWise

    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        return tuple(torch.randint(0, 11, (3, 5), generator=generator) for _ in range(2))  # type: ignore[return-value]

    torch.manual_seed(0)
    model, example = TokenWise().eval(), batch()[0]

    def compiled(state: str) -> Program:
        lora = LoraConfig(r=4, lora_alpha=6, target_modules=("up", "head"))
        return compile(model, (example,), lora, ZOConfig(queries=2), backend=loaded, state=state)

    program = compiled("shared")
    for method in program.methods.values():
        reasons = loaded.unsupported(method)
        assert isinstance(reasons, list) and not reasons, f"unsupported() returned {reasons!r}, and then it was lowered"
    assert isinstance(program.artifact, Artifact), "lower() must return an Artifact"
    other = program.artifact.runner()
    _check_state_of(other, program.parameters)

    start = torch.randn(program.parameters, generator=generator) * 0.1

    def agree(session: Session, steps: int) -> None:
        session.load_state(start)
        reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
        reference.state.copy_(start)
        for seed in range(steps):
            tokens, labels = batch()
            result = session.train_step((tokens,), labels, seed=seed, learning_rate=0.05, eps=0.02)
            expected = reference.train_step((tokens,), labels, seed=seed, learning_rate=0.05, eps=0.02)
            # Losses near 2.4 carry 1e-6 of rounding, a difference of two divided by 2 eps = 0.04 carries 5e-5.
            _close("lane losses of train_step", result.lane_losses, expected.lane_losses, 2e-5)
            _close("projected gradient", result.projected_gradient, expected.projected_gradient, 4e-4)
            _close("state after train_step", session.state(), reference.state, (seed + 1) * 2e-4)
            _close("result of evaluate", session.evaluate((tokens,)), reference.evaluate((tokens,)), 1e-3)
        reference.remove()  # it has hooks on the model

    session = Session(program)
    agree(session, steps=3)
    session.load_state(start)
    _check_bits(session, *batch())
    assert bool((other.state() == 0.5).all()), "two runners share their state"
    _check_file(program)
    agree(Session(compiled("io")), steps=2)


def _check_state_of(runner: Runner, parameters: int) -> None:
    assert isinstance(runner, Runner), "runner() must return a Runner"
    state = runner.state()
    assert state.dtype == torch.float32 and state.shape == (parameters,), f"state() must be float32 [{parameters}]"
    assert not state.any(), "the state must be zero after loading"
    state.fill_(0.5)
    assert bool((runner.state() == 0.5).all()), "state() must be an alias, not a copy"


def _check_bits(session: Session, tokens: Tensor, labels: Tensor) -> None:
    """What must be equal, not close."""
    before = session.state()
    first = session.train_step((tokens,), labels, seed=7, learning_rate=0.0, eps=0.02)
    assert torch.equal(session.state(), before), "learning rate 0 changed the state"
    kept = first.lane_losses.clone()
    second = session.train_step((tokens,), labels, seed=8, learning_rate=0.05, eps=0.02)
    assert torch.equal(first.lane_losses, kept), "the next call overwrote the results of the call before"
    after = session.state()
    assert not torch.equal(after, before), "a step did not change the state"
    session.load_state(before)
    session.replay(8, second.projected_gradient, 0.05)
    assert torch.equal(session.state(), after), "replay differs from the step that it repeats"
    session.evaluate((tokens,))
    assert torch.equal(session.state(), after), "evaluate changed the state"


def _check_file(program: Program) -> None:
    from mobizo_compiler.errors import MobizoError, NotSupportedYetError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program"
        try:
            program.save(path)
        except NotSupportedYetError:  # a backend may have no file format, and says so
            assert not any(Path(folder).iterdir()), "save() refused, and left a file"
            return
        assert list(Path(folder).iterdir()) == [path] and path.stat().st_size, "save() must write one file"
        try:
            program.save(Path(folder) / "missing" / "program")
        except MobizoError:
            pass
        else:
            raise AssertionError("save() must raise an error of mobizo_compiler where there is no folder")


def _close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    assert error <= tolerance, f"{what} differs from plain PyTorch by {error:.3g}, more than {tolerance:.3g}"
