"""Update rules: what a step does with its estimate of the gradient, as pure (init, update) pairs like optax's.

Shape suffixes: P parameters; `_1` holds one number.

A rule is traced into `train_step` and `replay`, so both make the same update bit for bit. What it remembers (momentum,
say) lies in the flat state behind the trained numbers; it is saved, journalled and passed along with them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.extensions import DataclassRegistry
from mobizo_compiler.options import JsonConfig, float32_problem, in_float32

Memory = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class UpdateRule(JsonConfig, abc.ABC):
    """What turns a direction into an update.

    Args:
        weight_decay: Share of the trained numbers, times the learning rate, that every step takes off (decoupled, as in
            AdamW); 0 for none.
    """

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type not in ("float", "int", float, int):
                continue
            value = getattr(self, field.name)
            name = f"{type(self).__name__}.{field.name}"
            if problem := float32_problem(value):
                raise ConfigError(f"{name} is {value!r}; {problem}")
            if value < 0:
                raise ConfigError(f"{name} is {value!r}; it must be a number of 0 or more")
            if field.name.startswith("beta") and in_float32(value) >= 1:
                raise ConfigError(f"{name} is {value}; it must be below 1, in float32 as well")

    def init(self, parameters: int) -> Memory:
        """What it remembers before the first step, float32 of any length by name."""
        return {}

    @abc.abstractmethod
    def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """What is taken off the trained numbers per unit of learning rate, and what it remembers then.

        Args:
            direction_P: The estimate of the gradient, mean of g_i z_i.
            memory: As `init` or the last update gave it.
        """


@dataclasses.dataclass(frozen=True)
class SGD(UpdateRule):
    """B <- B - learning_rate * d (MeZO, MobiZO)."""

    def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The direction itself."""
        return direction_P, memory


PLAIN = SGD()


@dataclasses.dataclass(frozen=True)
class Momentum(UpdateRule):
    """An exponential mean of directions: m <- beta m + (1 - beta) d.

    Args:
        beta: Share of the mean that is kept.
    """

    beta: float = 0.9

    def init(self, parameters: int) -> Memory:
        """The mean."""
        return {"mean": torch.zeros(parameters)}

    def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The mean of directions."""
        mean_P = memory["mean"] * self.beta + direction_P * (1 - self.beta)
        return mean_P, {"mean": mean_P}


@dataclasses.dataclass(frozen=True)
class Sign(UpdateRule):
    """The signs of an exponential mean of directions (signSGD with momentum, Bernstein et al. 2018).

    Args:
        beta: Share of the mean that is kept; 0 takes the signs of the direction.
    """

    beta: float = 0.9

    def init(self, parameters: int) -> Memory:
        """The mean."""
        return {"mean": torch.zeros(parameters)}

    def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """-1, 0 or 1."""
        mean_P = memory["mean"] * self.beta + direction_P * (1 - self.beta)
        positive_P, negative_P = (mean_P > 0.0).to(torch.float32), (mean_P < 0.0).to(torch.float32)
        return positive_P - negative_P, {"mean": mean_P}


@dataclasses.dataclass(frozen=True)
class Adam(UpdateRule):
    """Adam on the estimate (Kingma & Ba 2015).

    Args:
        beta1: Share of the mean that is kept.
        beta2: Share of the mean of squares that is kept.
        delta: Added to the root of the mean of squares.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    delta: float = 1e-8

    def init(self, parameters: int) -> Memory:
        """Two means, and how much of a mean over all steps each of them is."""
        return {
            "mean": torch.zeros(parameters),
            "square": torch.zeros(self._squares(parameters)),
            "mean_share": torch.zeros(1),
            "square_share": torch.zeros(1),
        }

    def update(self, direction_P: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The mean over the root of the mean of squares, both corrected for their start at zero."""
        mean_P = memory["mean"] * self.beta1 + direction_P * (1 - self.beta1)
        square = memory["square"] * self.beta2 + self._square(direction_P) * (1 - self.beta2)
        mean_share_1 = memory["mean_share"] * self.beta1 + (1 - self.beta1)  # 1 - beta1 ** steps
        square_share_1 = memory["square_share"] * self.beta2 + (1 - self.beta2)
        size = torch.sqrt(square / square_share_1) + self.delta
        memory = {"mean": mean_P, "square": square, "mean_share": mean_share_1, "square_share": square_share_1}
        return mean_P / mean_share_1 / size, memory

    def _squares(self, parameters: int) -> int:
        return parameters

    def _square(self, direction_P: Tensor) -> Tensor:
        return direction_P * direction_P


@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """Adam with the decay of `torch.optim.AdamW` (Loshchilov & Hutter 2019), and its default."""

    weight_decay: float = 0.01


@dataclasses.dataclass(frozen=True)
class ScalarAdam(Adam):
    """Adam with one second moment for all numbers: the mean square of the whole direction.

    An estimate from few queries is as noisy in every number, so that squares of single numbers say little; one number
    still makes the step independent of the size of the loss, at half of the memory.
    """

    def _squares(self, parameters: int) -> int:
        return 1

    def _square(self, direction_P: Tensor) -> Tensor:
        return (direction_P * direction_P).mean(dim=0, keepdim=True)


RULES = DataclassRegistry(
    "update rule",
    "mobizo_compiler.rules",
    UpdateRule,  # type: ignore[type-abstract]
    {
        "sgd": "mobizo_compiler.step.rules:SGD",
        "momentum": "mobizo_compiler.step.rules:Momentum",
        "sign": "mobizo_compiler.step.rules:Sign",
        "adam": "mobizo_compiler.step.rules:Adam",
        "adamw": "mobizo_compiler.step.rules:AdamW",
        "scalar-adam": "mobizo_compiler.step.rules:ScalarAdam",
    },
)


def register_rule(name: str, rule: type[UpdateRule]) -> None:
    """Let `compile(rule=name)` mean this class in the running process. An entry point does so in all of them.

    Raises:
        ConfigError: The name is taken, or it is no frozen dataclass derived from `UpdateRule`.
    """
    RULES.register(name, rule)


def get_rule(rule: str | UpdateRule | Mapping[str, Any]) -> UpdateRule:
    """A rule from its name, from its JSON as the manifest has it, or itself.

    Raises:
        ConfigError: There is no such rule, or an option of it is out of range.
        ExtensionUnavailableError: It is in a package that is broken.

    >>> get_rule({"name": "momentum", "beta": 0.5})
    Momentum(weight_decay=0.0, beta=0.5)
    """
    return RULES.get(rule)


def initial_memory(rule: UpdateRule, parameters: int) -> Tensor:
    """What the rule remembers before the first step, as it lies in the state, float32 [numbers].

    Raises:
        ConfigError: `init` returns something else than tensors of one axis by name, float32 and finite.
    """
    memory = rule.init(parameters)
    if not isinstance(memory, dict):
        raise ConfigError(f"{rule!r}: init must return a dict of tensors, not {memory!r}")
    for name, tensor in memory.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 1 or tensor.dtype != torch.float32:
            found = _shown(tensor)
            raise ConfigError(f"{rule!r}: init must return float32 tensors of one axis; {name!r} is {found}")
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{rule!r}: init returns numbers in {name!r} that are not finite")
    return torch.cat([torch.zeros(0), *memory.values()])


def _shown(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _checked(rule: UpdateRule, result: object, parameters: int, sizes: Mapping[str, int]) -> tuple[Tensor, Memory]:
    """What `update` returned, if it has the shapes that it must have."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ConfigError(f"{rule!r}: update must return the step and the memory, not {_shown(result)}")
    step_P, memory = result
    if not isinstance(step_P, Tensor) or tuple(step_P.shape) != (parameters,):
        raise ConfigError(f"{rule!r}: update must return a step of shape [{parameters}], not {_shown(step_P)}")
    if memory.keys() != sizes.keys():
        raise ConfigError(f"{rule!r}: update returns the memory {sorted(memory)}, init makes {sorted(sizes)}")
    for name, size in sizes.items():
        if not isinstance(memory[name], Tensor) or tuple(memory[name].shape) != (size,):
            raise ConfigError(f"{rule!r}: update returns {_shown(memory[name])} as {name!r}, init makes [{size}]")
    return step_P, memory


def updated(
    rule: UpdateRule,
    parameters: int,
    state_S: Tensor,
    direction_P: Tensor,
    rate_1: Tensor,
    share_P: Tensor | None = None,
) -> Tensor:
    """The flat state after a step.

    Args:
        rule: The rule.
        parameters: Number P of trained numbers, which are the first of the state.
        state_S: float32 [P + what the rule remembers].
        direction_P: Mean of g_i z_i; zero where the step is void.
        rate_1: Learning rate, float32 [1]; zero where the step is void. With 0, nothing changes.
        share_P: The share of the learning rate for each number; None where all have the whole.
    """
    sizes = {name: tensor.numel() for name, tensor in rule.init(parameters).items()}
    trained_P = state_S[:parameters] if sizes else state_S
    memory, start = {}, parameters
    for name, size in sizes.items():
        memory[name] = state_S[start : start + size]
        start += size
    step_P, after = _checked(rule, rule.update(direction_P, memory), parameters, sizes)
    if rule.weight_decay:
        step_P = step_P + trained_P * rule.weight_decay
    moved_P = trained_P - step_P * (rate_1 if share_P is None else share_P * rate_1)
    whole_S = torch.cat((moved_P, *(after[name] for name in sizes))) if sizes else moved_P
    return torch.where(rate_1 == 0.0, state_S, whole_S)  # 0 times a step that overflowed is no number
