"""Which delegates a program file needs, and which of them this machine's runtime has.

The format is `schema/program.fbs` of ExecuTorch. Only names are read, not the network.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path

from executorch.runtime import Runtime
from flatbuffers.table import Table

from mobizo_compiler.backends.executorch.one_copy import HEADER

# Positions of fields in the tables Program, ExecutionPlan and BackendDelegate.
_PLANS, _DELEGATES, _ID = 1, 7, 0


@functools.lru_cache(maxsize=16)
def _needed(path: Path, size: int, changed: int) -> tuple[str, ...]:
    with path.open("rb") as file:
        program_size = HEADER.unpack(file.read(HEADER.size))[4]
        file.seek(0)
        program = file.read(program_size)
    found = []
    for plan in _tables(Table(program, struct.unpack_from("<I", program)[0]), _PLANS):
        for delegate in _tables(plan, _DELEGATES):
            found.append(bytes(delegate.String(delegate.Pos + delegate.Offset(4 + 2 * _ID))).decode())
    return tuple(dict.fromkeys(found))


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


def _tables(table: Table, field: int) -> list[Table]:
    vector = table.Offset(4 + 2 * field)
    if not vector:
        return []
    start = table.Vector(vector)
    return [Table(table.Bytes, table.Indirect(start + 4 * index)) for index in range(table.VectorLen(vector))]
