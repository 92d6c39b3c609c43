"""Backends: what a compiled program runs on. One folder each; `contract.py` says what a backend must do.

Built-in backends and those of other packages are found the same way, by a string `"package.module:Class"`; other
packages put theirs into the entry-point group `mobizo_compiler.backends`. Listing names imports nothing.
"""

from __future__ import annotations

from typing import Any

from mobizo_compiler.backends.contract import MEMBERS, Backend
from mobizo_compiler.backends.plugin import Plugin
from mobizo_compiler.errors import BackendUnavailableError, UnknownBackendError
from mobizo_compiler.extensions import Registry
from mobizo_compiler.format.program import Artifact, DeviceRunner, Runner

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


class _Backends(Registry[Backend]):
    """A name means a class, or a function without arguments, that makes a backend."""

    def made(self, loaded: Any) -> Any:
        """The backend."""
        return loaded()

    def fault(self, loaded: Any) -> str | None:
        """What it lacks."""
        missing = [name for name in MEMBERS if not hasattr(loaded, name)]
        return f"it has no {', no '.join(missing)}" if missing else None


BACKENDS = _Backends(
    "backend",
    ENTRY_POINT_GROUP,
    Backend,  # type: ignore[type-abstract]
    BUILT_IN,
    page="docs/writing_a_backend.md",
    unknown=UnknownBackendError,
    unavailable=BackendUnavailableError,
)


def backend_names() -> dict[str, str]:
    """Every backend's name and the string it is loaded from; a name that several packages claim has all their strings.

    >>> "portable" in backend_names()
    True
    """
    return BACKENDS.names()


def get_backend(backend: str | Backend) -> Backend:
    """The backend of that name; an object that is a backend already is returned as it is.

    Raises:
        UnknownBackendError: There is none of that name, or two packages claim it.
        BackendUnavailableError: It cannot be loaded.
    """
    if isinstance(backend, str):
        loaded: Backend = BACKENDS.load(backend)
        return loaded if backend in BUILT_IN else Plugin(loaded, BACKENDS.names()[backend])
    if isinstance(backend, Backend) and not isinstance(backend, type):
        return backend
    raise UnknownBackendError(
        f"{backend!r} is neither the name of a backend nor a backend",
        hint=f"make one of it: {backend.__name__}()" if isinstance(backend, type) else None,
    )


def assert_backend_contract(backend: str | Backend) -> None:
    """The same as `mobizo_compiler.testing.check_backend`, under the name that older plugins know."""
    from mobizo_compiler.testing import check_backend

    check_backend(backend)


__all__ = [
    "BACKENDS",
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "Artifact",
    "Backend",
    "DeviceRunner",
    "Runner",
    "assert_backend_contract",
    "backend_names",
    "get_backend",
]
