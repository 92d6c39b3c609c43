"""Which delegates a program file needs, and which of them this machine's runtime has."""

from __future__ import annotations

import functools
from pathlib import Path

from mobizo_compiler.backends.executorch.head import HEAD_BYTES, read_head, read_header
from mobizo_compiler.upstream import Runtime


@functools.lru_cache(maxsize=16)
def _needed(path: Path, size: int, changed: int) -> tuple[str, ...]:
    with path.open("rb") as file:
        header = read_header(file.read(HEAD_BYTES))
        file.seek(0)
        return read_head(file.read(header.program_size if header else -1)).delegates


def needed_delegates(path: Path) -> tuple[str, ...]:
    """Names of the delegates that the methods of a program file call."""
    status = path.stat()
    return _needed(path, status.st_size, status.st_mtime_ns)


def missing_delegates(path: Path) -> tuple[str, ...]:
    """Those of them that the runtime in this process does not have."""
    registered = _registered()
    return tuple(name for name in needed_delegates(path) if name not in registered)


def _registered() -> list[str]:
    return list(Runtime.get().backend_registry.registered_backend_names)
