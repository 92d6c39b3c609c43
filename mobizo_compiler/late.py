"""Names of a package that are imported when they are asked for.

Who only runs a program should not wait for PyTorch's tracer, SymPy and ExecuTorch's exporter, which take longer to
import than PyTorch does (PEP 562).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def late_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """What a package has as `__getattr__`: it looks a name up in the module that has it, and modules by their names.

    Args:
        package: The `__name__` of the package.
        homes: The whole name of the module where each name is.
    """

    def find(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(homes[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
