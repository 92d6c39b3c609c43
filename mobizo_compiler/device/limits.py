"""When a device stops training by itself: after some minutes, on a low battery, or when it is hot."""

from __future__ import annotations

import dataclasses
import math
import numbers
import time
from collections.abc import Callable
from typing import Any, Protocol

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.optional import optional
from mobizo_compiler.options import JsonConfig

EVERY_SECONDS = 5.0  # between two looks at the sensors, which take longer than a small step


class Sensors(Protocol):
    """What a device says of itself; a host that knows better brings its own."""

    def battery(self) -> float | None:
        """Its charge in percent; None while it is charged, and where there is none."""

    def temperature(self) -> float | None:
        """Of the hottest part, in degrees Celsius; None where nothing says so."""


@dataclasses.dataclass(frozen=True)
class Limits(JsonConfig):
    """What ends a call of `finetune` between two steps. The run stays as it is: the same call goes on with it later.

    `finetune(until=Limits(...))` watches this machine; `until=Limits(...).watch(sensors)` what a host knows better.

    Args:
        minutes: So long, of this call.
        battery: When the charge falls below so many percent and is not being charged.
        temperature: When a part of the device is hotter than so many degrees Celsius.

    Raises:
        ConfigError: A limit is out of range.

    >>> Limits.from_json(Limits(minutes=10, battery=20).to_json())
    Limits(minutes=10, battery=20, temperature=None)
    """

    minutes: float | None = None
    battery: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name, most in (("minutes", math.inf), ("battery", 100.0), ("temperature", math.inf)):
            value: Any = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= most:
                raise ConfigError(
                    f"Limits.{name} is {value!r}; it must be a number above 0"
                    + (f", and at most {most:g}" if math.isfinite(most) else "")
                )
            if not isinstance(value, int):
                object.__setattr__(self, name, float(value))

    def watch(self, sensors: Sensors | None = None, clock: Callable[[], float] = time.monotonic) -> Watch:
        """What says whether a limit is reached; minutes count from here.

        Args:
            sensors: Those of this machine if None.
            clock: Seconds.

        Raises:
            ConfigError: The machine does not say how hot it is, and there is a limit on that.
            MissingPackageError: psutil, which reads the sensors, is missing.
        """
        if sensors is None and (self.battery is not None or self.temperature is not None):
            sensors = _Machine()
        if self.temperature is not None and sensors is not None and sensors.temperature() is None:
            raise ConfigError(
                "this machine does not say how hot it is, so that there can be no limit on its temperature",
                hint="leave it out, or Limits.watch(sensors=...) with what knows",
            )
        return Watch(self, sensors, clock)


def watch_of(until: Limits | Watch | None) -> Watch:
    """What is watched: nothing where there are no limits."""
    return until if isinstance(until, Watch) else (until or Limits()).watch()


class Watch:
    """Whether a limit is reached. Once one is, it stays so, and `reason` says which.

    Args:
        limits: The limits.
        sensors: Where charge and temperature come from; None where there is no limit on them.
        clock: Seconds.
    """

    def __init__(self, limits: Limits, sensors: Sensors | None, clock: Callable[[], float]) -> None:
        self._limits, self._sensors, self._clock = limits, sensors, clock
        self._start, self._looked = clock(), -math.inf
        self.reason: str | None = None

    def __call__(self) -> bool:
        """Look; at the sensors no more often than every few seconds."""
        now = self._clock()
        if self.reason is None and self._limits.minutes is not None and now - self._start >= 60 * self._limits.minutes:
            minutes = self._limits.minutes
            self.reason = "a minute is over" if minutes == 1 else f"{minutes:g} minutes are over"
        if self.reason is None and self._sensors is not None and now - self._looked >= EVERY_SECONDS:
            self._looked, self.reason = now, self._sensed(self._sensors)
        return self.reason is not None

    def _sensed(self, sensors: Sensors) -> str | None:
        charge = None if self._limits.battery is None else sensors.battery()
        if charge is not None and self._limits.battery is not None and charge < self._limits.battery:
            return f"the battery is at {charge:.0f} %"
        heat = None if self._limits.temperature is None else sensors.temperature()
        if heat is not None and self._limits.temperature is not None and heat > self._limits.temperature:
            return f"the device is at {heat:.0f} degrees"
        return None


class _Machine:
    """This machine, by psutil."""

    def __init__(self) -> None:
        self._psutil = optional("psutil", "a limit on battery or temperature")

    def battery(self) -> float | None:
        """As in `Sensors`."""
        found = self._psutil.sensors_battery() if hasattr(self._psutil, "sensors_battery") else None
        return None if found is None or found.power_plugged else float(found.percent)

    def temperature(self) -> float | None:
        """As in `Sensors`."""
        read = getattr(self._psutil, "sensors_temperatures", dict)  # on Linux and FreeBSD
        return max((part.current for parts in read().values() for part in parts), default=None)
