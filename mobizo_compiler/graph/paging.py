"""Memory that is given back to the system: weights that lie in a file, once they were read, and what was freed."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: what was not changed is dropped, and read from the file again if need be
_SMALLEST_BYTES = 1 << 20


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
    """Return what was freed: the C library keeps pieces of up to 32 MB, as weights are, for the next time."""
    trim = _trim()
    if trim is not None:
        trim(0)


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
