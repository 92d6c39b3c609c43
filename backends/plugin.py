"""Backends of other packages, kept from harming anything but themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.errors import BackendUnavailableError, LoweringError, MobizoError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Artifact
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram


class Plugin:
    """A backend of another package: what it breaks of the contract is an error that names it.

    Args:
        inner: The backend.
        origin: The string that it was loaded from.
    """

    def __init__(self, inner: Backend, origin: str) -> None:
        self.inner = inner
        self.origin = origin

    def __getattr__(self, name: str) -> Any:
        """What the backend has beyond the contract."""
        return getattr(self.inner, name)

    @property
    def name(self) -> str:
        """As the backend says."""
        return self.inner.name

    def unavailable(self) -> str | None:
        """As the backend says; a backend that cannot even say it is not available."""
        try:
            reason = self.inner.unavailable()
        except Exception as error:
            return f"its plugin ({self.origin}) is broken: unavailable() raised {type(error).__name__}: {error}"
        return None if reason is None else str(reason)

    def unsupported(self, program: GraphProgram) -> list[str]:
        """As the backend says."""
        try:
            reasons = self.inner.unsupported(program)
        except Exception as error:
            self._broken(f"unsupported() raised {type(error).__name__}: {error}", error)
        if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
            self._broken(f"unsupported() returned {reasons!r}, not a list of strings")
        return reasons

    def passes(self) -> Sequence[Pass]:
        """As the backend says."""
        try:
            steps = tuple(self.inner.passes())
        except Exception as error:
            self._broken(f"passes() raised {type(error).__name__}: {error}", error)
        if foreign := [step for step in steps if not isinstance(step, Pass)]:
            self._broken(f"passes() returned {foreign[0]!r}, which is not a Pass")
        return steps

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> Artifact:
        """What the backend makes of the methods."""
        try:
            artifact = self.inner.lower(methods, manifest)
        except MobizoError:
            raise
        except Exception as error:
            raise LoweringError(
                f"backend {self.name!r} ({self.origin}) failed to lower this program: {type(error).__name__}: {error}",
                hint="report this to the authors of the backend",
            ) from error
        if not isinstance(artifact, Artifact):
            self._broken(f"lower() returned {artifact!r}, which is not an Artifact")
        return artifact

    def _broken(self, how: str, cause: Exception | None = None) -> NoReturn:
        raise BackendUnavailableError(
            f"the plugin of backend {self.name!r} ({self.origin}) is broken: {how}",
            hint="report this to the authors of the backend, who can check it with testing.check_backend",
        ) from cause
