"""What the backends have in common whose programs are `.pte` files on the stock ExecuTorch runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from mobizo_compiler.backends import get_backend
from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.backends.executorch.program_file import ExecuTorchArtifact, is_executorch, read_program_file
from mobizo_compiler.errors import BackendUnavailableError, UnknownBackendError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Program


@runtime_checkable
class ExecuTorchBackend(Backend, Protocol):
    """A backend that lowers by `lower_to_executorch`. Each of them reads the files of all."""

    data_files: bool = True
    suffix: str | None = ".pte"

    def reads(self, path: Path) -> bool:
        """Whether it is a program of ExecuTorch."""
        return is_executorch(path)

    def load(self, path: Path, verify: bool) -> Program:
        """The program, with the artifact of the backend that wrote it, if that is installed."""
        manifest, lora_a = read_program_file(path, verify)
        return Program(manifest, _writer(manifest, self).artifact(path, manifest, verify), lora_a)

    def artifact(self, path: Path, manifest: Manifest, verify: bool) -> ExecuTorchArtifact:
        """What runs a file of this backend. `verify` asks for a check of further files that belong to it."""
        return ExecuTorchArtifact(path, manifest)


def _writer(manifest: Manifest, reader: ExecuTorchBackend) -> ExecuTorchBackend:
    if manifest.backend == reader.name:
        return reader
    try:
        backend = get_backend(manifest.backend)
    except (UnknownBackendError, BackendUnavailableError):
        return reader  # the runtime may have what the program needs; it says so if not
    return backend if isinstance(backend, ExecuTorchBackend) else reader
