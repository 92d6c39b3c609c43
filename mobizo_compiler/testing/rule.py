"""The contract of an update rule, as a check that authors of rules run."""

from __future__ import annotations

import torch
from torch import Tensor

from mobizo_compiler.step.rules import RULES, Memory, UpdateRule, initial_memory, updated
from mobizo_compiler.testing.require import equal, pure, require, suite, traceable

SIZES = (1, 7)


def check_rule(rule: str | UpdateRule) -> None:
    """Hold an update rule to what it is: a frozen dataclass with two pure functions that can be traced.

    Checks that what it remembers is finite and keeps names, shapes and float32; that five steps, also with directions
    of zeros, are finite; that the functions leave their arguments alone, give the same every time, and compute the same
    once traced; that learning rate 0 keeps every bit of state and memory; that a compiled program begins with what
    `init` says, and its steps are what `replay` repeats bit by bit and what plain PyTorch computes; and that its JSON
    makes it again.

    Args:
        rule: A rule, or the name of one.

    Raises:
        ContractError: It does not keep the contract; the message says how.
        ConfigError: There is none of that name.

    >>> check_rule("adam")
    """
    with suite(RULES, rule) as (found, _):
        for parameters in SIZES:
            memory = _check_steps(found, parameters)
            _check_rate_zero(found, parameters, memory)
        _check_trace(found, SIZES[-1])
        _check_compiled(found)


def _directions(parameters: int) -> list[Tensor]:
    """Of ordinary size, zero in between, tiny and large."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(parameters, generator=generator) for _ in range(4)]
    return [drawn[0] * 0, drawn[0], drawn[1] * 0, drawn[2] * 1e-12, drawn[3] * 1e6]


def _check_steps(rule: UpdateRule, parameters: int) -> Memory:
    start = pure("init", rule.init, parameters)
    require(isinstance(start, dict), f"init returns {start!r}, not a dict of tensors by name")
    for name, tensor in start.items():
        flat = isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.dtype == torch.float32
        require(
            flat and isinstance(name, str),
            f"init has {name!r}: {tensor!r}; what is remembered is float32 of one axis, by name",
        )
        require(bool(tensor.isfinite().all()), f"init begins {name!r} with {tensor.tolist()}, which is not finite")
    memory: Memory = start
    for position, direction in enumerate(_directions(parameters)):
        result = pure("update", rule.update, direction, memory)
        require(isinstance(result, tuple) and len(result) == 2, f"update returns {result!r}, not (step, memory)")
        step, memory = result
        where = f"step {position}, with the direction {direction.tolist()}:"
        require(
            isinstance(step, Tensor) and step.shape == (parameters,) and step.dtype == torch.float32,
            f"{where} update returns {step!r}, not float32 [{parameters}]",
        )
        require(isinstance(memory, dict) and memory.keys() == start.keys(), f"{where} it remembers {list(memory)}")
        for name, tensor in memory.items():
            alike = tensor.shape == start[name].shape and tensor.dtype == torch.float32
            require(alike, f"{where} {name!r} is {tensor.dtype} {list(tensor.shape)} now")
        finite = all(bool(tensor.isfinite().all()) for tensor in (step, *memory.values()))
        require(finite, f"{where} the step or what is remembered is not finite: {step.tolist()}")
    return memory


def _state(rule: UpdateRule, parameters: int, memory: Memory, seed: int) -> Tensor:
    trained = torch.randn(parameters, generator=torch.Generator().manual_seed(seed))
    return torch.cat([trained, *(memory[name] for name in rule.init(parameters))])


def _check_rate_zero(rule: UpdateRule, parameters: int, memory: Memory) -> None:
    for remembered in (rule.init(parameters), memory):
        state = _state(rule, parameters, remembered, 2)
        for direction in _directions(parameters):
            kept = updated(rule, parameters, state, direction, torch.zeros(1))
            require(equal(kept, state), "a step with learning rate 0 changes the state")


def _check_trace(rule: UpdateRule, parameters: int) -> None:
    def step(state_S: Tensor, direction_P: Tensor, rate_1: Tensor) -> Tensor:
        return updated(rule, parameters, state_S, direction_P, rate_1)

    directions, rate = _directions(parameters), torch.tensor([0.1])
    _, once = rule.update(directions[1], rule.init(parameters))
    first = _state(rule, parameters, rule.init(parameters), 3), directions[0], torch.zeros(1)
    traceable("update", step, first, (_state(rule, parameters, once, 4), directions[1], rate))


def _check_compiled(rule: UpdateRule) -> None:
    """A program with the rule, twice around: the second step begins with what the first one left."""
    from mobizo_compiler import LoraConfig, Session, ZOConfig, compile
    from mobizo_compiler.reference import ReferenceStep
    from mobizo_compiler.testing.models import TokenWise

    torch.manual_seed(0)
    model, tokens = TokenWise().eval(), torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 8, 9]])
    lora = LoraConfig(r=2, target_modules=("up",))
    program = compile(model, (tokens,), lora, ZOConfig(queries=2), rule=rule, backend="eager")
    session, reference = Session(program), ReferenceStep.of(model, program)
    start = program.initial_state()
    begins = equal(start[program.parameters :], initial_memory(rule, program.parameters))
    require(begins and equal(session.state(), start), "a program does not begin with what init says")
    start[: program.parameters] = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    session.load_state(start)
    reference.state.copy_(start[: program.parameters])
    for seed in range(2):
        before = session.state()
        result = session.train_step((tokens,), tokens, seed=seed, learning_rate=0.01, eps=0.05)
        after = session.state()
        session.load_state(before)
        session.replay(seed, result.projected_gradient, 0.01)
        require(equal(session.state(), after), "replay differs from the step that it repeats")
        require(not torch.equal(after, before), "a step does not change the state")
        reference.train_step((tokens,), tokens, seed=seed, learning_rate=0.01, eps=0.05)
    reference.remove()
    # A rule may take signs, which turn over where rounding does, so that the distance is compared, not every number.
    moved = float((reference.state - start[: program.parameters]).norm())
    apart = float((session.state()[: program.parameters] - reference.state).norm())
    require(
        apart <= 0.01 * moved,
        f"two compiled steps end {apart:.3g} from those in plain PyTorch, which move by {moved:.3g}",
    )
