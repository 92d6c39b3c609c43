"""Update rules: what a step does with its estimate of the gradient, as pure (init, update) pairs like optax's.

Shape suffixes: P parameters; `_1` holds one number.

A rule is traced into `train_step` and `replay`, so both make the same update bit for bit. What it remembers (momentum,
say) lies in the flat state behind the trained numbers; it is saved, journalled and passed along with them.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.extensions import DataclassRegistry
from mobizo_compiler.options import JsonConfig

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
            value = getattr(self, field.name)
            name = f"{type(self).__name__}.{field.name}"
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} is {value!r}; it must be a number of 0 or more")
            if field.name.startswith("beta") and value >= 1:
                raise ConfigError(f"{name} is {value}; it must be below 1")

    def init(self, parameters: int) -> Memory:
        """What it remembers before the first step, float32 of any length by name; all zero."""
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


def memory_size(rule: UpdateRule, parameters: int) -> int:
    """How many numbers the rule remembers."""
    return sum(tensor.numel() for tensor in rule.init(parameters).values())


def updated(rule: UpdateRule, parameters: int, state_S: Tensor, direction_P: Tensor, rate_1: Tensor) -> Tensor:
    """The flat state after a step.

    Args:
        rule: The rule.
        parameters: Number P of trained numbers, which are the first of the state.
        state_S: float32 [P + what the rule remembers].
        direction_P: Mean of g_i z_i; zero where the step is void.
        rate_1: Learning rate, float32 [1]; zero where the step is void. With 0, nothing changes.
    """
    sizes = {name: tensor.numel() for name, tensor in rule.init(parameters).items()}
    trained_P = state_S[:parameters] if sizes else state_S
    memory, start = {}, parameters
    for name, size in sizes.items():
        memory[name] = state_S[start : start + size]
        start += size
    step_P, after = rule.update(direction_P, memory)
    if rule.weight_decay:
        step_P = step_P + trained_P * rule.weight_decay
    moved_P = trained_P - step_P * rate_1
    if not sizes:
        return moved_P
    whole_S = torch.cat((moved_P, *(after[name] for name in sizes)))
    return torch.where(rate_1 == 0.0, state_S, whole_S)
