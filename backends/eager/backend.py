"""Runs the rewritten graph operator by operator in PyTorch, without lowering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.eager import EAGER, EagerArtifact
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram


class EagerBackend(Backend):
    """The comparison point; also the quickest way to try a model."""

    name = EAGER
    caches = True
    suffix = None

    def unavailable(self) -> None:
        """It comes with the packages that this one needs."""

    def unsupported(self, program: GraphProgram) -> list[str]:
        """PyTorch runs every graph."""
        return []

    def passes(self) -> Sequence[Pass]:
        """None."""
        return ()

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> EagerArtifact:
        """Keep the graphs."""
        return EagerArtifact(dict(methods))
