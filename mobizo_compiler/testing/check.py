"""`check_against_oracle`: three training steps of a backend on any model, each compared with plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_compiler.api import compile
from mobizo_compiler.backends import Backend
from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ContractError
from mobizo_compiler.format.probe import random_labels
from mobizo_compiler.format.program import Program
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.step.estimators import Estimator
from mobizo_compiler.step.losses import CausalLMLoss, Loss
from mobizo_compiler.step.noise import noise
from mobizo_compiler.testing.oracle import Oracle, rounding

LARGEST_NORMAL = 6.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_against_oracle` measured: errors as a share of what rounding explains; all are at most 1.

    Args:
        program: The compiled program.
        losses: Lane losses.
        gradient: Projected gradients.
        state: State after each step.
        signal: Smallest of the steps' largest projected gradients, as a multiple of what rounding explains.
    """

    program: Program
    losses: float
    gradient: float
    state: float
    signal: float


def check_against_oracle(
    model: nn.Module,
    inputs: Any,
    *,
    backend: str | Backend,
    lora: LoraConfig | None = None,
    loss: Loss | None = None,
    queries: int = 2,
    steps: int = 3,
    eps: float = 0.05,
    learning_rate: float = 0.01,
    b_scale: float = 0.3,
    **options: Any,
) -> Report:
    """Compile, train from a B that is not zero, and compare every step with `Oracle`; `ContractError` if they differ.

    Every step starts from the state in which the program left the one before. What may differ is derived: losses by
    the model's own rounding (see `rounding`), g by that over eps, the state by learning_rate * 6 times that of g. The
    check also fails if the signal does not stand out from rounding, because then it could not fail otherwise.

    Args:
        model: In eval mode, float32.
        inputs: As for `compile`.
        backend: Name or backend.
        lora: Adapters; rank 3 on the default layers if None.
        loss: The loss; causal language modelling if None.
        queries: Number of directions.
        steps: Number of steps.
        eps: Size of the perturbation.
        learning_rate: Of each step.
        b_scale: Standard deviation of B at the start.
        options: More options of `compile`.
    """
    loss = loss or CausalLMLoss()
    lora = lora or LoraConfig(r=3, lora_alpha=5)
    program = compile(model, inputs, lora, ZOConfig(queries=queries), loss, backend=backend, **options)
    session = Session(program)
    noise_P, labels, exact, single = _drawn(program, model, inputs, loss, options)
    state = noise_P * b_scale
    try:
        exact.evaluate(inputs)
    except RuntimeError:  # the model names float32 in its code
        exact = copy.deepcopy(single)
    worst, signal = [0.0, 0.0, 0.0], float("inf")
    session.load_state(state)
    for seed in range(steps):
        arguments = {"seed": seed, "learning_rate": learning_rate, "eps": eps}
        start = session.state()
        exact.state, single.state = start.to(exact.dtype), start.clone()
        wanted, other = (oracle.train_step(inputs, labels, **arguments) for oracle in (exact, single))  # type: ignore[arg-type]
        found = session.train_step(inputs, labels, **arguments)  # type: ignore[arg-type]
        loss_tolerance = rounding(wanted.lane_losses, other.lane_losses)
        state_tolerance = learning_rate * LARGEST_NORMAL * loss_tolerance / eps + 1e-7 * float(start.abs().max())
        for position, (a, b, tolerance) in enumerate(
            (
                (found.lane_losses, wanted.lane_losses, loss_tolerance),
                (found.projected_gradient, wanted.projected_gradient, loss_tolerance / eps),
                (session.state(), exact.state, state_tolerance),
            )
        ):
            error = float((a.double() - b.double()).abs().max())
            what = ("lane losses", "projected gradient", "state")[position]
            if not error <= tolerance:
                raise ContractError(f"step {seed}: {what} differ by {error:.3g}, rounding explains {tolerance:.3g}")
            worst[position] = max(worst[position], error / tolerance)
        signal = min(signal, float(wanted.projected_gradient.abs().max()) / (loss_tolerance / eps))
    if not signal > 3:
        raise ContractError(
            f"the projected gradient is only {signal:.2g} times what rounding explains, which shows nothing",
            hint="widen the weights, or b_scale",
        )
    _check_evaluate(session, exact, inputs, loss, labels, float(rounding(wanted.lane_losses, other.lane_losses)))
    return Report(program, worst[0], worst[1], worst[2], signal)


def check_gradient(
    model: nn.Module,
    inputs: Any,
    *,
    backend: str | Backend,
    lora: LoraConfig | None = None,
    loss: Loss | None = None,
    b_scale: float = 0.3,
    estimator: str | Estimator = "exact",
    **options: Any,
) -> Report:
    """Compile with the exact estimator, and compare a step with autograd in float64; `ContractError` if they differ.

    B is not zero, nor is A where it is trained. What may differ is derived, as in `check_against_oracle`: from how far
    autograd in float32 is from that in float64. The check fails too if the gradient does not stand out from that.

    Args:
        model: In eval mode, float32.
        inputs: As for `compile`.
        backend: Name or backend.
        lora: Adapters; rank 3 on the default layers if None.
        loss: The loss; causal language modelling if None.
        b_scale: Standard deviation of B.
        estimator: One that has the gradient itself.
        options: More options of `compile`.
    """
    loss, lora = loss or CausalLMLoss(), lora or LoraConfig(r=3, lora_alpha=5)
    program = compile(model, inputs, lora, ZOConfig(estimator=estimator), loss, backend=backend, **options)
    session = Session(program)
    noise_P, labels, exact, single = _drawn(program, model, inputs, loss, options)
    state = session.state() + noise_P * b_scale
    exact.state, single.state = state.double(), state.clone()
    single_loss, single_gradient = single.gradient(inputs, labels)
    try:
        wanted_loss, wanted = exact.gradient(inputs, labels)
    except RuntimeError:  # the model names float32 in its code
        wanted_loss, wanted = single_loss.double(), single_gradient.double()
    rate = float(state.norm() / wanted.norm())  # so that the state's last bits do not hide the gradient
    session.load_state(state)
    found = session.train_step(inputs, labels, seed=0, learning_rate=rate)
    gradient = (state.double() - session.state().double()) / float(torch.tensor(rate))
    size = float(wanted.abs().max())
    tolerance = rounding(wanted, single_gradient, least=0.0) + 2.0**-23 * float(state.abs().max()) / rate
    error = float((gradient - wanted).abs().max())
    if not error <= tolerance:
        raise ContractError(f"the gradient differs by {error:.3g} of {size:.3g}, rounding explains {tolerance:.3g}")
    loss_tolerance = rounding(wanted_loss, single_loss)
    loss_error = abs(found.loss - float(wanted_loss))
    if not loss_error <= loss_tolerance:
        raise ContractError(f"the loss differs by {loss_error:.3g}, rounding explains {loss_tolerance:.3g}")
    if not size > 3 * tolerance:
        raise ContractError(
            f"the gradient is only {size / tolerance:.2g} times what rounding explains, which shows nothing",
            hint="widen the weights, or b_scale",
        )
    return Report(program, loss_error / loss_tolerance, error / tolerance, error / tolerance, size / tolerance)


def _drawn(
    program: Program, model: nn.Module, inputs: Any, loss: Loss, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Oracle, Oracle]:
    """Random numbers, [P], and labels, the same ones each time; and the oracle in float64 and in float32."""
    generator = torch.Generator().manual_seed(5)
    noise_P = torch.randn(program.parameters, generator=generator)
    example = bind_example(model, inputs, options.get("row_axes"), options.get("dynamic_shapes"))
    labels = random_labels(program.manifest, example.tensors, generator)
    exact, single = (
        Oracle(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo, loss=loss, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    return noise_P, labels, exact, single


def _check_evaluate(session: Session, exact: Oracle, inputs: Any, loss: Loss, labels: Any, tolerance: float) -> None:
    """`evaluate` has the loss of a lane with the same B."""
    state = session.state() + 0.05 * noise(99, 1, session.state().numel())[0]
    session.load_state(state)
    found, weight = loss(session.evaluate(inputs), labels)
    wanted, _ = loss(exact.evaluate(inputs, state.to(exact.dtype)), labels)
    error = float(((found.double() - wanted.double()).sum() / weight.double().sum()).abs())
    if not error <= tolerance:
        raise ContractError(f"evaluate: the loss differs by {error:.3g}, rounding explains {tolerance:.3g}")
