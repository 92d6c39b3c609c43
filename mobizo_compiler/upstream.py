"""Names of other packages that they do not promise to keep: all that this one uses, and what each is needed for.

They are looked up when they are first asked for, because some of the packages take seconds to import. Whoever needs a
private name of another package adds it here; `tests/test_upstream.py` sees to that, and says what breaks where a
version of a package no longer has one.

>>> from mobizo_compiler.upstream import pytree
>>> pytree.tree_leaves({"a": [1, 2]})
[1, 2]
"""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Private(NamedTuple):
    """A name that its package may change.

    Args:
        module: Where it is.
        name: What it is called there; empty for the module itself.
        breaks: What does not work without it.
    """

    module: str
    name: str
    breaks: str


_PROGRAM = "executorch.exir.program._program"
_READERS = "executorch.exir._serialize.generated.executorch_flatbuffer"

PRIVATE: dict[str, Private] = {
    "pytree": Private("torch.utils._pytree", "", "inputs and outputs that nest"),
    "OpOverload": Private("torch._ops", "OpOverload", "operators by name in program text, and what they change"),
    "FakeTensor": Private("torch._subclasses.fake_tensor", "FakeTensor", "shapes of values in a graph"),
    "FakeTensorMode": Private("torch._subclasses.fake_tensor", "FakeTensorMode", "shapes of what a pass inserts"),
    "fx_sources": Private("torch.fx.graph_module", "_loader", "compiling in little memory"),
    "ConstantSource": Private("torch._dynamo.source", "ConstantSource", "symbols of program text that is read back"),
    "core_aten_decompositions": Private("torch._decomp", "core_aten_decompositions", "the exact estimator"),
    "storage_use_count": Private("torch._C", "_storage_Use_Count", "memory of a GPU that is given back in time"),
    "inductor_config": Private("torch._inductor.config", "", "the backend cuda"),
    "inductor_builder": Private("torch._inductor.cpp_builder", "", "knowing whether aot_inductor has a compiler"),
    "inductor_graph": Private("torch._inductor.graph", "", "compiling with aot_inductor without the weights"),
    "aot_compile": Private("torch._inductor", "aot_compile", "compiling with aot_inductor"),
    "package_aoti": Private("torch._inductor.package.package", "package_aoti", "programs of several methods (.pt2)"),
    "PackageLoader": Private("torch._C._aoti", "AOTIModelPackageLoader", "running programs of aot_inductor"),
    "choose_qparams_tinygemm": Private(
        "torchao.quantization.quant_primitives", "_choose_qparams_affine_tinygemm", "weights of 4 bits with offsets"
    ),
    "quantize_tinygemm": Private(
        "torchao.quantization.quant_primitives",
        "_quantize_affine_tinygemm_no_dtype_cast",
        "weights of 4 bits with offsets",
    ),
    "Runtime": Private("executorch.runtime", "Runtime", "running a .pte (public; here without ExecuTorch's exporter)"),
    "ProgramReader": Private(f"{_READERS}.Program", "Program", "loading a .pte, and which delegates it needs"),
    "make_readers_whole": Private(
        "executorch.exir._serialize._flatbuffer_program",
        "_patch_generated_flatbuffer_aliases",
        "loading a .pte: the generated readers import each other in a circle",
    ),
    "read_program": Private(
        "executorch.exir._serialize._flatbuffer_program", "_flatbuffer_to_program", "what a .pte runs (mobizo inspect)"
    ),
    "exir_program": Private(_PROGRAM, "", "lowering in little time"),
    "generate_edge_program": Private(_PROGRAM, "_generate_edge_program", "lowering in little time"),
    "aten_to_edge_passes": Private(_PROGRAM, "_get_aten_to_edge_passes", "lowering in little time"),
    "transform_edge": Private(_PROGRAM, "_transform", "lowering in little time"),
    "updated_signature": Private(_PROGRAM, "_get_updated_graph_signature", "lowering in little time"),
    "view_copy_of": Private(
        "torch._export.passes.replace_view_ops_with_view_copy_ops_pass",
        "get_view_copy_of_view_op",
        "lowering in little time",
    ),
    "edge_operators": Private("executorch.exir.dialects._ops", "ops", "a cache of keys and values written in place"),
    "serialize_for_executorch": Private(
        "executorch.exir._serialize._serialize", "serialize_for_executorch", "the state in a .pte once, or beside it"
    ),
    "thread_count": Private(
        "executorch.extension.pybindings.portable_lib",
        "_threadpool_get_thread_count",
        "an engine that starts without lines about the processor",
    ),
    "reset_threads": Private(
        "executorch.extension.pybindings.portable_lib",
        "_unsafe_reset_threadpool",
        "an engine of OMP_NUM_THREADS threads",
    ),
    "Cord": Private("executorch.exir._serialize._cord", "Cord", "reading a .ptd"),
    "FileBackedData": Private("executorch.exir._serialize._cord", "FileBackedData", "lowering in little memory"),
    "NamedDataStore": Private(
        "executorch.exir._serialize._named_data_store", "NamedDataStore", "lowering in little memory"
    ),
    "xnnpack_preprocess": Private("executorch.backends.xnnpack.xnnpack_preprocess", "", "lowering in little memory"),
    "DataEntry": Private("executorch.exir._serialize.data_serializer", "DataEntry", "writing a .ptd"),
    "DataPayload": Private("executorch.exir._serialize.data_serializer", "DataPayload", "writing a .ptd"),
}


# Modules that run programs, or read them, and need of the packages after them no more than modules that need nothing.
_WITHOUT_THE_EXPORTER = (
    "executorch.runtime",
    "executorch.extension.pybindings.portable_lib",
    "executorch.exir._serialize._flatbuffer_program",
    f"{_READERS}.Program",
)
_EXPORTER = (
    "executorch.exir",
    "executorch.exir.backend",
    "executorch.exir._serialize",
    "executorch.exir._serialize.generated",
)
_apart: dict[str, ModuleType] = {}
_importing = threading.Lock()

_MANAGER = ("executorch.exir", "ExecutorchProgramManager")
# Attributes of other packages' objects, by their name, with the class that has them: see `member` and `set_member`.
MEMBERS: dict[str, Private] = {
    "_emitter_output": Private(*_MANAGER, "the state in a .pte once, or beside it"),
    "_pte_data": Private(*_MANAGER, "the checksum at the end of a .pte"),
    "_tensor_data": Private(*_MANAGER, "data files beside a .pte"),
    "_data_serializer": Private(*_MANAGER, "writing a .pte again once the state is where it belongs"),
    "_named_data": Private(*_MANAGER, "writing a .pte again once the state is where it belongs"),
    "_codegen": Private("torch.fx", "Graph", "compiling without writing the source of every graph"),
    **{
        name: Private("torch.fx", "GraphModule", "compiling without writing the source of every graph")
        for name in ("_code", "_lineno_map", "_prologue_start")
    },
    "_method": Private("executorch.runtime", "Method", "the live state of a session, without a copy"),
}


def member(owner: object, name: str) -> Any:
    """An attribute of `MEMBERS`.

    Raises:
        ImportError: The installed version of its package has it no longer.
    """
    if not hasattr(owner, name):
        place = MEMBERS[name]
        raise ImportError(
            f"{place.module}.{place.name}.{name} is not in the installed version of {place.module.split('.')[0]}, and "
            f"mobizo-compiler needs it for {place.breaks}"
        )
    return getattr(owner, name)


def set_member(owner: object, name: str, value: object) -> None:
    """Set an attribute of `MEMBERS`, which must be there.

    Raises:
        ImportError: The installed version of its package has it no longer.
    """
    member(owner, name)
    setattr(owner, name, value)


def _imported(module: str) -> ModuleType:
    """A module; those that need nothing of ExecuTorch's exporter without it, unless it is there already.

    ExecuTorch's own runtime imports a module of warnings from `executorch.exir`, and so all of it: PyTorch's tracer,
    torchao, SymPy. That is 4 s of processor time and 120 MB for a process that only runs a program.
    """
    if module not in _WITHOUT_THE_EXPORTER:
        return importlib.import_module(module)
    with _importing:
        if not _apart:
            _apart.update(_import_apart())
    return _apart[module]


def _import_apart() -> dict[str, ModuleType]:
    """Import these modules with empty packages in the place of the exporter's; nothing of it is left in `sys.modules`.

    Another thread that imports `executorch.exir` for the first time within these milliseconds would see an empty one.
    """
    before, made = set(sys.modules), list[ModuleType]()
    if _EXPORTER[0] not in before:
        try:
            made = [_stand_in(name) for name in _EXPORTER]
            found = {name: importlib.import_module(name) for name in _WITHOUT_THE_EXPORTER}
            for module in found.values():  # the one that imports the readers does so now, and not when they are used
                getattr(module, PRIVATE["make_readers_whole"].name, lambda: None)()
            return found
        except (ImportError, AttributeError):
            pass  # a version of ExecuTorch whose modules need more
        finally:
            for module in reversed(made):
                parent, _, child = module.__name__.rpartition(".")
                delattr(sys.modules[parent], child)
            for name in set(sys.modules) - before:
                if name.startswith(_EXPORTER[0]):
                    del sys.modules[name]
    return {name: importlib.import_module(name) for name in _WITHOUT_THE_EXPORTER}


def _stand_in(name: str) -> ModuleType:
    parent, _, child = name.rpartition(".")
    package, module = importlib.import_module(parent), ModuleType(name)
    module.__path__ = [str(Path(folder) / child) for folder in package.__path__]
    sys.modules[name] = module
    setattr(package, child, module)
    return module


def __getattr__(name: str) -> Any:
    """A name of `PRIVATE`.

    Raises:
        ImportError: The installed version of its package has it no longer.
    """
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = PRIVATE[name]
    try:
        module = _imported(place.module)
        found = getattr(module, place.name) if place.name else module
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{place.module}.{place.name or ''} is not in the installed version of {place.module.split('.')[0]}, and "
            f"mobizo-compiler needs it for {place.breaks}: {error}"
        ) from error
    globals()[name] = found
    return found
