"""Files that appear whole or not at all, files that one session holds, and nothing left behind by processes that died.

A temporary file or folder is locked (`flock`) while its process needs it. The lock ends with the process, however that
ends, so that who writes next can tell what a dead process left behind from what a living one is writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mobizo_compiler.errors import ArtifactError, JournalLockedError

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-zA-Z]{6,}\.partial", re.DOTALL)  # the C++ host writes such names too
_LOCK = ".lock"


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`; at the end of the block it is flushed and renamed, after an error removed.

    What dead processes have left of the same file is removed first.

    Args:
        path: Where it will be. What is there before stays until the rename.
        mode: Permissions, less what the process masks.
    """
    remove_partial(path.parent, path.name)
    try:
        with _partial(path, mode) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
                raise
    except OSError as error:  # a full disk does not say which file it was for
        error.filename = error.filename or str(path)
        raise


def remove_partial(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of `whole_file` whose process is dead.

    Args:
        folder: Where they are.
        name: Of the file that they were to become; None for any.
    """
    with contextlib.suppress(OSError):  # of files that are gone meanwhile, or not ours to remove
        for path in list(folder.iterdir()):
            match = _PARTIAL.fullmatch(path.name)
            if match is not None and name in (None, match[1]):
                with contextlib.suppress(OSError), path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


class ScratchFolder:
    """A temporary folder, removed by `remove`, and by who makes the next one if this process dies before.

    Args:
        parent: Where it is made; the system's place for temporary files if None.
    """

    prefix = "mobizo-"

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        self._remove_dead(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=self.prefix, dir=parent))
            self._lock = _locked(self.path / _LOCK)
            if self._lock is not None:
                return

    def _remove_dead(self, parent: Path) -> None:
        for folder in parent.glob(f"{self.prefix}*"):
            with contextlib.suppress(OSError), (folder / _LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


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
    with source.open("rb") as original:
        write_whole(original, target)


def write_whole(data: IO[bytes], target: Path) -> None:
    """Write what is read from `data` to a temporary name beside `target`, flush it, and rename it.

    Raises:
        ArtifactError: There is no folder to write to.
    """
    if not target.parent.is_dir():
        raise ArtifactError(f"there is no folder {str(target.parent)!r}", where=str(target))
    with whole_file(target) as file:
        shutil.copyfileobj(data, file, 1 << 22)


def _partial(path: Path, mode: int) -> IO[bytes]:
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        if (file := _locked(name, mode)) is not None:
            return file


def _locked(path: Path, mode: int = 0o600) -> IO[bytes] | None:
    """A new file, locked; None where another process took it for a dead one's before it was."""
    file = open(path, "x+b", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115  (of the caller)
    with contextlib.suppress(OSError):  # a file system without locks: nothing is taken for dead there
        fcntl.flock(file, fcntl.LOCK_EX)
    if not path.exists():
        file.close()
        return None
    return file
