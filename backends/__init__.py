"""Backends: what a compiled program runs on. One folder each; `contract.py` says what a backend must do.

Built-in backends and those of other packages are found the same way, by a string `"package.module:Class"`; other
packages put theirs into the entry-point group `mobizo_compiler.backends`. Listing names imports nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from mobizo_compiler.backends.contract import Artifact, Backend, Runner, assert_backend_contract
from mobizo_compiler.errors import BackendUnavailableError, UnknownBackendError

ENTRY_POINT_GROUP = "mobizo_compiler.backends"
BUILT_IN = {
    "eager": "mobizo_compiler.backends.eager:EagerBackend",
    "portable": "mobizo_compiler.backends.portable:PortableBackend",
    "xnnpack": "mobizo_compiler.backends.xnnpack:XnnpackBackend",
}


def backend_names() -> dict[str, str]:
    """Every backend's name and the string it is loaded from.

    Raises:
        UnknownBackendError: Two packages claim one name.

    >>> sorted(backend_names())[:3]
    ['eager', 'portable', 'xnnpack']
    """
    names = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in names and names[point.name] != point.value:
            raise UnknownBackendError(
                f"backend {point.name!r} is claimed by {names[point.name]!r} and by {point.value!r}",
                hint="uninstall one of the two packages",
            )
        names[point.name] = point.value
    return names


def get_backend(backend: str | Backend) -> Backend:
    """The backend of that name; an object that is a backend already is returned as it is.

    Raises:
        UnknownBackendError: There is none of that name.
        BackendUnavailableError: It cannot be loaded.
    """
    if not isinstance(backend, str):
        if isinstance(backend, Backend):
            return backend
        raise UnknownBackendError(f"{backend!r} is neither the name of a backend nor a backend")
    names = backend_names()
    if backend not in names:
        raise UnknownBackendError(f"there is no backend {backend!r}", hint=f"installed: {', '.join(sorted(names))}")
    module, _, attribute = names[backend].partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise BackendUnavailableError(f"backend {backend!r} ({names[backend]}) cannot be loaded: {error}") from error
    if not isinstance(loaded, Backend):
        raise BackendUnavailableError(f"{names[backend]} is not a backend", hint="see docs/writing_a_backend.md")
    return loaded


__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "Artifact",
    "Backend",
    "Runner",
    "assert_backend_contract",
    "backend_names",
    "get_backend",
]
