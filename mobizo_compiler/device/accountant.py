"""What a run with differential privacy may spend, and what it has spent: the accountant of the package dp-accounting.

Two sets of rows are neighbours if one has nothing in the place of a row of the other: how many rows there are is known.
A step takes every row with the same probability, by itself, adds up what the rows say, none of which is longer than a
bound, and adds normal noise: the Gaussian mechanism on a Poisson sample (Abadi et al. 2016, arXiv 1607.00133; Mironov
et al. 2019, arXiv 1908.10530). Steps are composed by their privacy loss distributions, which gives an epsilon that is
no less than the exact one, and close to it (Doroshenko et al. 2022, arXiv 2207.04380).
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any, cast

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.optional import optional
from mobizo_compiler.options import JsonConfig, check_int

_INSTALL, _MODULES = "dp-accounting", ("dp_accounting", "dp_accounting.pld")
_GRID = 1e-3  # of privacy losses, rounded up: epsilon is a thousandth more than on a finer one, in a tenth of the time
_MOST_ROWS, _LEAST_NOISE, _MOST_NOISE = 1 << 31, 0.2, 1e5
# Beyond these nothing is kept private that is worth counting, and counting takes minutes and gigabytes.
_RANGES = {
    "epsilon": (0.01, 50.0),
    "delta": (1e-15, 0.1),
    "row_clip": (1e-9, 1e9),
    "noise_multiplier": (_LEAST_NOISE, _MOST_NOISE),
}
_DELTA_OF_ROWS = 0.1  # of 1 / rows, at which a mechanism may give away a row whole


@dataclasses.dataclass(frozen=True)
class Privacy(JsonConfig):
    """How much a run may tell of any one of its rows.

    Args:
        epsilon: The budget: there is no step that would go over it. None counts only, and needs a noise_multiplier.
        delta: Probability with which epsilon may not hold; a tenth of 1 / rows if not given.
        row_clip: Largest length of what one row says in a step: its slopes along the q directions, [q]. Longer ones
            are made so long. 1 if not given.
        noise_multiplier: Standard deviation of the noise over row_clip; if not given, the least with which all steps
            of the run stay within epsilon.
        sample_rows: Rows of a step, on average; those of a batch of the program if not given.
        public_start: A run may start from another state than the program's own, because nothing private is in it.

    Raises:
        ConfigError: A field is out of range.
    """

    epsilon: float | None = None
    delta: float | None = None
    row_clip: float | None = None
    noise_multiplier: float | None = None
    sample_rows: int | None = None
    public_start: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value: Any = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= float(value) <= high:
                raise ConfigError(f"Privacy.{name} is {value!r}; it must be a number in {low:g}..{high:g}")
            object.__setattr__(self, name, float(value))
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError(
                "Privacy has neither epsilon nor noise_multiplier",
                hint="epsilon=3 bounds what the run tells of a row, noise_multiplier=1 only counts it",
            )
        if not isinstance(self.public_start, bool):
            raise ConfigError(f"Privacy.public_start is {self.public_start!r}; it must be True or False")
        if self.sample_rows is not None:
            if isinstance(self.sample_rows, numbers.Integral) and not isinstance(self.sample_rows, bool):
                object.__setattr__(self, "sample_rows", int(self.sample_rows))  # of numpy, say
            check_int("Privacy.sample_rows", self.sample_rows, 1, _MOST_ROWS)

    def settled(self, rows: int, batch_rows: int, steps: int) -> Privacy:
        """With a number for everything that was left open, for a run of so many steps on so many rows.

        Raises:
            ConfigError: A step would take more rows than there are, or no noise is enough.
            MissingPackageError: dp-accounting is missing.
        """
        drawn = batch_rows if self.sample_rows is None else self.sample_rows
        if drawn > rows:
            raise ConfigError(f"a step takes {drawn} rows on average, and there are {rows}", hint="lower sample_rows")
        delta = _DELTA_OF_ROWS / rows if self.delta is None else self.delta
        noise = self.noise_multiplier
        if noise is None:
            noise = _least_noise(cast(float, self.epsilon), delta, drawn / rows, max(1, steps))
        clip = 1.0 if self.row_clip is None else self.row_clip
        return dataclasses.replace(self, delta=delta, row_clip=clip, noise_multiplier=noise, sample_rows=drawn)


@dataclasses.dataclass(frozen=True)
class Accountant:
    """What steps cost.

    Args:
        noise_multiplier: Standard deviation of the noise over the longest that a row may say.
        sample_rate: Probability of a row to be in a step.
        delta: As in `Privacy`.
    """

    noise_multiplier: float
    sample_rate: float
    delta: float

    def epsilon(self, steps: int) -> float:
        """Spent after so many steps."""
        return _epsilon(self.noise_multiplier, self.sample_rate, self.delta, steps) if steps else 0.0

    def steps_within(self, epsilon: float, most: int) -> int:
        """Steps that a budget is enough for, and no more than `most`."""
        low, high = 0, most + 1  # enough for low, and not for high
        while high - low > 1:
            middle = (low + high) // 2 if high <= most else most
            low, high = (middle, high) if self.epsilon(middle) <= epsilon else (low, middle)
        return low


@functools.lru_cache(maxsize=1024)
def _epsilon(noise: float, rate: float, delta: float, steps: int) -> float:
    accounting, pld = (optional(module, "differential privacy", _INSTALL) for module in _MODULES)
    accountant = pld.PLDAccountant(value_discretization_interval=_GRID)
    accountant.compose(accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))


def _least_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """To a thousandth, from above: more noise, less epsilon.

    Raises:
        ConfigError: No noise is enough.
    """
    low, high = 0.5 * _LEAST_NOISE, _LEAST_NOISE
    while _epsilon(high, rate, delta, steps) > epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ConfigError(
                f"no noise keeps {steps} steps within epsilon {epsilon:g} with delta {delta:g}",
                hint="make fewer steps, or give a larger epsilon",
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _epsilon(middle, rate, delta, steps) <= epsilon else (middle, high)
    return high
