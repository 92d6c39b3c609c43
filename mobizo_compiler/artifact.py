"""`Program`: a compiled program in memory or on disk, as `compile` and `load` return it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from mobizo_compiler.backends.contract import Artifact
from mobizo_compiler.errors import InputError
from mobizo_compiler.manifest import Manifest
from mobizo_compiler.program import GraphProgram, Site, initial_state


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a training step measured.

    Args:
        loss: Mean loss of all lanes, before the update.
        lane_losses: float32 [lanes]: +1..+q, then -1..-q; for the one-sided estimator the clean lane, then +1..+q.
        projected_gradient: float32 [q].
    """

    loss: float
    lane_losses: Tensor
    projected_gradient: Tensor


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Args:
        manifest: What the program says about itself.
        artifact: What the backend made.
        lora_a_by_fqn: A of every site, float32 [r, in_features], not scaled.
        methods: The graphs it was lowered from; empty for a program loaded from a file.
    """

    manifest: Manifest
    artifact: Artifact
    lora_a_by_fqn: Mapping[str, Tensor]
    methods: Mapping[str, GraphProgram] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted layers, in the order of their offsets."""
        return self.manifest.sites

    @property
    def parameters(self) -> int:
        """Number P of trained parameters."""
        return self.manifest.parameters

    def initial_state(self) -> Tensor:
        """The flat state before the first step, float32 [S]."""
        return initial_state(self.sites, self.lora_a_by_fqn, self.manifest.memory)

    def site(self, fqn: str) -> Site:
        """The site at that path.

        Raises:
            InputError: There is none.
        """
        for site in self.sites:
            if site.fqn == fqn:
                return site
        raise InputError(f"there is no site {fqn!r}", hint=f"sites: {', '.join(s.fqn for s in self.sites)}")

    def lora_a(self, fqn: str) -> Tensor:
        """A of one site, float32 [r, in_features]; B of the site is [r, out_features].

        Raises:
            InputError: There is no site at that path.
        """
        return self.lora_a_by_fqn[self.site(fqn).fqn].clone()

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the program to one file and return its path. The file appears whole or not at all."""
        target = Path(path)
        self.artifact.save(target)
        return target
