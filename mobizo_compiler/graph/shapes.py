"""What calls return, remembered by what they are given.

torch takes a tenth of a millisecond to find the shape of what a call returns, and several where sizes are symbols. In a
model of equal blocks, and from one pass to the next, nearly every call has been seen before.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from mobizo_compiler.upstream import FakeTensor, FakeTensorMode, OpOverload

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

# By mode, because sizes are symbols of its environment.
_known: weakref.WeakKeyDictionary[FakeTensorMode, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def value_of_call(
    target: Any, arguments: tuple[Any, ...], mode: FakeTensorMode, before: Any, call: Callable[[], Any]
) -> Any:
    """What a call returns. What is made from memory has a memory of its own: it is no view of an argument.

    Args:
        target: The operator.
        arguments: Its arguments, with values in the place of nodes.
        mode: The mode of the values.
        before: A value that is returned if it is like the result.
        call: Does the call.
    """
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return call()
    if (given := key_of(arguments)) is None:
        return call()
    known, value = _known.setdefault(mode, {}), None
    if (target, given) not in known:
        value = call()
        if (key := key_of(value)) is None:
            return value
        known[target, given] = key, _described(value)
    key, description = known[target, given]
    if type(before) is FakeTensor and before.fake_mode is mode and key_of(before) == key:
        return before
    return _made(description, mode) if value is None else value


def another(value: FakeTensor, mode: FakeTensorMode) -> FakeTensor:
    """A fake tensor of the same shape, strides, dtype and device, with a memory of its own."""
    return _made(_described(value), mode)


def key_of(value: Any) -> Hashable:
    """What two values have in common of which one may take the place of the other: shapes, strides, dtypes, numbers.

    None for a value that these do not describe; one whose size depends on data is like no other.
    """
    try:
        return _key(value)
    except _Unknown:
        return None


class _Unknown(Exception):
    """A value that its sizes do not describe."""


class _Tensor(NamedTuple):
    """A fake tensor without its mode."""

    shape: Sequence[Any]
    strides: Sequence[Any]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def _described(value: Any) -> Any:
    if type(value) is FakeTensor:
        return _Tensor(tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(_described(item) for item in value)
    return value


def _made(description: Any, mode: FakeTensorMode) -> Any:
    if type(description) is _Tensor:
        shape, strides, dtype, device, requires_grad = description
        empty = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return FakeTensor(mode, empty, device).requires_grad_(requires_grad)
    if isinstance(description, (tuple, list)):
        return type(description)(_made(item, mode) for item in description)
    return description


def _key(value: Any) -> Hashable:
    kind = type(value)
    if kind is FakeTensor:
        if value.layout is not torch.strided or value.constant is not None or value.is_conj() or value.is_neg():
            raise _Unknown
        offset = value.storage_offset()
        if type(offset) is not int or offset != 0:
            raise _Unknown
        shape, strides, *rest = _described(value)
        return (kind, tuple(map(_size, shape)), tuple(map(_size, strides)), *rest)
    if kind is torch.SymInt:
        return _size(value)
    if isinstance(value, (tuple, list)):
        return (kind, tuple(map(_key, value)))
    if isinstance(value, dict):
        return (kind, tuple((name, _key(item)) for name, item in value.items()))
    if kind in _PLAIN:
        return (kind, value)
    raise _Unknown


def _size(size: Any) -> Hashable:
    if type(size) is int:
        return size
    expression = size.node.expr
    if _depends_on_data(expression):
        raise _Unknown
    return (torch.SymInt, expression)


@functools.lru_cache(maxsize=4096)
def _depends_on_data(expression: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # SymPy, which only who compiles needs

    return bool(free_unbacked_symbols(expression))
