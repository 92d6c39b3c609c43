"""Lowering that never has all weights in memory a second time.

ExecuTorch copies every delegate's part of a program, weights and all, before the first one is serialized, and keeps
what was serialized, for each method again, until the file is written. Here parts share the weights of the program, and
what is serialized waits in a temporary folder, once for all methods.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from mobizo_compiler.format.files import ScratchFolder
from mobizo_compiler.graph.paging import give_back
from mobizo_compiler.upstream import FileBackedData, NamedDataStore, xnnpack_preprocess

SMALLEST_BYTES = 1 << 16


class _Folder:
    """A folder that lives until it is removed, or as long as anything that was written into it."""

    def __init__(self) -> None:
        scratch = ScratchFolder()
        self.path = scratch.path
        self.remove = weakref.finalize(self, scratch.remove)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Folder:
        return self

    def keep(self, data: bytes) -> Any:
        """The same bytes on the disk, as ExecuTorch takes them."""
        digest = hashlib.sha256(data).digest()
        path = self.path / digest.hex()
        if not path.exists():
            path.write_bytes(data)
        give_back()  # what it was made of
        kept = FileBackedData(str(path), sha256=digest)
        kept.folder = self
        return kept


_folder: contextvars.ContextVar[_Folder | None] = contextvars.ContextVar("_folder", default=None)


@contextlib.contextmanager
def weights_on_disk(*, outlive: bool) -> Iterator[None]:
    """In this block, in this thread, delegates of XNNPACK are serialized so.

    Args:
        outlive: Whether somebody keeps the delegates; else their data is gone at the end of the block.
    """
    _install()
    folder = _Folder()
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)
        if not outlive:
            folder.remove()


@functools.cache
def _install() -> None:
    """Have XNNPACK's lowering ask whether it is in such a block; elsewhere it does what it did."""

    class Store(NamedDataStore):  # type: ignore[misc]
        def add_named_data(self, key: str, data: Any, *rest: Any, **more: Any) -> None:
            folder = _folder.get()
            if folder is not None and isinstance(data, bytes) and len(data) >= SMALLEST_BYTES:
                data = folder.keep(data)
            super().add_named_data(key, data, *rest, **more)

    def copied(cls: Any, edge_program: ExportedProgram, compile_specs: Any) -> ExportedProgram:
        tensors = [*edge_program.state_dict.values(), *edge_program.constants.values()]
        shared = {id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)}
        return copy.deepcopy(edge_program, shared if _folder.get() is not None else None)

    xnnpack_preprocess.NamedDataStore = Store
    xnnpack_preprocess.XnnpackBackend.copy_exported_program_for_preprocess = classmethod(copied)
