"""Compiles the methods with AOTInductor into one package that PyTorch loads without Python code of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from mobizo_compiler import upstream
from mobizo_compiler.backends.aot_inductor.artifact import (
    AotInductorArtifact,
    Precision,
    Target,
    is_package,
    load_package_file,
    write_program,
)
from mobizo_compiler.backends.aot_inductor.noise_in_parts import NoiseInParts
from mobizo_compiler.backends.aot_inductor.round_products import RoundProducts
from mobizo_compiler.backends.aot_inductor.sums_in_order import SumsInOrder
from mobizo_compiler.backends.aot_inductor.tensors import DTYPES
from mobizo_compiler.backends.contract import Backend
from mobizo_compiler.backends.requirements import missing_for_cuda
from mobizo_compiler.backends.shared_passes.spell_out_quantization import SpellOutQuantization
from mobizo_compiler.errors import ConfigError, LoweringError
from mobizo_compiler.format.files import ScratchFolder
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Program
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass, Pipeline
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes.canonicalize import Canonicalize
from mobizo_compiler.quiet import quiet
from mobizo_compiler.upstream import FakeTensor, FakeTensorMode

NAME = "aot_inductor"
_PATH = "aot_inductor.output_path"
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")

OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,  # all methods read one set of weights, and change one state
    # Otherwise Inductor writes tensors of up to eight numbers, as the bias of a small head, into the code as numbers;
    # it is given none.
    "always_keep_tensor_constants": True,
    # Otherwise it reads the value of every tensor of one number, to write that out.
    "joint_graph_constant_folding": False,
    # Inductor writes an expression out again wherever it is used, up to so many operators. In the noise every value is
    # used twice by the next, so that 50, the default, makes a small graph take half a minute, and 10 takes a second.
    "realize_opcount_threshold": 10,
    # Otherwise the noise's products of a counter with a constant become index expressions of 64 bits, and do not wrap
    # around at 32 bits as the operators do: the words came out wrong wherever the shapes let Inductor vectorize them.
    "constant_and_index_propagation": False,
    # Otherwise Triton contracts products and sums into one rounding, in other places in train_step than in replay, and
    # replay differs from its step in the last bit.
    "emulate_precision_casts": True,
    "cpp.dynamic_threads": True,  # as many threads as the machine has that runs the program
}


# What is last, for every method: `replay` needs the same as the step.
LAST: tuple[Pass, ...] = (NoiseInParts(), SumsInOrder())


@dataclasses.dataclass(frozen=True)
class AotInductorBackend(Backend):
    """Machine code for one kind of processor, called through libtorch.

    Args:
        device: "cpu", "cuda" (the first GPU), or "cuda:1" and so on.
        precision: What products compute in; everything else, noise, norms, losses, update and state among it, is
            float32. "float32"; "bfloat16": weights are stored, and factors of products rounded, in 16 bits, those of
            adapters and of attention too; "tf32", on a GPU: factors are rounded to 10 bits of mantissa.
        cuda_graph: Launch a call as one CUDA graph, where sizes are fixed. It keeps what a call computes with in memory
            between calls.

    Raises:
        ConfigError: An option has another value, or the device cannot do it.
    """

    device: str = "cpu"
    precision: Precision = "float32"
    cuda_graph: bool = True
    suffix = ".pt2"

    def __post_init__(self) -> None:
        if re.fullmatch(r"cpu|cuda(:\d+)?", str(self.device)) is None:
            raise ConfigError(
                f"AotInductorBackend.device is {self.device!r}", hint='use "cpu", "cuda", or "cuda:1" and so on'
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"AotInductorBackend.precision is {self.precision!r}", hint=f"use one of {', '.join(PRECISIONS)}"
            )
        if self.precision == "tf32" and not self.on_gpu:
            raise ConfigError("only GPUs multiply in tf32", hint='use precision="bfloat16", or device="cuda"')
        if self.device == "cuda":  # a device without an index is another one than that of its tensors
            object.__setattr__(self, "device", "cuda:0")

    @property
    def on_gpu(self) -> bool:
        """Whether the program runs on a GPU."""
        return self.device != "cpu"

    @property
    def name(self) -> str:
        """One for each kind of device; caches go by the options as well."""
        return NAME + ("_cuda" if self.on_gpu else "")

    def unavailable(self) -> str | None:
        """Without a C++ compiler nothing can be compiled; CUDA needs a GPU besides, for its kernels are tuned on it."""
        try:
            upstream.inductor_builder.get_cpp_compiler()
        except Exception:
            return "AOTInductor finds no C++ compiler: install g++ or clang++, or set the environment variable CXX"
        return missing_for_cuda(torch.device(self.device).index) if self.on_gpu else None

    def unsupported(self, program: GraphProgram) -> list[str]:
        """Weights of a dtype that the file format does not have."""
        storable = set(DTYPES.values())
        return [
            f"%{name}: {path} has dtype {tensor.dtype}, which safetensors files cannot hold"
            for name, (path, tensor) in program.tensors().items()
            if tensor.dtype not in storable
        ]

    def passes(self) -> Sequence[Pass]:
        """Quantized layers in plain operators, with 4-bit weights in 4 bits; products in the precision asked for."""
        rounding = (RoundProducts(),) if self.precision == "bfloat16" else ()
        return (SpellOutQuantization(), Canonicalize(), *rounding)

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> AotInductorArtifact:
        """Compile every method, and write the package with one copy of each weight.

        Raises:
            LoweringError: Inductor cannot compile a method.
        """
        target = Target.here(self.device, self.precision, self.cuda_graph)
        with ScratchFolder() as folder:
            package = self.compile(methods, folder.path)
            return write_program(package, methods, manifest, target)

    def reads(self, path: Path) -> bool:
        """Whether it is a zip archive, as a package is."""
        return is_package(path)

    def load(self, path: Path, verify: bool) -> Program:
        """The program; weights are mapped into memory when it runs."""
        return load_package_file(path, verify)

    def compile(
        self,
        methods: Mapping[str, GraphProgram],
        folder: Path,
        options: Mapping[str, Any] = OPTIONS,
        last: Sequence[Pass] = LAST,
    ) -> Path:
        """A package of AOTInductor with every method, without weights, in a folder.

        Raises:
            LoweringError: Inductor cannot compile a method.
        """
        files = {}
        for name, program in methods.items():
            files[name] = self._compile(name, Pipeline(last).run(program), {**options, _PATH: str(folder / name)})
        package = folder / "program.pt2"
        upstream.package_aoti(str(package), files)
        return package

    def _compile(self, name: str, program: GraphProgram, options: Mapping[str, Any]) -> list[Any]:
        """The shared library of one method, and what belongs to it."""
        try:
            with quiet(), torch.no_grad():
                exported = program_on(program, self.device)
                names = set(exported.graph_signature.user_inputs)
                inputs = tuple(node.meta["val"] for node in exported.graph.nodes if node.name in names)
                with _weights_without_values(inputs[0].fake_mode):
                    files: Any = upstream.aot_compile(
                        exported.module(check_guards=False),
                        inputs,
                        options=dict(options),
                    )
        except Exception as error:
            raise LoweringError(
                f"AOTInductor cannot compile method {name!r} for {self.device}: {error}",
                hint="the message above is Inductor's; MOBIZO_DUMP=folder writes the program it was given",
            ) from error
        return packed(files)


def packed(files: Sequence[Any]) -> list[Any]:
    """What of Inductor's files a program needs: the library, what describes it, and the kernels of a GPU (`.cubin`).

    The library loads its kernels by name from beside it. Source code stays out.
    """
    return [file for file in files if not (isinstance(file, str) and file.endswith(".cpp"))]


def on_cuda() -> AotInductorBackend:
    """The backend named "aot_inductor_cuda"."""
    return AotInductorBackend("cuda")


def program_on(program: GraphProgram, device: str) -> ExportedProgram:
    """A copy of the graph on a device, with tensors that have a shape alone, contiguous as the weights in the file are.

    The compiler needs no weights, and so they are neither copied nor moved.
    """
    exported = Editor(program).finish(program.facts, program.history).exported
    mode = next(node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder").fake_mode
    for tensors in (exported.state_dict, exported.constants):
        for path, tensor in tensors.items():
            with mode:
                fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            whole = isinstance(tensor, torch.nn.Parameter)
            tensors[path] = torch.nn.Parameter(fake, requires_grad=False) if whole else fake
    if device == "cpu":
        return exported
    _name_devices(exported)
    moved = move_to_device_pass(exported, device)
    moved.graph_module.recompile()  # the pass changes the devices in the graph, not in its code
    return moved


def _name_devices(exported: ExportedProgram) -> None:
    """Give every call that makes a tensor out of none a device; the move changes those that are named."""
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or any(isinstance(source.meta.get("val"), Tensor) for source in node.all_input_nodes):
            continue
        if any(argument.name == "device" for argument in schema.arguments) and node.kwargs.get("device") is None:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}


@contextlib.contextmanager
def _weights_without_values(mode: FakeTensorMode) -> Iterator[None]:
    """In this block Inductor takes weights that have no values, and takes no two of them for the same."""
    graph: Any = upstream.inductor_graph
    before, same = mode.allow_non_fake_inputs, graph.is_same_tensor

    def is_same(one: Tensor, other: Tensor) -> bool:  # it compares addresses of memory, which are 0
        fake = isinstance(one, FakeTensor) or isinstance(other, FakeTensor)
        return one is other if fake else same(one, other)

    mode.allow_non_fake_inputs, graph.is_same_tensor = True, is_same
    try:
        yield
    finally:
        mode.allow_non_fake_inputs, graph.is_same_tensor = before, same
