"""Files that appear whole or not at all, and files that one session holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mobizo_compiler.errors import ArtifactError, JournalLockedError


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


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order. A tensor of one element may have any stride, which a view refuses."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file to a temporary name beside `target`, flush it, and rename it.

    Raises:
        ArtifactError: There is no folder to write to.
    """
    if not target.parent.is_dir():
        raise ArtifactError(f"there is no folder {str(target.parent)!r}", where=str(target))
    with source.open("rb") as original, whole_file(target) as copy:
        shutil.copyfileobj(original, copy, 1 << 22)
