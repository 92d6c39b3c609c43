"""Learning rates that change over a run: functions of the step's number, for `Session.finetune(learning_rate=...)`.

They run on the host, and the journal keeps what they gave, so a resumed or replayed run needs none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.options import float32_problem, in_float32

SCHEDULES = ("constant", "linear", "cosine")


def schedule(
    name: str, learning_rate: float, steps: int, *, warmup: int = 0, end: float = 0.0
) -> Callable[[int], float]:
    """The learning rate of every step.

    Args:
        name: "constant", "linear" or "cosine": how it falls from `learning_rate` after the warm-up to the end.
        learning_rate: Its highest value, finite.
        steps: Steps of the whole run, above 0; later steps keep the last value.
        warmup: Steps in which it rises linearly from `learning_rate / warmup`, at most `steps`.
        end: Share of `learning_rate` that is left at the end, 0..1.

    Raises:
        ConfigError: An argument is out of range.

    >>> [round(schedule("linear", 1.0, 6, warmup=2)(step), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule is {name!r}", hint=f"use one of {', '.join(SCHEDULES)}")
    if problem := float32_problem(learning_rate):
        raise ConfigError(f"learning_rate is {learning_rate!r}; {problem}")
    if steps < 1 or not 0 <= warmup <= steps:
        raise ConfigError(f"steps is {steps} and warmup {warmup}; they must be above 0, and 0..steps")
    if not 0 <= end <= 1:
        raise ConfigError(f"end is {end}; it must be in 0..1")

    def rate(step: int) -> float:
        if step < warmup:
            return in_float32(learning_rate * (step + 1) / warmup)
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        share = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}[name]
        return in_float32(learning_rate * (share if name == "constant" else end + (1 - end) * share))

    return rate
