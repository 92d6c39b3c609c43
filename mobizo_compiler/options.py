"""What every frozen dataclass of options is made of: JSON in and out, and checks of single values."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from typing import Any, Self

from mobizo_compiler.errors import ConfigError

MAX_SEED = 2**31 - 1


class JsonConfig:
    """Mixin for frozen dataclasses whose fields are JSON values or tuples of them."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary that `json.dumps` takes."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: _plain(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; a key that is not a field, or a field that is missing, is a `ConfigError`."""
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            hint = f"its fields are {sorted(fields)}" if fields else "it has none"
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}", hint=hint)
        for name, field in fields.items():
            if name not in values and field.default is field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{cls.__name__} needs {name!r}, which is not given")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shown(value: object) -> str:
    """What was given in the place of something else, for a message.

    >>> shown(3), shown(JsonConfig)
    ('3 (int)', 'the class JsonConfig')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else f"{value!r} ({type(value).__name__})"


def in_float32(value: float) -> float:
    """A number as the float32 that a program computes with: infinite or 0 where that cannot hold it.

    >>> in_float32(1e39), in_float32(-1e39), in_float32(1e-50), in_float32(0.5)
    (inf, -inf, 0.0, 0.5)
    """
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def float32_problem(value: object) -> str | None:
    """Why float32 cannot hold a number, to be put behind its name and value; None if it can."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "it must be a finite number"
    seen = in_float32(value)
    if math.isinf(seen):
        return "it must be a number that float32 can hold, up to 3.4e38"
    if seen == 0 and value != 0:
        return "it must be 0 or a number that float32 can tell from 0, above 1.4e-45"
    return None


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise `ConfigError` unless `value` is an int (no bool) in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an int, not {type(value).__name__}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}, which is outside {low}..{high}")
