"""Compiles the methods with AOTInductor into one package that PyTorch loads without Python code of a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from mobizo_compiler import upstream
from mobizo_compiler.backends.aot_inductor.artifact import (
    AotInductorArtifact,
    Target,
    is_package,
    load_package_file,
    write_program,
)
from mobizo_compiler.backends.aot_inductor.tensors import DTYPES
from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.backends.requirements import missing_for_cuda
from mobizo_compiler.backends.shared_passes.spell_out_quantization import SpellOutQuantization
from mobizo_compiler.errors import ConfigError, LoweringError
from mobizo_compiler.format.files import ScratchFolder
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Program
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.quiet import quiet
from mobizo_compiler.upstream import FakeTensorMode, package_aoti

OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,  # all methods read one set of weights, and change one state
    # Inductor writes an expression out again wherever it is used, up to so many operators. In the noise every value is
    # used twice by the next, so that 50, the default, makes a small graph take half a minute, and 10 takes a second.
    "realize_opcount_threshold": 10,
    # Otherwise the noise's products of a counter with a constant become index expressions of 64 bits, and do not wrap
    # around at 32 bits as the operators do: the words came out wrong wherever the shapes let Inductor vectorize them.
    "constant_and_index_propagation": False,
    "cpp.dynamic_threads": True,  # as many threads as the machine has that runs the program
}


@dataclasses.dataclass(frozen=True)
class AotInductorBackend(Backend):
    """Machine code for one kind of processor, called through libtorch.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ConfigError: The device is another one.
    """

    device: str = "cpu"
    suffix = ".pt2"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"AotInductorBackend.device is {self.device!r}", hint='use "cpu" or "cuda"')

    @property
    def name(self) -> str:
        """One for each device, because programs differ and caches go by the name."""
        return "aot_inductor" if self.device == "cpu" else f"aot_inductor_{self.device}"

    def unavailable(self) -> str | None:
        """Without a C++ compiler nothing can be compiled; CUDA needs a GPU besides, for its kernels are tuned on it."""
        try:
            upstream.inductor_builder.get_cpp_compiler()
        except Exception:
            return "AOTInductor finds no C++ compiler: install g++ or clang++, or set the environment variable CXX"
        return missing_for_cuda() if self.device == "cuda" else None

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Weights of a dtype that the file format does not have."""
        storable = set(DTYPES.values())
        return [
            f"%{name}: {path} has dtype {tensor.dtype}, which safetensors files cannot hold"
            for name, (path, tensor) in program.tensors().items()
            if tensor.dtype not in storable
        ]

    def passes(self) -> Sequence[Pass]:
        """Quantized layers in plain operators, with 4-bit weights in 4 bits; the rest is Inductor's."""
        return (SpellOutQuantization(), Canonicalize())

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> AotInductorArtifact:
        """Compile every method, and write the package with one copy of each weight.

        Raises:
            LoweringError: Inductor cannot compile a method.
        """
        target = Target.here(self.device)
        with ScratchFolder() as folder:
            files = {name: self._compile(name, program, folder.path) for name, program in methods.items()}
            package = folder.path / "program.pt2"
            package_aoti(str(package), files)
            return write_program(package, methods, manifest, target)

    def reads(self, path: Path) -> bool:
        """Whether it is a zip archive, as a package is."""
        return is_package(path)

    def load(self, path: Path, verify: bool) -> Program:
        """The program; weights are mapped into memory when it runs."""
        return load_package_file(path, verify)

    def _compile(self, name: str, program: GraphProgram, folder: Path) -> list[Any]:
        """The shared library of one method, and the file that describes it."""
        try:
            with quiet(), torch.no_grad():
                exported = program_on(program, self.device)
                names = set(exported.graph_signature.user_inputs)
                inputs = tuple(node.meta["val"] for node in exported.graph.nodes if node.name in names)
                # The weights of a module are real tensors among fake ones, which the mode of our graphs refuses.
                with _real_among_fake(inputs[0].fake_mode):
                    files: Any = upstream.aot_compile(
                        exported.module(check_guards=False),
                        inputs,
                        options={**OPTIONS, "aot_inductor.output_path": str(folder / name)},
                    )
        except Exception as error:
            raise LoweringError(
                f"AOTInductor cannot compile method {name!r} for {self.device}: {error}",
                hint="the message above is Inductor's; MOBIZO_DUMP=folder writes the program it was given",
            ) from error
        return [file for file in files if file.endswith((".so", ".json"))]


def on_cuda() -> AotInductorBackend:
    """The backend named "aot_inductor_cuda"."""
    return AotInductorBackend("cuda")


def program_on(program: GraphProgram, device: str) -> ExportedProgram:
    """A copy of the graph with its tensors on a device, and contiguous, as the weights in the file are."""
    exported = Editor(program).finish(program.facts, program.history).exported
    for tensors in (exported.state_dict, exported.constants):
        for path, tensor in tensors.items():
            if isinstance(tensor, torch.nn.Parameter):
                tensors[path] = torch.nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
            else:
                tensors[path] = tensor.contiguous()
    if device == "cpu":
        return exported
    moved = move_to_device_pass(exported, device)
    moved.graph_module.recompile()  # the pass changes the devices in the graph, not in its code
    return moved


@contextlib.contextmanager
def _real_among_fake(mode: FakeTensorMode) -> Iterator[None]:
    """Let a fake tensor mode take real tensors, in this block."""
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before
