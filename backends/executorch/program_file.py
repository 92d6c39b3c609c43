"""A `.pte` file: reading it, and running it on the stock ExecuTorch runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.backends.executorch.delegates import missing_delegates
from mobizo_compiler.backends.executorch.engine_start import start_engine
from mobizo_compiler.backends.executorch.head import HEAD_BYTES, execution_plans, is_program, read_header
from mobizo_compiler.backends.executorch.runtime_options import shared_packed_weights
from mobizo_compiler.errors import ArtifactError, BackendUnavailableError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.files import ScratchFolder, copy_whole
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Artifact
from mobizo_compiler.graph.program import STATE
from mobizo_compiler.step.sites import Site
from mobizo_compiler.upstream import Runtime, member

MANIFEST_METHOD = "mobizo_manifest"
LORA_A_METHOD = "mobizo_lora_a"


@dataclasses.dataclass(frozen=True)
class Delegation:
    """What of a method runs inside delegates."""

    delegates: int
    outside: Mapping[str, int]


class ExecuTorchArtifact(Artifact):
    """A `.pte` file; it is mapped, not read, when it runs."""

    def __init__(self, path: Path, manifest: Manifest, delegation: Mapping[str, Delegation] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.delegation = delegation or {}

    @property
    def cannot_run(self) -> str | None:
        """Why this program can be saved, but not run in this process; None if it can."""
        missing = missing_delegates(self.path)
        return f"the ExecuTorch runtime here has no {' and no '.join(missing)}" if missing else None

    def runner(self) -> ExecuTorchRunner:
        """Load every method.

        Raises:
            BackendUnavailableError: The runtime lacks a delegate or kernel that the program needs.
        """
        if reason := self.cannot_run:
            raise BackendUnavailableError(
                reason,
                where=str(self.path),
                hint="run the program where the runtime was built with that backend, or load the backend's library "
                "into this process before",
            )
        return ExecuTorchRunner(self)

    def planned_bytes(self, method: str) -> int:
        """The arena of values, without what delegates set aside inside, and without the state."""
        (plan,) = (plan for plan in execution_plans(self.path) if plan.name == method)
        return int(plan.non_const_buffer_sizes[1])

    def save(self, path: Path) -> None:
        """Copy the file to a temporary name beside `path`, flush it, and rename it."""
        copy_whole(self.path, path)


class ExecuTorchRunner:
    """The methods of one file on the stock runtime, with their shared state."""

    def __init__(self, artifact: ExecuTorchArtifact) -> None:
        start_engine()
        self._artifact = artifact  # keeps a temporary file on disk
        self._passed = torch.zeros(artifact.manifest.state_size) if artifact.manifest.state == "io" else None
        with self._data_path() as data_path, shared_packed_weights():
            self._program = _load(artifact.path, data_path)
            # Every load resets the shared state, so all methods are loaded before any of them runs.
            self._methods = {name: self._load_method(name) for name in artifact.manifest.methods}

    @contextlib.contextmanager
    def _data_path(self) -> Iterator[Path | None]:
        """Where methods look up the initial state while they load: a file of zeros, for a session sets it itself."""
        if self._artifact.manifest.state != "data":
            yield None
            return
        with ScratchFolder() as folder:
            from mobizo_compiler.format import data_file  # brings ExecuTorch's exporter

            path = folder.path / "state.ptd"
            path.write_bytes(data_file.packed(torch.zeros(self._artifact.manifest.state_size)))
            yield path

    def _load_method(self, name: str) -> Any:
        try:
            method = self._program.load_method(name)
        except Exception as error:
            raise BackendUnavailableError(
                f"the runtime on this machine cannot load method {name!r}: {error}",
                where=str(self._artifact.path),
                hint="a kernel or delegate that the program needs is not registered in this runtime",
            ) from error
        return method

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run one method."""
        if self._passed is None or method == "prefix":
            return list(self._methods[method].execute(list(inputs)))
        results = list(self._methods[method].execute([*inputs, self._passed]))
        if method in ("train_step", "replay"):
            self._passed.copy_(results.pop())
        return results

    def state(self) -> Tensor:
        """The live state."""
        if self._passed is not None:
            return self._passed
        alias: Tensor = member(self._methods["train_step"], "_method").get_attribute(STATE)
        return alias


def is_executorch(path: Path) -> bool:
    """Whether a file begins as a program of ExecuTorch does."""
    with path.open("rb") as file:
        return file.read(6)[4:] == b"ET"


def read_program_file(path: Path, verify: bool) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and A of a program file, without loading the network.

    Raises:
        ArtifactError: It is truncated, damaged or foreign.
    """
    _check_file(path)
    if verify:
        checksum.check(path)
    program = _load(path)
    if MANIFEST_METHOD not in program.method_names:
        raise ArtifactError(
            f"this is an ExecuTorch program, but not one of this compiler: its methods are "
            f"{sorted(program.method_names)}",
            where=str(path),
            hint="compile the model with mobizo_compiler.compile",
        )
    try:
        text = program.load_method(MANIFEST_METHOD).execute([])[0]
        flat = program.load_method(LORA_A_METHOD).execute([])[0].clone()
    except Exception as error:
        raise ArtifactError(f"the manifest cannot be read: {error}", where=str(path)) from error
    manifest = Manifest.from_json(text, str(path))
    return manifest, _split_lora_a(manifest.sites, flat)


def _split_lora_a(sites: Sequence[Site], flat: Tensor) -> dict[str, Tensor]:
    parts = torch.split(flat, [math.prod(site.a_shape) for site in sites])
    return {site.fqn: part.reshape(site.a_shape) for site, part in zip(sites, parts, strict=True)}


def _load(path: Path, data_path: Path | None = None) -> Any:
    try:
        return Runtime.get().load_program(path, data_path=data_path)
    except Exception as error:
        raise ArtifactError(f"the ExecuTorch runtime cannot load this file: {error}", where=str(path)) from error


def _check_file(path: Path) -> None:
    """Compare the file's length with what its header says, so that a truncated file is never mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not is_program(head):
        raise ArtifactError("this is not an ExecuTorch program", where=str(path))
    header = read_header(head)
    if header is None:
        raise ArtifactError(
            "this ExecuTorch program has no extended header, so it is not of this compiler", where=str(path)
        )
    expected = max(header.program_size, header.segment_base_offset + header.segment_data_size)
    if size < expected:
        raise ArtifactError(
            f"the file is truncated: it has {size} bytes, its header says {expected}",
            where=str(path),
            hint="copy it again, or compile the model again",
        )
