"""Packages that are optional, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from mobizo_compiler.errors import MissingPackageError


def optional(package: str, purpose: str, install: str | None = None) -> Any:
    """An optional package, imported.

    Raises:
        MissingPackageError: It is not installed; the message says what it was wanted for.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs the package {package.partition('.')[0]}: {error}",
            hint=f"pip install {install or package.partition('.')[0]}",
        ) from None
