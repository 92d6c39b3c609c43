"""What the suites for estimators, update rules and losses share: how they fail, trace, and name what they check."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mobizo_compiler.errors import ConfigError, ContractError
from mobizo_compiler.extensions import DataclassRegistry
from mobizo_compiler.options import JsonConfig
from mobizo_compiler.upstream import pytree

J = TypeVar("J", bound=JsonConfig)


def require(holds: object, problem: str) -> None:
    """Unlike the statement `assert`, this is there under python -O as well."""
    if not holds:
        raise ContractError(problem)


@contextlib.contextmanager
def suite(registry: DataclassRegistry[J], value: str | J) -> Iterator[tuple[J, str]]:
    """One of a kind and its name, lent if it has none; everything that goes wrong is a `ContractError` about it."""
    if isinstance(value, str):
        found, name = registry.get(value), value
    else:
        require(isinstance(value, registry.base), f"{value!r} is not derived from {registry.base.__name__}")
        found, name = value, type(value).__name__
    fault = registry.fault(type(found))
    require(fault is None, f"{registry.kind} {name!r}: {fault}")
    try:
        with _named(registry, type(found), name) as known:
            _check_json(registry, found)
            yield found, known
    except Exception as error:
        problem = error.problem if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
        raise ContractError(f"{registry.kind} {name!r}: {problem}") from error


@contextlib.contextmanager
def _named(registry: DataclassRegistry[J], cls: type[J], name: str) -> Iterator[str]:
    try:
        known = registry.name_of(cls)
    except ConfigError:
        known = f"{name} under check"
        registry.register(known, cls)
        try:
            yield known
        finally:
            registry.unregister(known)
    else:
        yield known


def _check_json(registry: DataclassRegistry[J], value: J) -> None:
    described = registry.described(value)
    again = registry.get(json.loads(json.dumps(described)))
    require(again == value, f"its JSON {described} makes {again!r}, not {value!r}")
    require(hash(again) == hash(value), "equal ones have different hashes: options must be numbers, texts or tuples")


def pure(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, which must be the same every time, and must leave its arguments as they are."""
    before = pytree.tree_map_only(Tensor, torch.clone, arguments)
    first, second = function(*arguments), function(*arguments)
    require(equal(arguments, before), f"{what} changes its arguments; make new tensors")
    require(equal(first, second), f"{what} returns something else the second time")
    return first


def equal(one: Any, two: Any) -> bool:
    """Whether two nests of tensors have the same form, types and bits."""
    (leaves, form), (others, other_form) = pytree.tree_flatten(one), pytree.tree_flatten(two)
    return form == other_form and all(map(_alike, leaves, others))


def _alike(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return bool(one == two)
    same = one.dtype == two.dtype and one.shape == two.shape
    return same and bool((one.eq(two) | (one.isnan() & two.isnan())).all())


def traceable(what: str, function: Callable[..., Any], first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    """A function that was traced with some arguments computes with others what it does itself.

    Args:
        what: Its name.
        function: Takes and returns nests of tensors.
        first: Arguments for the trace.
        second: Others of the same shapes.
    """
    try:
        traced = make_fx(lambda *arguments: function(*arguments), tracing_mode="fake")(*first)
    except Exception as error:
        raise ContractError(
            f"{what} cannot be traced ({type(error).__name__}: {error}); what it does must not depend on values: "
            "torch.where in place of if, no .item()"
        ) from error
    wanted, found = (pytree.tree_leaves(result) for result in (function(*second), traced(*second)))
    for a, b in zip(wanted, found, strict=True):
        require(
            torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True),
            f"{what} computes other numbers once it is traced: a value was taken for a constant",
        )
