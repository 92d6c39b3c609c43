"""What every frozen dataclass of options is made of: JSON in and out, and checks of single values."""

from __future__ import annotations

import dataclasses
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


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise `ConfigError` unless `value` is an int (no bool) in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an int, not {type(value).__name__}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}, which is outside {low}..{high}")
