"""`load`: from a file back to a program."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from mobizo_compiler.backends import BUILT_IN, Backend, backend_names, get_backend
from mobizo_compiler.errors import ArtifactError, BackendUnavailableError, UnknownBackendError
from mobizo_compiler.format.program import Program

# Each reads what all built-in backends of its kind write.
_READERS = ("aot_inductor", "portable")


def load(path: str | PathLike[str], *, verify: bool = True) -> Program:
    """Load a program file.

    Args:
        path: The file.
        verify: Read the whole file once and compare it with its checksum; False where that was done before.

    Raises:
        ArtifactError: There is no such file, or it is truncated, damaged, or not a program of this compiler.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError("there is no such file", where=str(file))
    for backend in _readers():
        if backend.reads(file):
            return backend.load(file, verify)
    raise ArtifactError(
        "this is not a program of any installed backend",
        where=str(file),
        hint=f"installed: {', '.join(sorted(backend_names()))}",
    )


def _readers() -> Iterator[Backend]:
    """The backends that may know a file: the built-in kinds first, then other packages, which are imported then."""
    for name in (*_READERS, *(name for name in backend_names() if name not in BUILT_IN)):
        try:
            yield get_backend(name)
        except (UnknownBackendError, BackendUnavailableError):  # of another package that is broken: its own affair
            continue
