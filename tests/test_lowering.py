"""What lowering may get wrong is caught: lost state, dropped updates, wrong numbers."""

from __future__ import annotations

import contextlib
import gc
import linecache
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import ExportedProgram

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, ZOConfig
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.backends.executorch import lower as lowering
from mobizo_compiler.backends.executorch import weights_on_disk
from mobizo_compiler.backends.xnnpack import XnnpackBackend
from mobizo_compiler.errors import LoweringError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.graph.eager import EagerArtifact, EagerRunner
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.testing import TokenWise
from mobizo_compiler.upstream import fx_sources

TOKENS = (torch.zeros(2, 5, dtype=torch.int64),)
LORA = LoraConfig(r=2, target_modules=("up",))


class Grabber(XnnpackPartitioner):
    """Tags every placeholder that a delegate reads, the state with them, as other partitioners do."""

    def partition(self, exported):  # type: ignore[no-untyped-def]
        result = super().partition(exported)
        for node in result.tagged_exported_program.graph.nodes:
            if node.op == "placeholder" and "lora_b" in node.name:
                tags = {user.meta.get("delegation_tag") for user in node.users} - {None}
                if tags and len(tags) == 1:
                    node.meta["delegation_tag"] = tags.pop()
        return result


class GrabbingBackend(XnnpackBackend):
    name = "grabbing"

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> lowering.ExecuTorchArtifact:
        return lowering.lower_to_executorch(methods, manifest, [Grabber()])


@pytest.mark.slow
def test_state_is_kept_out_of_delegates_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And methods are not interpreted to no end: compiling took a third longer when all were, two or three times."""
    interpreted = []
    original = ExportedProgram.run_decompositions

    def counting(self: ExportedProgram, *rest: object) -> ExportedProgram:
        interpreted.append({str(node.target) for node in self.graph.nodes})
        return original(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(ExportedProgram, "run_decompositions", counting)
        mobizo.compile(TokenWise().eval(), TOKENS, LORA, backend=GrabbingBackend())
    assert not any("aten.linear.default" in targets for targets in interpreted), "the replay alone has no model"
    monkeypatch.setattr(lowering, "KeepStateOutside", lambda inner: inner)
    with pytest.raises(LoweringError):
        mobizo.compile(TokenWise().eval(), TOKENS, LORA, backend=GrabbingBackend())


class _Crooked(EagerRunner):
    """Answers like eager PyTorch, with one method slightly wrong."""

    wrong = "train_step"

    def call(self, method: str, inputs: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        results = super().call(method, inputs)
        if method == self.wrong:
            if results:
                results = [result * 1.01 for result in results]
            else:
                self.state().mul_(1.01)
        return results


class CrookedBackend(EagerBackend):
    name = "crooked"

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def lower(self, methods: Mapping[str, GraphProgram], manifest: Manifest) -> EagerArtifact:
        artifact = EagerArtifact(dict(methods))

        def runner() -> EagerRunner:
            crooked = _Crooked(artifact.methods)
            crooked.wrong = self.wrong
            return crooked

        artifact.runner = runner  # type: ignore[method-assign]
        return artifact


@pytest.mark.parametrize("method", ["train_step", "evaluate", "replay"])
def test_wrong_numbers_are_a_compile_error_that_names_the_method(method: str) -> None:
    with pytest.raises(LoweringError, match=f"of {method} differ by") as caught:
        mobizo.compile(TokenWise().eval(), TOKENS, LORA, ZOConfig(queries=2), backend=CrookedBackend(method))
    assert "expected [" in str(caught.value)


def test_a_right_backend_passes_the_same_check() -> None:
    mobizo.compile(TokenWise().eval(), TOKENS, LORA, ZOConfig(queries=2), backend=CrookedBackend("none"))


def test_a_constant_with_the_bytes_of_the_state_is_not_taken_for_it() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(11, 12), torch.nn.Linear(12, 22), torch.nn.Linear(22, 11)).eval()
    torch.nn.init.zeros_(model[1].bias)
    lora = LoraConfig(r=2, target_modules=("2",))
    program = mobizo.compile(model, TOKENS, lora, ZOConfig(queries=1), backend="xnnpack")
    assert program.manifest.state_size == 22
    session = mobizo.Session(program)
    session.train_step(TOKENS, torch.ones_like(TOKENS[0]), seed=1, learning_rate=0.1)
    assert bool(session.state().any()) and not bool(mobizo.Session(program).state().any())


@pytest.mark.slow
def test_weights_are_not_there_twice_while_delegates_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delegates share the program's tensors, what they serialize waits on the disk, and the file is the same."""
    shared: list[bool] = []
    weight = nn.Parameter(torch.randn(160, 160))
    model = nn.Sequential(nn.Linear(160, 160, bias=False), nn.Tanh(), nn.Linear(160, 160, bias=False)).eval()
    model[0].weight = weight
    original = weights_on_disk.xnnpack_preprocess.XnnpackBackend.preprocess

    def looks(program: ExportedProgram, specs: object) -> object:
        places = {tensor.data_ptr() for tensor in program.state_dict.values()}
        shared.append(weight.data_ptr() in places)
        return original(program, specs)

    monkeypatch.setattr(weights_on_disk.xnnpack_preprocess.XnnpackBackend, "preprocess", staticmethod(looks))
    kept: list[Path] = []
    keep = weights_on_disk._Folder.keep

    def noting(folder: weights_on_disk._Folder, data: bytes) -> object:
        kept.append(folder.path)
        return keep(folder, data)

    monkeypatch.setattr(weights_on_disk._Folder, "keep", noting)

    def files() -> bytes:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            program = mobizo.compile(model, (torch.ones(2, 160),), LoraConfig(r=2), loss=mobizo.MSELoss())
            program.save(Path(folder) / "a.pte")
            return (Path(folder) / "a.pte").read_bytes()

    found = files()
    assert any(shared) and len(kept) > 2 and not any(path.exists() for path in kept)
    shared.clear()
    monkeypatch.setattr(lowering, "weights_on_disk", lambda outlive: contextlib.nullcontext())
    assert files() == found and shared and not any(shared)


def test_nothing_is_remembered_of_what_was_lowered() -> None:
    """But for the program: torch and ExecuTorch keep graphs, with their weights, in caches that nobody empties."""

    def alive() -> Counter[str]:
        gc.collect()
        kinds = (LoweredBackendModule, ExportedProgram)
        return Counter(kind.__name__ for found in gc.get_objects() for kind in kinds if issubclass(type(found), kind))

    program = mobizo.compile(TokenWise().eval(), TOKENS, LORA)
    sources, before = len(fx_sources.eval_cache), alive()
    del program
    program = mobizo.compile(TokenWise().eval(), TOKENS, LORA)
    assert program.methods and alive() == before, "nothing but this program, in place of the one before"
    assert len(fx_sources.eval_cache) - sources < 100, "what the passes make, and nothing of the lowering"
    assert not [key for key in linecache.cache if "eval_with_key" in key and key not in fx_sources.eval_cache]
