"""Memory that is given back to the system: weights that lie in a file, once they were read, and what was freed.

Weights that the compiler makes (codes of fewer bits, float32 copies) are laid down in files of their own, which have no
name and are gone with the process, so that memory holds what is being read.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: what was not changed is dropped, and read from the file again if need be
_SMALLEST_BYTES, _SMALLEST_LAID_DOWN = 1 << 20, 1 << 16
_SMALLEST_CHUNK, _LARGEST_CHUNK = 1 << 20, 1 << 27


class _Chunk(mmap.mmap):
    """A file without a name, mapped whole, that tensors are laid down in one behind the other."""

    used = 0
    first = 0  # the address of its first byte


_chunks: weakref.WeakSet[_Chunk] = weakref.WeakSet()  # a chunk lives as long as a tensor in it
_changing = threading.Lock()
_DTYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
}


def lay_down(tensor: Tensor) -> Tensor:
    """The same numbers in a file, of which what is read is in memory until `give_back`.

    Args:
        tensor: Of any kind; one that is small, that is not plain numbers on the CPU, or that the disk has no room for
            is returned as it is. Else the result is contiguous.
    """
    size = tensor.numel() * tensor.element_size()
    if size < _SMALLEST_LAID_DOWN or not _plain(tensor):
        return tensor
    with _changing:
        try:
            chunk = next((chunk for chunk in _chunks if chunk.used + size <= len(chunk)), None) or _new_chunk(size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return tensor
        at = chunk.used
        chunk.used += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    laid = torch.frombuffer(chunk, dtype=tensor.dtype, count=tensor.numel(), offset=at).reshape(tensor.shape)
    laid.copy_(tensor.detach())
    _drop(chunk, at, size)
    return laid


def _plain(tensor: Tensor) -> bool:
    kind = type(tensor) in (Tensor, torch.nn.Parameter)
    return kind and tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPES


def _new_chunk(size: int) -> _Chunk:
    size = max(size, min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, sum(map(len, _chunks)))))
    with tempfile.TemporaryFile(prefix="mobizo-") as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full says so now, and not when the memory is written
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        chunk = _Chunk(file.fileno(), size)
    chunk.first = torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr()
    _chunks.add(chunk)
    return chunk


def _begin_anew() -> None:
    """In a child that was forked: what it has mapped is its parent's as well, which goes on to write there."""
    global _chunks, _changing
    _chunks, _changing = weakref.WeakSet(), threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


def let_go(tensor: Tensor) -> None:
    """Tell the system that a large tensor that is mapped from a file will not be read for a while.

    Memory of other tensors, and other systems than Linux, are left alone. Values never change by this.
    """
    first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    advise = _madvise()
    if advise is None or size < _SMALLEST_BYTES or not _of_a_file(first):
        return
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(start, end - start, _PAGEOUT)


def give_back() -> None:
    """Return what was freed, of which the C library keeps pieces of up to 32 MB, as weights are; and what was read of
    tensors that were laid down."""
    trim = _trim()
    if trim is not None:
        trim(0)
    with _changing:
        for chunk in _chunks:
            _drop(chunk, 0, len(chunk))


def put_back(tensor: Tensor) -> None:
    """Take what was read of a tensor that was laid down out of memory; other tensors are left alone."""
    if not _plain(tensor):
        return
    first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    with _changing:
        for chunk in _chunks:
            if chunk.first <= first < chunk.first + len(chunk):
                _drop(chunk, first - chunk.first, size)


def _drop(chunk: _Chunk, at: int, size: int) -> None:
    """Take pages of a file out of this process's memory; the file keeps what it has."""
    if hasattr(mmap, "MADV_DONTNEED"):
        page = at // mmap.PAGESIZE * mmap.PAGESIZE
        chunk.madvise(mmap.MADV_DONTNEED, page, size + at - page)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's function; None with other libraries."""
    try:
        call: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return call


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's function; None where there is none that takes this advice."""
    try:
        found = ctypes.CDLL(None).madvise
        with open("/proc/self/maps"):
            pass
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    call: Callable[[int, int, int], int] = found
    return call


def _of_a_file(address: int) -> bool:
    """Whether an address lies in a mapping of a file."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            ends, _, _, _, inode, *_ = line.split()
            first, _, last = ends.partition("-")
            if int(first, 16) <= address < int(last, 16):
                return inode != "0"
    return False
