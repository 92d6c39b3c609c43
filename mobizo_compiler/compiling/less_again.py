"""What torch does again and again while it exports a program and ExecuTorch lowers it, left out where nothing changes.

Every node has a record of the nodes that it came from, which is copied whole for each node that is made from it; nobody
changes one. And torch looks up every composite operator of the dispatcher whenever it decomposes a program, also where
there are no others than the last time. Together that is an eighth of what it takes to lower a small program.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from mobizo_compiler.upstream import NodeSource, export_utils, operators_of_key


class LessAgain(contextlib.ContextDecorator):
    """Do so in this block, in all threads; what torch had before comes back with the last block that ends."""

    _lock, _inside = threading.Lock(), 0
    _materialize: Callable[[], None]

    def __enter__(self) -> None:
        with self._lock:
            if not LessAgain._inside:
                LessAgain._materialize = export_utils._materialize_cpp_cia_ops
                export_utils._materialize_cpp_cia_ops = _if_there_are_others(LessAgain._materialize)
                NodeSource.__deepcopy__ = lambda source, memo: source
            LessAgain._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            LessAgain._inside -= 1
            if not LessAgain._inside:
                export_utils._materialize_cpp_cia_ops = LessAgain._materialize
                del NodeSource.__deepcopy__


def _if_there_are_others(materialize: Callable[[], None]) -> Callable[[], None]:
    """The same, unless the dispatcher has the operators that it had when this was called last."""
    known: Any = None

    def again() -> None:
        nonlocal known
        registered = operators_of_key("CompositeImplicitAutograd")
        if registered != known:
            materialize()
            known = registered

    return again
