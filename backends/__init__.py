"""Backends: what a compiled program runs on. One folder each; `contract.py` says what a backend must do.

Built-in backends and those of other packages are found the same way, by a string `"package.module:Class"`; other
packages put theirs into the entry-point group `mobizo_compiler.backends`. Listing names imports nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from mobizo_compiler.backends.contract import MEMBERS, Backend
from mobizo_compiler.backends.plugin import Plugin
from mobizo_compiler.errors import BackendUnavailableError, UnknownBackendError
from mobizo_compiler.format.program import Artifact, Runner

ENTRY_POINT_GROUP = "mobizo_compiler.backends"
BUILT_IN = {
    "aot_inductor": "mobizo_compiler.backends.aot_inductor:AotInductorBackend",
    "aot_inductor_cuda": "mobizo_compiler.backends.aot_inductor:on_cuda",
    "cuda": "mobizo_compiler.backends.cuda:CudaBackend",
    "eager": "mobizo_compiler.backends.eager:EagerBackend",
    "portable": "mobizo_compiler.backends.portable:PortableBackend",
    "vulkan": "mobizo_compiler.backends.vulkan:VulkanBackend",
    "xnnpack": "mobizo_compiler.backends.xnnpack:XnnpackBackend",
}


def backend_names() -> dict[str, str]:
    """Every backend's name and the string it is loaded from; a name that several packages claim has all their strings.

    >>> "portable" in backend_names()
    True
    """
    return {name: " and ".join(origins) for name, origins in _claims().items()}


def _claims() -> dict[str, list[str]]:
    claims = {name: [origin] for name, origin in BUILT_IN.items()}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        origins = claims.setdefault(point.name, [])
        if point.value not in origins:
            origins.append(point.value)
    return claims


def get_backend(backend: str | Backend) -> Backend:
    """The backend of that name; an object that is a backend already is returned as it is.

    Raises:
        UnknownBackendError: There is none of that name, or two packages claim it.
        BackendUnavailableError: It cannot be loaded.
    """
    if not isinstance(backend, str):
        if isinstance(backend, Backend):
            return backend
        raise UnknownBackendError(f"{backend!r} is neither the name of a backend nor a backend")
    claims = _claims()
    if backend not in claims:
        raise UnknownBackendError(f"there is no backend {backend!r}", hint=f"installed: {', '.join(sorted(claims))}")
    if len(claims[backend]) > 1:
        raise UnknownBackendError(
            f"backend {backend!r} is claimed by {' and by '.join(map(repr, claims[backend]))}",
            hint="uninstall all but one of the packages",
        )
    (origin,) = claims[backend]
    module, _, attribute = origin.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)()
    except (Exception, SystemExit) as error:
        raise BackendUnavailableError(f"backend {backend!r} ({origin}) cannot be loaded: {error}") from error
    if missing := [name for name in MEMBERS if not hasattr(loaded, name)]:
        raise BackendUnavailableError(
            f"backend {backend!r} ({origin}) is not a backend: it has no {', no '.join(missing)}",
            hint="derive it from mobizo_compiler.backends.Backend; see docs/writing_a_backend.md",
        )
    return loaded if origin == BUILT_IN.get(backend) else Plugin(loaded, origin)


def assert_backend_contract(backend: str | Backend) -> None:
    """The same as `mobizo_compiler.testing.check_backend`, under the name that older plugins know."""
    from mobizo_compiler.testing import check_backend

    check_backend(backend)


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
