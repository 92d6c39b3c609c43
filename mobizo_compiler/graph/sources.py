"""Graph modules whose Python source is written when somebody calls them or reads it.

torch writes the source of a graph module, and has Python compile it, whenever its graph is set. Passes set graphs all
the time and call none of them: of compiling a model of a hundred million parameters that was a sixth of the time.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

from mobizo_compiler.upstream import member

_inside = contextvars.ContextVar("_inside", default=False)
_patching, _writing = threading.Lock(), threading.RLock()
_blocks = 0
_write_now: Callable[[fx.GraphModule], Any] = fx.GraphModule.recompile
_outside = fx.GraphModule.recompile  # what the first block found there
_CODE, _LINES, _PROLOGUE = "_code", "_lineno_map", "_prologue_start"  # what torch leaves of the source


@contextlib.contextmanager
def written_when_asked_for() -> Iterator[None]:
    """In this block, in this thread, a `torch.fx.GraphModule` is recompiled when it is called, pickled, or looked at.

    A module that was made in the block keeps to that. It is then what its graph is at that time.
    """
    global _blocks, _outside
    with _patching:
        if not _blocks:
            _outside, fx.GraphModule.recompile = fx.GraphModule.recompile, _recompile  # type: ignore[assignment,method-assign]
        _blocks += 1
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)
        with _patching:
            _blocks -= 1
            if not _blocks and fx.GraphModule.recompile is _recompile:
                fx.GraphModule.recompile = _outside  # type: ignore[method-assign]


def _recompile(module: fx.GraphModule) -> Any:
    """What `recompile` is while a block is open."""
    plain = type(module).__bases__ == (fx.GraphModule,)
    # One with a signature is made to be called.
    if not _inside.get() or not plain or type(member(module.graph, "_codegen")) is not CodeGen:
        return _outside(module)
    with _writing:
        _Waiting(module).install()
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            child.recompile()
    return _Source(module.graph)


class _Source:
    """What `recompile` returns: a `PythonCode` that is written when one of its attributes is asked for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph.python_code(root_module="self"), name)


class _Waiting:
    """In the place of `forward` in the class of a graph module, which every module has for itself: writes it.

    Whatever looks for `forward`, in the module or in its class, finds the one that torch makes of the source.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = weakref.ref(module)

    def __get__(self, module: fx.GraphModule | None, own: Any) -> Any:
        written = self.write()
        return own.forward if module is None else written.forward

    def install(self) -> None:
        """Put it there, and what writes the rest with it."""
        own: Any = type(self._module())
        if "__call__" in vars(own):  # it was called before: the wrapper around `forward` is made anew with it
            del own.__call__
        own.forward, own.__reduce__ = self, lambda module: fx.GraphModule.__reduce__(self.write())
        setattr(own, _CODE, property(lambda module: module.graph.python_code(root_module="self").src, _setter(_CODE)))
        for name in (_LINES, _PROLOGUE):
            setattr(own, name, property(functools.partial(self._part, name), _setter(name)))

    def _part(self, name: str, module: fx.GraphModule) -> Any:
        return member(self.write(), name)

    def write(self) -> fx.GraphModule:
        """Let torch write the module, once."""
        module = self._module()
        assert module is not None  # its class is looked at through it
        own: Any = type(module)
        with _writing:
            if vars(own).get("forward") is self:
                del own.__reduce__
                _write_now(module)  # which takes away the rest: see `_setter`
        return module


def _setter(name: str) -> Callable[[fx.GraphModule, Any], None]:
    def take(module: fx.GraphModule, value: Any) -> None:
        """`recompile` of torch itself leaves a part here, which is an attribute like others from now on."""
        delattr(type(module), name)
        setattr(module, name, value)

    return take
