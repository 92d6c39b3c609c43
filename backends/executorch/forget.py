"""What torch and ExecuTorch remember of graphs that were lowered, for as long as the process lives.

Each of these keeps whole programs, or their text, which of a model of a billion parameters is most of a gigabyte.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator

from executorch.exir.backend.utils import WhyNoPartition, is_same_node
from executorch.exir.lowered_backend_module import LoweredBackendModule

from mobizo_compiler.upstream import FakeTensorMode, fx_sources


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Lower in this block; what is remembered of it is forgotten at its end.

    That is the source of every module that was traced meanwhile, in whichever thread, which a debugger would show.
    """
    before = set(fx_sources.eval_cache)
    try:
        yield
    finally:
        for key in set(fx_sources.eval_cache) - before:
            fx_sources.eval_cache.pop(key, None)
            linecache.cache.pop(key, None)
        for key in [key for key in list(FakeTensorMode.cache) if _of_a_delegate(key)]:
            FakeTensorMode.cache.pop(key, None)  # shapes of calls by their arguments, of which a delegate is one
        is_same_node.cache_clear()
        for why in _partitioners_reasons():
            why.node = None  # the last one that was not lowered, with its graph


def _of_a_delegate(key: object) -> bool:
    return any(isinstance(part, LoweredBackendModule) for part in key.key)  # type: ignore[attr-defined]


def _partitioners_reasons() -> Iterator[WhyNoPartition]:
    for name, module in list(sys.modules.items()):
        if name.startswith("executorch.backends.") and isinstance(why := getattr(module, "why", None), WhyNoPartition):
            yield why
