"""Numbers that a program takes, checked as the program will see them: seeds as int32, all others as float32."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from mobizo_compiler.errors import InputError
from mobizo_compiler.options import MAX_SEED


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """An int from any whole number, those of numpy too.

    Raises:
        InputError: It is none, or out of range.

    >>> import numpy
    >>> whole("steps", numpy.int64(3), 0)
    3
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be an int")
    if int(value) < low or (high is not None and int(value) > high):
        allowed = f"of {low} or more" if high is None else f"in {low}..{high}"
        raise InputError(f"{name} is {value}; it must be an int {allowed}")
    return int(value)


def seed_tensor(seed: object) -> Tensor:
    """A seed as methods take it, int32 [1].

    Raises:
        InputError: It is no int in 0..2^31-1.
    """
    return torch.tensor([whole("seed", seed, 0, MAX_SEED)], dtype=torch.int32)


def float32(name: str, value: object, above: float = -math.inf) -> float:
    """What float32 makes of a number, those of numpy too.

    Raises:
        InputError: It is none, or not finite in float32, or 0 there and not 0 here, or not above `above`.

    >>> float32("learning_rate", 0.1)
    0.10000000149011612
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}; it must be a finite number")
    seen = float(torch.tensor(float(value), dtype=torch.float32))
    if not math.isfinite(seen) or (value and not seen):
        raise InputError(f"{name} is {value}; in float32, in which programs compute, that is {seen:g}")
    if not seen > above:
        raise InputError(f"{name} is {value}; it must be above {above:g}")
    return seen


def scalar_tensor(name: str, value: object, above: float = -math.inf) -> Tensor:
    """A number as methods take it, float32 [1]; see `float32`."""
    return torch.tensor([float32(name, value, above)], dtype=torch.float32)
