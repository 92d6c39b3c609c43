"""The program file of this backend, and how it is run.

The file is a package of AOTInductor (a zip archive, `.pt2`) with one shared library a method, and entries of our own:

    mobizo/manifest.json         what the program says about itself
    mobizo/target.json           what it was compiled for, and the weight behind each constant of each method
    mobizo/weights.safetensors   every weight once, and A of every adapter

Nothing in it is a pickle. The entries are not compressed, so weights are mapped into memory, not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import platform
import shutil
import warnings
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mobizo_compiler.backends.aot_inductor.device_state import DeviceState
from mobizo_compiler.backends.aot_inductor.tensors import map_tensors, write_tensors
from mobizo_compiler.errors import ArtifactError, BackendUnavailableError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.files import ScratchFolder, copy_whole, raw_bytes
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Artifact, Program
from mobizo_compiler.graph.program import STATE, GraphProgram
from mobizo_compiler.upstream import PackageLoader

Precision = Literal["float32", "tf32", "bfloat16"]
MAGIC = b"PK\x03\x04"
MANIFEST, TARGET, WEIGHTS = "mobizo/manifest.json", "mobizo/target.json", "mobizo/weights.safetensors"
LORA_A = "mobizo_lora_a."
_VECTORS = ("DEFAULT", "AVX2", "AVX512")  # of x86 processors, as PyTorch names them


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program was compiled for.

    Args:
        device: "cpu", or a GPU with its index, as "cuda:0".
        machine: Architecture of the processor.
        vectors: Its vector instructions, as PyTorch names them.
        gpu: Compute capability of the GPU; empty without one.
        precision: What products with frozen weights compute in.
        cuda_graph: Whether a call is launched as one CUDA graph.
    """

    device: str
    machine: str
    vectors: str
    gpu: str = ""
    precision: Precision = "float32"
    cuda_graph: bool = True

    @classmethod
    def here(cls, device: str, precision: Precision = "float32", cuda_graph: bool = True) -> Target:
        """This machine."""
        index = torch.device(device).index
        seen = device != "cpu" and torch.cuda.is_available() and index < torch.cuda.device_count()
        gpu = ".".join(map(str, torch.cuda.get_device_capability(index))) if seen else ""
        vectors = torch.backends.cpu.get_cpu_capability()
        return cls(device, platform.machine(), vectors, gpu, precision, cuda_graph)

    def cannot_run(self) -> str | None:
        """Why a program for this target cannot run on this machine; None if it can."""
        here = Target.here(self.device)
        if self.machine != here.machine:
            return f"it was compiled for {self.machine}, this machine is {here.machine}"
        if {self.vectors, here.vectors} <= set(_VECTORS) and _VECTORS.index(self.vectors) > _VECTORS.index(
            here.vectors
        ):
            return f"it was compiled for processors with {self.vectors}, PyTorch finds {here.vectors} here"
        if self.device != "cpu" and not here.gpu:
            return f"it was compiled for a GPU, {self.device}, and PyTorch sees none of that index here"
        if self.gpu != here.gpu:  # also within a generation: a kernel for 8.6 does not run on 8.0
            return f"it was compiled for GPUs of compute capability {self.gpu}, this one has {here.gpu}"
        return None


def write_program(
    package: Path, methods: Mapping[str, GraphProgram], manifest: Manifest, target: Target
) -> AotInductorArtifact:
    """Copy a package of AOTInductor to a temporary folder of its own, and add the weights and the manifest."""
    keys, weights = _weights(methods)
    lora_a = {LORA_A + site.fqn: methods["train_step"].lora_a[site.fqn] for site in manifest.sites}
    folder = ScratchFolder()
    path = folder.path / package.name
    shutil.move(package, path)
    described = {**dataclasses.asdict(target), "weights": keys}
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{MANIFEST}", manifest.to_json())
        archive.writestr(f"{root}/{TARGET}", json.dumps(described, sort_keys=True))
        with archive.open(f"{root}/{WEIGHTS}", "w", force_zip64=True) as entry:
            assert archive.fp is not None
            write_tensors(entry, {**weights, **lora_a}, archive.fp.tell())
        archive.comment = checksum.PLACEHOLDER
    checksum.seal(path)
    artifact = AotInductorArtifact(path, manifest, target, keys)
    weakref.finalize(artifact, folder.remove)
    return artifact


def _weights(methods: Mapping[str, GraphProgram]) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """For each method the key of each of its constants, and the weights by key: equal ones have one key."""
    keys: dict[str, dict[str, str]] = {}
    weights: dict[str, Tensor] = {}
    by_content: dict[str, str] = {}
    for method, program in methods.items():
        keys[method] = {}
        for path, tensor in program.tensors().values():
            if path == STATE:
                continue
            content = _content(tensor)
            if content not in by_content:
                by_content[content] = path if path not in weights else f"{method}.{path}"
                weights[by_content[content]] = tensor
            keys[method][path] = by_content[content]
    return keys, weights


def _content(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw_bytes(tensor)).hexdigest()}"


class AotInductorArtifact(Artifact):
    """A package on disk.

    Args:
        path: Where it is.
        manifest: What it says about itself.
        target: What it was compiled for.
        keys: For each method, the weight behind each of its constants.
    """

    def __init__(self, path: Path, manifest: Manifest, target: Target, keys: Mapping[str, Mapping[str, str]]) -> None:
        self.path = path
        self.manifest = manifest
        self.target = target
        self.keys = keys

    def runner(self) -> AotInductorRunner:
        """Load every method.

        Raises:
            BackendUnavailableError: The program was compiled for another kind of machine.
        """
        return self._runner(self.target)

    def exact_runner(self) -> AotInductorRunner:
        """The same, with a switch of the GPU that rounds float32 off: what a check of the code compares with graphs."""
        precision: Precision = "float32" if self.target.precision == "tf32" else self.target.precision
        return self._runner(dataclasses.replace(self.target, precision=precision))

    def _runner(self, target: Target) -> AotInductorRunner:
        if reason := target.cannot_run():
            raise BackendUnavailableError(
                f"this program cannot run on this machine: {reason}",
                where=str(self.path),
                hint="compile the model again on a machine of this kind",
            )
        runner = AotInductorRunner(self.path, self.manifest, target, self.keys, _map_weights(self.path))
        runner.keeps = self
        return runner

    def save(self, path: Path) -> None:
        """Copy the file."""
        copy_whole(self.path, path)


class AotInductorRunner:
    """The methods of one package, which all read the same weights and the same state.

    On a GPU weights and state stay there. With a CUDA graph, the second call of a method records what it launches, and
    later calls launch that at once: a small model is bound by launching hundreds of kernels one by one otherwise.

    Args:
        path: The package.
        manifest: What the program says about itself.
        target: What it was compiled for.
        keys: For each method, the weight behind each of its constants.
        weights: The weights, on any device.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        target: Target,
        keys: Mapping[str, Mapping[str, str]],
        weights: Mapping[str, Tensor],
    ) -> None:
        self.keeps: object = None  # what must live as long: a temporary file on disk
        self._path, self._keys = path, keys
        self._device = torch.device(target.device)
        self._on_gpu = self._device.type == "cuda"
        self._tf32 = target.precision == "tf32"
        self._passed = manifest.state == "io"
        self._state = DeviceState.zeros(manifest.state_size, self._device)
        # The libraries keep addresses, not references, so the tensors must live as long as the methods.
        self._weights = {name: value.to(self._device) for name, value in weights.items()}
        if self._on_gpu:
            copies = [value for name, value in self._weights.items() if value is not weights[name]]
            weakref.finalize(self, release, [*copies, self._state.live]).atexit = False
        self._methods = {name: self._load(name) for name in keys}
        graphs = self._on_gpu and target.cuda_graph and not manifest.sizes
        self._graphs = {name: _CudaGraph(name, method) for name, method in self._methods.items()} if graphs else {}

    def _load(self, name: str) -> Any:
        path = str(self._path)
        index = self._device.index if self._on_gpu else -1
        try:
            # Not `aoti_load_package` of Inductor: it reads every entry of the archive, and looks for a compiler.
            # A CUDA graph can only be recorded from a model that waits for no other thread.
            method = PackageLoader(path, name, self._on_gpu, 1, index)
            names = method.get_constant_fqns()
        except Exception as error:
            raise ArtifactError(f"method {name!r} cannot be loaded: {error}", where=path) from error
        keys = self._keys[name]
        missing = [fqn for fqn in names if fqn != STATE and keys.get(fqn) not in self._weights]
        if missing:
            raise ArtifactError(f"method {name!r} needs weights that are not in the file: {missing}", where=path)
        constants = {fqn: self._state.live if fqn == STATE else self._weights[keys[fqn]] for fqn in names}
        in_second_buffer, all_of_them, by_address = False, True, True
        method.load_constants(constants, in_second_buffer, all_of_them, by_address)
        return method

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run one method."""
        return [result.cpu() for result in self.launch(method, inputs)]

    def launch(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As `call`, but results stay on the device, are not waited for, and are good until the next call only."""
        changes = method in ("train_step", "replay")
        self._state.before_call()
        passed = [self._state.live] if self._passed and method != "prefix" else []
        run = self._graphs.get(method) or self._methods[method].boxed_run
        with self._ready():
            results = list(run([*(value.to(self._device) for value in inputs), *passed]))
            if self._passed and changes:
                self._state.live.copy_(results.pop())
        if changes:
            self._state.after_change()
        return results

    def state(self) -> Tensor:
        """The state, in main memory."""
        return self._state.alias()

    def live_state(self) -> Tensor:
        """The state, on the device."""
        return self._state.current()

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """The program's GPU, and the precision of products that it was compiled with, whatever the process has."""
        if not self._on_gpu:
            yield
            return
        with torch.cuda.device(self._device), _rounded_products(self._tf32):
            yield


@contextlib.contextmanager
def _rounded_products(tf32: bool) -> Iterator[None]:
    """Whether float32 products of a GPU are rounded to tf32, in this block; PyTorch has an old and a new switch."""
    products = torch.backends.cuda.matmul
    new = products.fp32_precision
    try:
        old = products.allow_tf32
    except RuntimeError:  # where a process has used both, the old one cannot be read
        old = new == "tf32"
    products.allow_tf32 = tf32  # sets both
    try:
        yield
    finally:
        products.allow_tf32 = old
        products.fp32_precision = new


def release(tensors: Sequence[Tensor]) -> None:
    """Give the memory of tensors back, whoever still refers to them.

    PyTorch's loader never lets go of the tensors that a method was given by address, so that the weights of every
    session would stay on the GPU until the process ends.
    """
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


class _CudaGraph:
    """A method as one launch, with inputs and results at fixed places.

    Args:
        name: Of the method.
        method: What runs it.
    """

    def __init__(self, name: str, method: Any) -> None:
        self._name, self._method = name, method
        self._calls = 0
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._results: list[Tensor] = []

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        self._calls += 1
        if self._calls == 2:
            self._record(inputs)
        if self._graph is None:  # the first call loads kernels, which cannot be recorded
            return list(self._method.boxed_run(inputs))
        for place, value in zip(self._inputs, inputs, strict=True):
            if place is not value:
                place.copy_(value)
        self._graph.replay()
        return list(self._results)

    def _record(self, inputs: list[Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        self._inputs = [value.clone() for value in inputs]
        try:
            with torch.cuda.graph(graph):
                self._results = list(self._method.boxed_run(list(self._inputs)))
        except RuntimeError as error:
            warnings.warn(
                f"{self._name} is launched kernel by kernel, because it cannot be a CUDA graph: {error}", stacklevel=2
            )
            return
        self._graph = graph


def is_package(path: Path) -> bool:
    """Whether a file begins as the program files of this backend do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def load_package_file(path: Path, verify: bool) -> Program:
    """The program in a file, without loading the network.

    Raises:
        ArtifactError: The file is truncated, damaged or foreign.
    """
    if verify:
        checksum.check(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("/" + MANIFEST) for name in names):
                raise ArtifactError(
                    "this is a zip archive, but not a program of this compiler",
                    where=str(path),
                    hint="compile the model with mobizo_compiler.compile",
                )
            manifest = Manifest.from_json(archive.read(_entry(archive, MANIFEST)).decode(), str(path))
            described = json.loads(archive.read(_entry(archive, TARGET)))
            keys = described.pop("weights")
            target = Target(**described)
        tensors = _map_weights(path)
        lora_a = {site.fqn: tensors[LORA_A + site.fqn].clone() for site in manifest.sites}
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, NotImplementedError, OSError) as error:
        raise ArtifactError(
            f"the file is truncated or damaged: {error!r}",
            where=str(path),
            hint="copy it again, or compile the model again",
        ) from error
    return Program(manifest, AotInductorArtifact(path, manifest, target, keys), lora_a)


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """One of our own entries; the folder before its name is that of the package."""
    for info in archive.infolist():
        if info.filename.endswith("/" + name):
            return info
    raise KeyError(name)


def _map_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a program file; pages of it are read when they are used, and shared by all who map it."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = _entry(archive, WEIGHTS)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # A local header is 30 bytes, the last four of them the lengths of the name and of further fields, and both of them.
    lengths = data[entry.header_offset + 26 : entry.header_offset + 30]
    start = entry.header_offset + 30 + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
    return map_tensors(data, start, entry.file_size, str(path))
