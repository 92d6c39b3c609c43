"""`Program`: a compiled program in memory or on disk, as `compile` and `load` return it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from mobizo_compiler.errors import InputError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.step.sites import Site, initial_state


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a training step measured.

    Args:
        loss: Mean loss of all lanes, before the update.
        lane_losses: float32 [lanes]: +1..+q, then -1..-q; for the one-sided estimator the clean lane, then +1..+q.
        projected_gradient: float32 [q].
        row_losses: float32 [lanes, rows], each the mean of a row's own losses, 0 where it has none; None unless the
            program was compiled with `ZOConfig(row_losses=True)`, and for steps of several ranks.
    """

    loss: float
    lane_losses: Tensor
    projected_gradient: Tensor
    row_losses: Tensor | None = None


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
        return initial_state(self.sites, self.lora_a_by_fqn, self.manifest.initial_memory())

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


@runtime_checkable
class Runner(Protocol):
    """A loaded program. All methods of one runner share one state."""

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run a method on contiguous CPU tensors, the state not among them; results stay valid after the next call."""

    def state(self) -> Tensor:
        """The flat state, float32 [P], as an alias: writing to it changes what the methods see.

        It shows what calls do to the state as long as it, or a view of it, is held.
        """


@runtime_checkable
class DeviceRunner(Runner, Protocol):
    """A runner whose state lies on a device, so that an alias in main memory costs copies there and back."""

    def live_state(self) -> Tensor:
        """The flat state, float32 [P], where methods change it, for reading: good until the next call."""


@runtime_checkable
class Artifact(Protocol):
    """A lowered program. Derive from this class."""

    @property
    def cannot_run(self) -> str | None:
        """Why it can be saved, but not run in this process; None if it can."""
        return None

    def runner(self) -> Runner:
        """Load the program, with its state at the initial value."""

    def exact_runner(self) -> Runner:
        """As `runner`, with switches of the engine off that round products; what a check compares with graphs."""
        return self.runner()

    def planned_bytes(self, method: str) -> int | None:
        """What the engine sets aside for the values of a call before it runs, in bytes; None if it plans nothing."""
        return None

    def save(self, path: Path) -> None:
        """Write the program to a file that appears whole or not at all."""
