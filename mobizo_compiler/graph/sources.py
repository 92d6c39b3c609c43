"""Graph modules whose Python source is written when somebody calls them or reads it.

torch writes the source of a graph module, and has Python compile it, whenever its graph is set. Passes set graphs all
the time and call none of them: of compiling a model of a hundred million parameters that was a sixth of the time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

from mobizo_compiler.upstream import member

_patching = threading.Lock()
_patched = 0
_CODE = "_code"  # where torch keeps the source


@contextlib.contextmanager
def written_when_asked_for() -> Iterator[None]:
    """In this block a `torch.fx.GraphModule` is recompiled when it is first called, copied to a pickle, or read.

    A module that was made in the block keeps to that.
    """
    _count(+1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _patched
    with _patching:
        _patched += change
        fx.GraphModule.recompile = _later if _patched else _recompile  # type: ignore[assignment,method-assign]


_recompile = fx.GraphModule.recompile


class _Source:
    """What `recompile` returns: a `PythonCode` that is written when one of its attributes is asked for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph.python_code(root_module="self"), name)


def _later(module: fx.GraphModule) -> Any:
    """What `recompile` is in the block. Every graph module has a class of its own, which torch sets `forward` of."""
    if type(member(module.graph, "_codegen")) is not CodeGen:  # it has a signature, and so is made to be called
        return _recompile(module)
    own: Any = type(module)
    if "__call__" in vars(own):  # it was called before: the wrapper around `forward` is made anew with it
        del own.__call__
    own.forward, own.__reduce__ = _write_and_call, _write_and_reduce
    setattr(own, _CODE, property(_read, _take))
    return _Source(module.graph)


def _write_and_call(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(module)
    return module.forward(*args, **kwargs)


def _write_and_reduce(module: fx.GraphModule) -> Any:
    _recompile(module)
    return fx.GraphModule.__reduce__(module)


def _read(module: fx.GraphModule) -> str:
    return module.graph.python_code(root_module="self").src


def _take(module: fx.GraphModule, source: str) -> None:
    """`recompile` itself leaves the source here; from now on it is an attribute like others."""
    delattr(type(module), _CODE)
    setattr(module, _CODE, source)
