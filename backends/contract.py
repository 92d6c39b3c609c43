"""What a backend must do, as protocols and as a check that authors of backends run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mobizo_compiler.manifest import Manifest
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import GraphProgram


@runtime_checkable
class Runner(Protocol):
    """A loaded program. All methods of one runner share one state."""

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run a method on contiguous CPU tensors, the state not among them; results stay valid after the next call."""

    def state(self) -> Tensor:
        """The flat state, float32 [P], as an alias: writing to it changes what the methods see."""


@runtime_checkable
class Artifact(Protocol):
    """A lowered program."""

    def runner(self) -> Runner:
        """Load the program, with its state at the initial value."""

    def save(self, path: Path) -> None:
        """Write the program to a file that appears whole or not at all."""


@runtime_checkable
class Backend(Protocol):
    """A way to run programs. Instances hold no state."""

    @property
    def name(self) -> str:
        """The name in `compile(..., backend=name)`."""

    def unavailable(self) -> str | None:
        """Why nothing can be lowered by this backend, or run, on this machine; None if it can. Raises nothing."""

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Why this backend cannot run the program: one reason per node, empty if it can. Raises nothing."""

    def passes(self) -> Sequence[Pass]:
        """The backend's own rewrites, run after the common ones, by the same pipeline."""

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> Artifact:
        """Lower static programs that share one state."""


def assert_backend_contract(backend: str | Backend) -> None:
    """Compile a small model with the backend, train it, and compare with plain PyTorch.

    Checks the protocol, that steps agree with `mobizo_compiler.reference`, that all methods share the state, that
    learning rate 0 keeps the state's bits, and that `replay` repeats a step. Raises AssertionError with the reason.
    """
    from mobizo_compiler import LoraConfig, Session, ZOConfig, compile
    from mobizo_compiler.backends import get_backend
    from mobizo_compiler.reference import ReferenceStep
    from mobizo_compiler.testing import TokenWise

    loaded = get_backend(backend)
    assert isinstance(loaded.name, str) and loaded.name, "name must be a non-empty string"
    assert all(isinstance(step, Pass) for step in loaded.passes()), "passes() must return Pass objects"

    torch.manual_seed(0)
    model = TokenWise().eval()
    tokens, labels = torch.randint(0, 11, (3, 5)), torch.randint(0, 11, (3, 5))
    program = compile(
        model,
        (tokens,),
        lora=LoraConfig(r=4, lora_alpha=6, target_modules=("up", "head")),
        zo=ZOConfig(queries=2),
        backend=loaded,
    )
    session = Session(program)
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, queries=2)
    start = torch.randn(program.parameters) * 0.1
    session.load_state(start)
    reference.state.copy_(start)
    for seed in range(3):
        result = session.train_step((tokens,), labels, seed=seed, learning_rate=0.05, eps=0.02)
        expected = reference.train_step((tokens,), labels, seed=seed, learning_rate=0.05, eps=0.02)
        # Losses near 2.4 carry 1e-6 of rounding, a difference of two divided by 2 eps = 0.04 carries 5e-5.
        torch.testing.assert_close(result.lane_losses, expected.lane_losses, rtol=0, atol=2e-5)
        torch.testing.assert_close(result.projected_gradient, expected.projected_gradient, rtol=0, atol=4e-4)
        torch.testing.assert_close(session.state(), reference.state, rtol=0, atol=(seed + 1) * 2e-4)
        torch.testing.assert_close(session.evaluate((tokens,)), reference.evaluate((tokens,)), rtol=0, atol=1e-3)
    before = session.state()
    session.train_step((tokens,), labels, seed=7, learning_rate=0.0, eps=0.02)
    assert torch.equal(session.state(), before), "learning rate 0 changed the state"
    result = session.train_step((tokens,), labels, seed=8, learning_rate=0.05, eps=0.02)
    after = session.state()
    assert not torch.equal(after, before), "a step did not change the state"
    session.load_state(before)
    session.replay(8, result.projected_gradient, 0.05)
    assert torch.equal(session.state(), after), "replay differs from the step that it repeats"
