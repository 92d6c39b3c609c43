"""Other ways to take the same step, and ours: each peer is built once and then steps with a seed.

Shape suffixes: N rows, T tokens, F features, R rank, O out features, Q queries, P parameters, V vocabulary.

All use the same rows and adapters. PyTorch peers compute the head on two positions of a row, of which the first is
the labelled one, as our program does. Each has its own modules around shared weights, so that hooks do not meet.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workload import Workload, one_position_loss

LEARNING_RATE, EPS = 1e-3, 1e-2
Step = Callable[[int], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A way to take a step.

    Args:
        name: What it is, in a few words.
        step: Takes a step with a seed; the losses of all lanes, [2q], where there are lanes.
        warm_up: The first step, with the noise of our program, so that lane losses can be compared.
    """

    name: str
    step: Step
    warm_up: Step


def stock_inference(workload: Workload, path: Path) -> Peer:
    """Inference of the rows of all lanes by a stock program."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    rows = workload.call_arguments("forward")
    assert method is not None

    def step(seed: int) -> None:
        method.execute(rows)

    return Peer("stock ExecuTorch inference of the same rows", step, step)


def our_step(workload: Workload, path: Path) -> Peer:
    """`Session.train_step`."""
    import mobizo_compiler as mobizo

    session = mobizo.Session(path)
    inputs, labels = workload.batch()

    def step(seed: int) -> Tensor:
        return session.train_step(inputs, labels, seed=seed, learning_rate=LEARNING_RATE, eps=EPS).lane_losses

    return Peer("this compiler, train_step", step, step)


def eager_step(
    workload: Workload, model: nn.Module, sites: Any, lora_a: Any, compiled: bool = False, start: Tensor | None = None
) -> Peer:
    """MP-LoRA in PyTorch, `ReferenceStep`: eager, or with the model as one graph of torch.compile.

    Noise, loss and update stay eager. A graph that would break is an error, not a slower measurement.
    """
    from mobizo_compiler.config import ZOConfig
    from mobizo_compiler.reference import ReferenceStep

    model = twin(model)
    model.forward = functools.partial(model.forward, use_cache=False, logits_to_keep=2)
    reference = ReferenceStep(model, sites, lora_a, zo=ZOConfig(queries=workload.queries))
    if start is not None:
        reference.state.copy_(start)
    if compiled:
        model.compile(fullgraph=True, dynamic=False)
    inputs, labels = on_device(workload, reference.device)

    def step(seed: int) -> Tensor:
        done = reference.train_step(inputs, labels[:, -2:], seed=seed, learning_rate=LEARNING_RATE, eps=EPS)
        return done.lane_losses

    return Peer("torch.compile, MP-LoRA step" if compiled else "PyTorch eager, MP-LoRA step", step, step)


def sequential_mezo(workload: Workload, path: Path) -> Peer:
    """MeZO as a host would do it around an inference program: 2q forwards of b rows, one direction after the other.

    The host writes each perturbed state in place, through the runner's alias of the state, computes the loss of the
    logits that come out, and updates the state. The program computes the head on one position only.
    """
    import mobizo_compiler as mobizo

    session = mobizo.Session(path)
    (inputs, labels), q = workload.batch(), workload.queries
    targets_N = labels[:, -1].contiguous()

    def directions(seed: int, parameters: int) -> Tensor:
        return torch.randn(q, parameters, generator=torch.Generator().manual_seed(seed))

    def loss() -> Tensor:
        return one_position_loss(session.evaluate(inputs), targets_N).mean()

    def step(seed: int, noise: Callable[[int, int], Tensor] = directions) -> Tensor:
        alias_P = session._runner.state()
        before_P = alias_P.clone()
        z_QP = noise(seed, alias_P.numel())
        losses: list[list[Tensor]] = [[], []]
        for z_P in z_QP:
            for side, sign in zip(losses, (1, -1), strict=True):
                torch.add(before_P, z_P, alpha=sign * EPS, out=alias_P)
                side.append(loss())
        loss_G = torch.stack(losses[0] + losses[1])
        g_Q = (loss_G[:q] - loss_G[q:]) / (2 * EPS)
        torch.add(before_P, g_Q @ z_QP, alpha=-LEARNING_RATE / q, out=alias_P)
        return loss_G

    def warm_up(seed: int) -> Tensor:
        return step(seed, lambda s, parameters: mobizo.noise(s, q, parameters))

    return Peer("sequential MeZO around the same engine", step, warm_up)


def backpropagation(workload: Workload, model: nn.Module, checkpointing: bool = False) -> Peer:
    """LoRA with A and B trained by backpropagation and plain SGD in eager PyTorch, on q times b rows."""
    model = twin(model)
    modules = dict(model.named_modules())
    device = next(model.parameters()).device
    trained: list[nn.Parameter] = []
    for name in workload.adapted(model):
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        a_RF = nn.Parameter(torch.empty(workload.rank, linear.in_features, device=device))
        nn.init.kaiming_uniform_(a_RF, a=5**0.5)
        b_OR = nn.Parameter(torch.zeros(linear.out_features, workload.rank, device=device))
        linear.register_forward_hook(_branch(a_RF, b_OR, 16 / workload.rank))
        trained += [a_RF, b_OR]
    if checkpointing:  # which transformers does in training mode only; dropout is 0 in these models
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    inputs, labels = on_device(workload, device)
    inputs, targets_N = repeated(inputs, workload.queries), labels[:, -1].repeat(workload.queries)

    def step(seed: int) -> None:
        logits_NV = model(**inputs, use_cache=False, logits_to_keep=2).logits[:, 0]
        F.cross_entropy(logits_NV, targets_N).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in trained:
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                parameter.grad = None

    return Peer(f"PyTorch backpropagation{', checkpointed' if checkpointing else ''}, LoRA", step, step)


def _branch(a_RF: Tensor, b_OR: Tensor, scaling: float) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], y_NTO: Tensor) -> Tensor:
        return y_NTO + scaling * F.linear(F.linear(args[0], a_RF), b_OR)

    return hook


def twin(model: nn.Module) -> nn.Module:
    """Modules of its own around the same weights."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def on_device(workload: Workload, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The batch, where the model is."""
    inputs, labels = workload.batch()
    return {name: value.to(device) for name, value in inputs.items()}, labels.to(device)


def repeated(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """The rows of every input, that many times."""
    return {name: value.repeat(times, 1) for name, value in inputs.items()}
