"""Options of ExecuTorch's backends at run time, set from Python.

The runtime has them in C++ (`runtime/backend/interface.h`: `set_option`) and not yet in its Python bindings, but it is
one shared library, and the function has a C-compatible signature.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import executorch

_LIBRARY = "lib/libexecutorch.so"
_SET_OPTION = "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE"
_log = logging.getLogger(__name__)
_loading = threading.Lock()


class _BackendOption(ctypes.Structure):
    """A key and a `std::variant<bool, int, std::array<char, 256>>`."""

    _fields_ = (
        ("key", ctypes.c_char * 64),
        ("value", ctypes.c_ubyte * 256),
        ("kind", ctypes.c_ubyte),
        ("padding", ctypes.c_ubyte * 3),
    )


def set_backend_option(backend: str, key: str, value: bool) -> bool:
    """Set a switch of a backend for programs that are loaded from now on; False where this runtime has no such switch.

    Args:
        backend: Name as in the runtime's registry, "XnnpackBackend".
        key: Name of the option, as in the backend's header.
        value: The value.
    """
    library = Path(next(iter(executorch.__path__))) / _LIBRARY
    try:
        set_option = ctypes.CDLL(str(library))[_SET_OPTION]
    except (OSError, AttributeError):
        return False
    option = _BackendOption(key=key.encode(), kind=0)
    option.value[0] = value
    set_option.argtypes = [ctypes.c_char_p, ctypes.POINTER(_BackendOption), ctypes.c_size_t]
    set_option.restype = ctypes.c_uint32
    return int(set_option(backend.encode(), ctypes.byref(option), 1)) == 0


@contextlib.contextmanager
def shared_packed_weights() -> Iterator[None]:
    """Methods loaded within the block share the weights that XNNPACK packs; outside of it each has its own copy.

    The option is one for the process, so one thread at a time loads.
    """
    with _loading:
        shared = set_backend_option("XnnpackBackend", "weight_cache_enabled", True)
        if not shared:
            _log.info("this ExecuTorch runtime keeps one copy of packed weights for each method")
        try:
            yield
        finally:
            if shared:
                set_backend_option("XnnpackBackend", "weight_cache_enabled", False)
