"""A short search for the size of the perturbation and the learning rate, before a run.

Both are read off training steps of the program itself, on the first batches of the run; the state is left as it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobizo_compiler.device.batches import Batches, Pair, by_step
from mobizo_compiler.device.run import step_seed
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, InputError

EPS_CANDIDATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# Steps of a rule that does not follow the size of the gradient, and of one that does, where its entries are 1.
_FIXED_RATES, _RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.01, 0.03, 0.1, 0.3, 1.0)
_SIZELESS = ("sign", "adam", "scalar-adam")
_SEEDS_PER_EPS = 2
_FEWEST = 4  # steps of a trial


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one value did.

    Args:
        value: The eps or the learning rate.
        score: For eps, the smallest cosine between its projected gradients and those of its neighbours; for a learning
            rate, the mean loss of the second half of its steps, not finite if it left them.
    """

    value: float
    score: float


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Args:
        eps: Where the estimate depends on eps the least: rounding is behind it, and curvature ahead.
        learning_rate: With the lowest loss.
        eps_trials: All sizes that were tried.
        rate_trials: All learning rates that were tried.
        steps: Training steps that the search took.
    """

    eps: float
    learning_rate: float
    eps_trials: tuple[Trial, ...]
    rate_trials: tuple[Trial, ...]
    steps: int


def tune(
    session: Session,
    batches: Batches,
    *,
    steps: int,
    share: float = 0.1,
    eps: float | None = None,
    learning_rates: Sequence[float] | None = None,
    seed: int = 0,
    on_trial: Callable[[str, Trial], object] = lambda what, trial: None,
) -> Tuning:
    """Choose eps and the learning rate for a run of so many steps.

    Args:
        session: Its state is what it was, afterwards.
        batches: As in `Session.finetune`.
        steps: Of the run.
        share: Most steps of the search, as a share of `steps`, in 0..1.
        eps: Not searched for if given.
        learning_rates: Candidates; five over two decades if None.
        seed: As in `Session.finetune`, so that the search sees the run's own noise.
        on_trial: Told "eps" or "learning rate", and each trial.

    Raises:
        ConfigError: The share leaves no room for the trials.
        InputError: No learning rate kept the loss finite.
    """
    start, budget = session.state(), int(steps * share)
    sizes = EPS_CANDIDATES if eps is None else ()
    probes = len(sizes) * _SEEDS_PER_EPS + (learning_rates is None and _follows_the_gradient(session))
    count = len(learning_rates) if learning_rates is not None else len(_RATES)
    each = (budget - probes) // count if count else 0
    if each < _FEWEST:
        needed = math.ceil((probes + count * _FEWEST) / share) if share > 0 else 0
        raise ConfigError(
            f"{share:.0%} of {steps} steps is too little for {probes} probes and {count} learning rates",
            hint=f"a search pays from {needed} steps on; else give eps, or fewer learning rates",
        )

    batch = by_step(batches)
    try:
        eps_trials = _eps_trials(session, batch, sizes, seed)
        for trial in eps_trials:
            on_trial("eps", trial)
        chosen = eps if eps is not None else max(eps_trials, key=lambda trial: trial.score).value
        rates = learning_rates if learning_rates is not None else _candidates(session, batch, chosen, seed)
        rate_trials = []
        for rate in rates:
            session.load_state(start)
            rate_trials.append(Trial(rate, _loss(session, batch, rate, chosen, each, seed)))
            on_trial("learning rate", rate_trials[-1])
    finally:
        session.load_state(start)
    finite = [trial for trial in rate_trials if math.isfinite(trial.score)]
    if not finite:
        raise InputError("every learning rate that was tried left finite losses", hint="give smaller learning rates")
    best = min(finite, key=lambda trial: trial.score)
    taken = probes + each * len(rate_trials)
    return Tuning(chosen, best.value, tuple(eps_trials), tuple(rate_trials), taken)


def _eps_trials(session: Session, batch: Callable[[int], Pair], sizes: Sequence[float], seed: int) -> list[Trial]:
    """How much the projected gradients of each size are those of its neighbours."""
    found: list[Tensor] = []
    for size in sizes:
        parts = []
        for step in range(_SEEDS_PER_EPS):
            inputs, labels = batch(step)
            result = session.train_step(inputs, labels, seed=step_seed(seed, step), learning_rate=0.0, eps=size)
            parts.append(result.projected_gradient.clone())
        found.append(torch.nan_to_num(torch.cat(parts)))
    trials = []
    for index, size in enumerate(sizes):
        neighbours = [found[other] for other in (index - 1, index + 1) if 0 <= other < len(found)]
        alike = min(float(F.cosine_similarity(found[index], other, dim=0)) for other in neighbours)
        trials.append(Trial(size, alike if len(neighbours) == 2 else min(alike, 0.0)))  # an end has not been passed
    return trials


def _candidates(session: Session, batch: Callable[[int], Pair], eps: float, seed: int) -> list[float]:
    """Learning rates around one that fits the size of the gradient."""
    if not _follows_the_gradient(session):
        return list(_FIXED_RATES if session.program.manifest.rule["name"] in _SIZELESS else _RATES)
    inputs, labels = batch(0)
    result = session.train_step(inputs, labels, seed=step_seed(seed, 0), learning_rate=0.0, eps=eps)
    size = float(result.projected_gradient.square().mean().sqrt())
    return [rate / size if math.isfinite(size) and size > 0 else rate for rate in _RATES]


def _follows_the_gradient(session: Session) -> bool:
    """Whether a step is as large as the gradient is."""
    manifest = session.program.manifest
    return not manifest.zo.normalize and manifest.rule["name"] not in _SIZELESS


def _loss(session: Session, batch: Callable[[int], Pair], rate: float, eps: float, steps: int, seed: int) -> float:
    """Mean loss of the second half of so many steps; every rate sees the same batches and noise."""
    losses = []
    for step in range(steps):
        inputs, labels = batch(step)
        losses.append(session.train_step(inputs, labels, seed=step_seed(seed, step), learning_rate=rate, eps=eps).loss)
    late = losses[steps // 2 :]
    return sum(late) / len(late)
