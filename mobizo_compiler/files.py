"""Files that appear whole or not at all, and files that one session holds."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from mobizo_compiler.errors import JournalLockedError


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`; at the end of the block it is flushed and renamed, after an error removed.

    Args:
        path: Where it will be. What is there before stays until the rename.
        mode: Permissions.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def hold(path: Path, problem: str, hint: str) -> FileLock:
    """The lock beside a file, taken until it is released; nobody else gets it, in this process or another.

    Raises:
        JournalLockedError: Somebody else has it; `problem` and `hint` say what that means.
    """
    lock = FileLock(f"{path}.lock", timeout=0, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        raise JournalLockedError(problem, where=str(path), hint=hint) from None
    return lock


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
