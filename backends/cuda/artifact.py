"""A program whose weights lie in a second file beside it: `.pte` and `.ptd`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import Partitioner

from mobizo_compiler.backends.executorch.emit import emit
from mobizo_compiler.backends.executorch.lower import delegation_of, explained
from mobizo_compiler.backends.executorch.program_file import (
    LORA_A_METHOD,
    MANIFEST_METHOD,
    ExecuTorchArtifact,
    ExecuTorchRunner,
)
from mobizo_compiler.errors import ArtifactError, BackendUnavailableError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.files import ScratchFolder, copy_whole
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.upstream import Runtime

BLOB = "aoti_cuda_blob.ptd"  # what the delegate calls the file of its weights


def write_program(
    methods: Mapping[str, GraphProgram], manifest: Manifest, partitioners: Mapping[str, Sequence[Partitioner]]
) -> CudaArtifact:
    """Lower programs whose state is passed in and out into two files in a temporary folder.

    Raises:
        LoweringError: The delegate cannot compile a method.
    """
    lora_a = torch.cat([methods["train_step"].lora_a[site.fqn].flatten() for site in manifest.sites])
    with explained(methods, manifest.backend):
        edge = to_edge_transform_and_lower(
            {name: program.exported for name, program in methods.items()},
            partitioner={name: list(inner) for name, inner in partitioners.items()},
            constant_methods={MANIFEST_METHOD: manifest.to_json(), LORA_A_METHOD: lora_a},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        delegation = {name: delegation_of(edge.exported_program(name)) for name in methods}
        executable = emit(edge, ExecutorchBackendConfig(), manifest.state)
    folder = ScratchFolder()
    path = folder.path / "program.pte"
    with path.open("wb") as file:
        executable.write_to_file(file)
    executable.write_tensor_data_to_file(str(folder.path))
    (folder.path / BLOB).rename(data_path(path))
    checksum.seal(data_path(path))
    artifact = CudaArtifact(path, manifest, delegation)
    weakref.finalize(artifact, folder.remove)
    return artifact


def data_path(path: Path) -> Path:
    """Where the weights of a program file are: beside it, with the suffix `.ptd`."""
    return path.with_suffix(".ptd")


class CudaArtifact(ExecuTorchArtifact):
    """A `.pte` file with a `.ptd` file beside it."""

    def check_weights(self) -> None:
        """Compare the file of the weights with its checksum; one that is missing is missed when the program runs.

        Raises:
            ArtifactError: It is damaged.
        """
        if data_path(self.path).is_file():
            checksum.check(data_path(self.path))

    def runner(self) -> CudaRunner:
        """Load every method.

        Raises:
            ArtifactError: The file of the weights is missing.
            BackendUnavailableError: The runtime lacks the delegate.
        """
        if not data_path(self.path).is_file():
            raise ArtifactError(
                f"the weights of this program, {data_path(self.path).name}, are not beside it", where=str(self.path)
            )
        if reason := self.cannot_run:
            raise BackendUnavailableError(
                reason, where=str(self.path), hint="install an ExecuTorch runtime that was built with its CUDA delegate"
            )
        return CudaRunner(self)

    def save(self, path: Path) -> None:
        """Write both files, each whole or not at all; the program last, so that it never stands without its weights."""
        if path.suffix == ".ptd":
            raise ArtifactError("the suffix .ptd is that of the weights beside the program", where=str(path))
        copy_whole(data_path(self.path), data_path(path))
        copy_whole(self.path, path)


class CudaRunner(ExecuTorchRunner):
    """The methods of a program whose weights are in a second file."""

    def __init__(self, artifact: CudaArtifact) -> None:
        self._artifact = artifact
        try:
            self._program: Any = Runtime.get().load_program(artifact.path, data_path=data_path(artifact.path))
        except Exception as error:
            raise ArtifactError(
                f"the ExecuTorch runtime cannot load this program and its weights: {error}", where=str(artifact.path)
            ) from error
        self._passed = torch.zeros(artifact.manifest.state_size)
        self._methods = {name: self._load_method(name) for name in artifact.manifest.methods}
