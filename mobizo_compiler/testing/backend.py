"""The contract of a backend, as a check that authors of backends run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_compiler.api import compile
from mobizo_compiler.backends import get_backend
from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import (
    BackendRefusedError,
    BackendUnavailableError,
    ContractError,
    MobizoError,
    NotSupportedYetError,
    QuantizationError,
)
from mobizo_compiler.format.program import Artifact, Program, Runner
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.quantization.weights import QuantizationConfig
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.step.losses import CausalLMLoss, Loss, MSELoss, SequenceClassificationLoss
from mobizo_compiler.testing.models import TinyCausalLM, TinyEncoder, TokenWise, tiny_batch
from mobizo_compiler.testing.require import require
from mobizo_compiler.upstream import pytree


def check_backend(backend: str | Backend) -> None:
    """Compile small models with the backend, train them, and compare with plain PyTorch.

    Checks the protocol; that steps agree with `mobizo_compiler.reference` on inputs that the program was not compiled
    with, for a model token by token, a decoder (grouped attention with a mask, RMSNorm, SiLU), an encoder (attention as
    products, LayerNorm, both forms of GELU, a mean) and, where the backend takes them, quantized layers; that all
    methods of a runner share a state, and two runners do not; that learning rate 0 keeps the state's
    bits; that `replay` repeats a step; that results outlive the next call; that a file appears whole, is known by its
    backend and by no other's beginning, computes the same when it is loaded again, and is refused if it is cut short;
    and that the state may also be passed in and out (`state="io"`). A backend without a file format (`suffix` is None)
    must refuse to save.

    Raises:
        ContractError: The backend does not keep the contract; the message names it and says how.
        BackendUnavailableError: It cannot be loaded, or cannot run programs on this machine.
    """
    loaded = get_backend(backend)
    try:
        _check_members(loaded, backend)
        _check_programs(loaded, backend)
        _check_networks(loaded)
    except BackendUnavailableError:
        raise
    except Exception as error:
        name = backend if isinstance(backend, str) else loaded.name
        problem = error.problem if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
        raise ContractError(f"backend {name!r}: {problem}") from error


def _check_members(loaded: Backend, asked: str | Backend) -> None:
    require(isinstance(loaded.name, str) and loaded.name, "name must be a non-empty string")
    require(not isinstance(asked, str) or loaded.name == asked, f"name is {loaded.name!r}, its entry point's {asked!r}")
    reason = loaded.unavailable()
    require(reason is None or (isinstance(reason, str) and reason), "unavailable() must return a reason or None")
    steps = tuple(loaded.passes())
    require(all(isinstance(step, Pass) for step in steps), "passes() must return Pass objects")
    require(steps == tuple(loaded.passes()), "passes() must return equal passes every time")


def _check_programs(loaded: Backend, asked: str | Backend) -> None:
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[tuple[Tensor, ...], Tensor]:
        tokens, labels = (torch.randint(0, 11, (3, 5), generator=generator) for _ in range(2))
        return (tokens,), labels

    torch.manual_seed(0)
    model, example = TokenWise().eval(), batch()[0]

    def compiled(state: str) -> Program:
        lora = LoraConfig(r=4, lora_alpha=6, target_modules=("up", "head"))
        return compile(model, example, lora, ZOConfig(queries=2), backend=loaded, state=state)

    program = compiled("shared")
    for method in program.methods.values():
        reasons = loaded.unsupported(method)
        require(
            isinstance(reasons, list) and not reasons, f"unsupported() returned {reasons!r}, and then it was lowered"
        )
    require(isinstance(program.artifact, Artifact), "lower() must return an Artifact")
    other = program.artifact.runner()
    _check_state_of(other, program.parameters)

    start = torch.randn(program.parameters, generator=generator) * 0.1

    def agree(session: Session, steps: int) -> None:
        _agree(session, model, batch, CausalLMLoss(), start, steps)

    session = Session(program)
    agree(session, steps=3)
    session.load_state(start)
    _check_bits(session, *batch())
    require(bool((other.state() == 0.5).all()), "two runners share their state")
    _check_file(program, loaded, asked, agree)
    agree(Session(compiled("io")), steps=2)


def _check_networks(loaded: Backend) -> None:
    """What backends rewrite, each in a model of its own; quantized layers where the backend has kernels for them."""
    generator = torch.Generator().manual_seed(1)

    def words() -> tuple[dict[str, Tensor], Tensor]:
        return tiny_batch(seed=int(torch.randint(0, 1000, (), generator=generator)))

    def features() -> tuple[tuple[Tensor, ...], Tensor]:
        x = torch.randn(3, 6, 12, generator=generator)
        return (x,), torch.randint(0, 5, (3,), generator=generator)

    queries = LoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "down_proj"))
    models: tuple[tuple[nn.Module, Any, LoraConfig, Loss], ...] = (
        (_widened(TinyCausalLM(layers=1)), words, queries, CausalLMLoss(max_labels=5)),
        (_widened(TinyEncoder()), features, LoraConfig(r=3, lora_alpha=6), SequenceClassificationLoss()),
    )
    for model, batch, lora, loss in models:
        program = compile(model, batch()[0], lora, ZOConfig(queries=2), loss, backend=loaded)
        start = torch.randn(program.parameters, generator=generator) * 0.1
        _agree(Session(program), model, batch, loss, start, steps=2)
    torch.manual_seed(0)
    gated = nn.Sequential(
        nn.Linear(12, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 5)
    )
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=("3",))
    for recipe in ("8da8w", "8da4w"):
        quantization = QuantizationConfig(recipe, skip=("0",))
        try:  # `compile` compares with the model whose weights were rounded
            compile(_widened(gated), features()[0], lora, ZOConfig(queries=2), MSELoss(), quantization, loaded)
        except (BackendRefusedError, QuantizationError):
            continue


def _widened(model: nn.Module) -> nn.Module:
    """With weights so wide that every part of the model shows in what it returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) * (2.0 / weight.shape[-1]) ** 0.5)
    return model.eval()


def _agree(session: Session, model: nn.Module, batch: Any, loss: Loss, start: Tensor, steps: int) -> None:
    """Steps of a session from a state are those of the reference, on batches of its own."""
    program = session.program
    session.load_state(start)
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo, loss=loss)
    try:
        for seed in range(steps):
            inputs, labels = batch()
            reference.state.copy_(session.state())
            result = session.train_step(inputs, labels, seed=seed, learning_rate=0.05, eps=0.02)
            expected = reference.train_step(inputs, labels, seed=seed, learning_rate=0.05, eps=0.02)
            # Losses carry 1e-6 of their size of rounding; a difference of two, divided by 2 eps = 0.04, 5e-5 of it.
            size = max(1.0, float(expected.lane_losses.abs().max()))
            _close("lane losses of train_step", result.lane_losses, expected.lane_losses, 1e-5 * size)
            _close("projected gradient", result.projected_gradient, expected.projected_gradient, 2e-4 * size)
            _close("state after train_step", session.state(), reference.state, 1e-4 * size)
            reference.state.copy_(session.state())
            outputs, wanted = (pytree.tree_leaves(of.evaluate(inputs)) for of in (session, reference))
            for found, output in zip(outputs, wanted, strict=True):
                _close("result of evaluate", found, output, 2e-5 * float(output.abs().max()))
    finally:
        reference.remove()  # it has hooks on the model


def _check_state_of(runner: Runner, parameters: int) -> None:
    require(isinstance(runner, Runner), "runner() must return a Runner")
    state = runner.state()
    require(state.dtype == torch.float32 and state.shape == (parameters,), f"state() must be float32 [{parameters}]")
    require(not state.any(), "the state must be zero after loading")
    state.fill_(0.5)
    require(bool((runner.state() == 0.5).all()), "state() must be an alias, not a copy")


def _check_bits(session: Session, inputs: Any, labels: Tensor) -> None:
    """What must be equal, not close."""
    before = session.state()
    first = session.train_step(inputs, labels, seed=7, learning_rate=0.0, eps=0.02)
    require(torch.equal(session.state(), before), "learning rate 0 changed the state")
    kept = first.lane_losses.clone()
    second = session.train_step(inputs, labels, seed=8, learning_rate=0.05, eps=0.02)
    require(torch.equal(first.lane_losses, kept), "the next call overwrote the results of the call before")
    after = session.state()
    require(not torch.equal(after, before), "a step did not change the state")
    session.load_state(before)
    session.replay(8, second.projected_gradient, 0.05)
    require(torch.equal(session.state(), after), "replay differs from the step that it repeats")
    session.evaluate(inputs)
    require(torch.equal(session.state(), after), "evaluate changed the state")


def _check_file(program: Program, loaded: Backend, asked: str | Backend, agree: Callable[[Session, int], None]) -> None:
    from mobizo_compiler import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"program{loaded.suffix or ''}"
        try:
            program.save(path)
        except NotSupportedYetError:  # a backend may have no file format, and says so
            require(not any(Path(folder).iterdir()), "save() refused, and left a file")
            require(loaded.suffix is None, f"save() refused, but suffix is {loaded.suffix!r}, not None")
            return
        require(list(Path(folder).iterdir()) == [path] and path.stat().st_size, "save() must write one file")
        _refused("save()", "where there is no folder", lambda: program.save(Path(folder) / "missing" / path.name))
        require(loaded.suffix is not None, "save() wrote a file, but suffix is None: there is no file format")
        foreign = Path(folder) / "foreign"
        foreign.write_bytes(bytes(range(256)))
        require(not loaded.reads(foreign), "reads() claims a file that is no program")
        require(loaded.reads(path), "reads() does not know a file that save() wrote")
        again = load(path) if isinstance(asked, str) else loaded.load(path, True)
        require(again.manifest == program.manifest, "the program that comes back from its file has another manifest")
        a, other_a = program.lora_a_by_fqn, again.lora_a_by_fqn
        same_a = a.keys() == other_a.keys() and all(torch.equal(a[fqn], other_a[fqn]) for fqn in a)
        require(same_a, "the program that comes back from its file has another A")
        try:
            agree(Session(again), 1)
        except ContractError as error:
            raise ContractError(f"loaded from its file, the program is another one: {error.problem}") from error
        foreign.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        _refused("load()", "where half of the file is missing", lambda: loaded.load(foreign, True))


def _refused(member: str, where: str, call: Callable[[], object]) -> None:
    try:
        call()
    except MobizoError:
        return
    raise ContractError(f"{member} must raise an error of mobizo_compiler {where}")


def _close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    require(error <= tolerance, f"{what} differs from plain PyTorch by {error:.3g}, more than {tolerance:.3g}")
