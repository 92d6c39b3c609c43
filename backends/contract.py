"""What a backend must do, as a protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from mobizo_compiler.errors import NotSupportedYetError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Artifact, Program
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram


@runtime_checkable
class Backend(Protocol):
    """A way to run programs. Instances hold no state.

    Derive from this class: what is not abstract here has a default. `testing.check_backend` checks the rest.
    """

    data_files: bool = False
    """Whether its programs can look up their initial state in a data file (`state="data"`)."""

    caches: bool = False
    """Whether a method of its programs can keep what only it reads from one call to the next (`generate`)."""

    suffix: str | None = ".pte"
    """Ending of the names of its program files; None if it has no file format."""

    @property
    def name(self) -> str:
        """The name in `compile(..., backend=name)`."""

    def unavailable(self) -> str | None:
        """Why nothing can be lowered by this backend, or run, on this machine; None if it can. Raises nothing."""
        return None

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Why this backend cannot run the program: one reason per node, empty if it can. Raises nothing."""
        return []

    def passes(self) -> Sequence[Pass]:
        """The backend's own rewrites, run after the common ones, by the same pipeline."""
        return ()

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> Artifact:
        """Lower static programs that share one state."""

    def reads(self, path: Path) -> bool:
        """Whether a file begins as those of this backend do. Raises nothing, and reads no more than the beginning."""
        return False

    def load(self, path: Path, verify: bool) -> Program:
        """The program in a file that this backend `reads`, without loading the network.

        Args:
            path: The file.
            verify: Whether to compare the whole file with its checksum first.

        Raises:
            ArtifactError: The file is truncated, damaged or foreign.
        """
        raise NotSupportedYetError(f"backend {self.name!r} has no file format", where=str(path))


MEMBERS = ("name", "unavailable", "unsupported", "passes", "lower", "reads", "load", "data_files", "caches", "suffix")
