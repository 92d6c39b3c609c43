"""The way to ExecuTorch's CUDA delegate, as far as it goes without a GPU: all but the delegate's own compilation."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from torch._inductor import config as inductor_config

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.backends import get_backend, requirements
from mobizo_compiler.backends.cuda import backend as backend_module
from mobizo_compiler.backends.cuda.artifact import CudaArtifact, data_path, write_program
from mobizo_compiler.backends.cuda.backend import DELEGATE, CudaBackend, partitioners
from mobizo_compiler.errors import ArtifactError, BackendRefusedError, BackendUnavailableError
from mobizo_compiler.graph.pipeline import Pipeline
from mobizo_compiler.graph.program import STATE_INPUT
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch

pytestmark = pytest.mark.xdist_group("cuda")  # one process, so that its programs are made once

IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.fixture(scope="module")
def lowered() -> Iterator[tuple[mobizo.Program, CudaArtifact, dict[str, Any]]]:
    """A program lowered with a delegate of the same name that keeps its input instead of compiling it for a GPU."""
    if importlib.util.find_spec("triton") is not None:
        pytest.skip("with triton the real delegate may be registered under this name")
    given: dict[str, Any] = {}

    class Recorder(BackendDetails):
        @staticmethod
        def preprocess(program: Any, specs: list[Any]) -> PreprocessResult:
            by_key = {spec.key: spec.value.decode() for spec in specs}
            given[by_key["method_name"]] = (program, by_key)
            store = NamedDataStore()
            store.add_named_data(by_key["method_name"] + "_so", b"code", 1, None)
            store.add_named_data(by_key["method_name"] + "_weights", b"weights" * 99, 1, "aoti_cuda_blob")
            return PreprocessResult(b"", {}, store.get_named_data_store_output())

    Recorder.__name__ = DELEGATE
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    program = mobizo.compile(
        TinyCausalLM().eval(), inputs, LoraConfig(r=3), ZOConfig(queries=2), backend="eager", state="io"
    )
    manifest = dataclasses.replace(program.manifest, backend="cuda")
    steps = Pipeline(CudaBackend().passes())  # a replay is lowered as it is
    methods = {name: m if name == "replay" else steps.run(m) for name, m in program.methods.items()}
    artifact = write_program(methods, manifest, partitioners(methods))
    yield program, artifact, given
    Recorder.__name__ = "Recorder"


def test_every_method_is_one_delegate_and_nothing_is_outside(lowered: Any) -> None:
    program, artifact, given = lowered
    assert list(given) == ["train_step", "evaluate", "replay"]
    for name, (exported, specs) in given.items():
        assert specs == {"method_name": name, "target_device": "cuda:0"}
        assert artifact.delegation[name].delegates == 1
        assert artifact.delegation[name].outside == {}
        assert not exported.graph_signature.buffers_to_mutate, "the delegate must not keep state of its own"
        assert len(exported.graph_signature.user_inputs) == len(program.methods[name].inputs)
        assert list(program.methods[name].inputs)[-1] == STATE_INPUT


def test_the_noise_needs_no_division_of_integers(lowered: Any) -> None:
    """ExecuTorch's pass for CUDA computes those in floating point."""
    _, _, given = lowered
    for exported, _ in given.values():
        text = exported.graph_module.code
        assert "bitwise_xor" in text or "bitwise" not in text
        assert "floor" not in text and "remainder" not in text
    assert "bitwise_xor" in given["replay"][0].graph_module.code


def test_attention_is_written_as_products_or_refused(lowered: Any) -> None:
    """The kernel that ExecuTorch puts in the place of the operator stops a float32 model with an assertion."""
    program, _, given = lowered
    for exported, _ in given.values():
        assert "scaled_dot_product_attention" not in exported.graph_module.code
    reasons = CudaBackend().unsupported(program.methods["evaluate"])
    assert len(reasons) == 2 and "a kernel for bfloat16" in reasons[0], "one for each layer, with its line"


def test_no_kernel_is_searched_for_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(backend_module.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(
        backend_module, "write_program", lambda *args: seen.append(inductor_config.test_configs.max_mm_configs)
    )
    CudaBackend().lower({}, None)  # type: ignore[arg-type]
    CudaBackend(autotune=True).lower({}, None)  # type: ignore[arg-type]
    assert seen == [1, None]


def test_two_files_are_saved_and_loaded(lowered: Any, tmp_path: Path) -> None:
    _, artifact, _ = lowered
    path = tmp_path / "net.pte"
    artifact.save(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.ptd", "net.pte"]
    assert b"weights" * 99 in data_path(path).read_bytes()
    assert b"weights" * 99 not in path.read_bytes()
    loaded = mobizo.load(path)
    assert loaded.manifest == artifact.manifest
    assert isinstance(loaded.artifact, CudaArtifact)
    assert loaded.lora_a_by_fqn.keys() == {site.fqn for site in loaded.sites}
    if loaded.artifact.cannot_run:
        with pytest.raises(BackendUnavailableError, match="no CudaBackend"):
            Session(loaded)
    data_path(path).unlink()
    with pytest.raises(ArtifactError, match=r"net\.ptd, are not beside it"):
        Session(path)
    with pytest.raises(ArtifactError, match="is that of the weights"):
        artifact.save(tmp_path / "net.ptd")


def test_a_shared_state_is_refused() -> None:
    program = mobizo.compile(TokenWise().eval(), (IDS,), LoraConfig(target_modules=("up",)), backend="eager")
    assert ["state=" in reason for reason in CudaBackend().unsupported(program.methods["train_step"])] == [True]


def test_what_is_missing_is_said_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = get_backend("cuda")
    for key in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(backend.unavailable())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable() == "PyTorch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    assert backend.unavailable() == "the package triton is missing"
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(requirements.shutil, "which", lambda name: "/bin/g++" if name == "g++" else None)
    monkeypatch.setattr(requirements, "_DEFAULT_TOOLKIT", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    assert str(backend.unavailable()).startswith("nvcc of the CUDA toolkit")
    (tmp_path / "bin" / "nvcc").touch()
    assert str(backend.unavailable()).startswith("ptxas of the CUDA toolkit")
    (tmp_path / "bin" / "ptxas").touch()
    assert backend.unavailable() is None
    monkeypatch.setattr(requirements.shutil, "which", lambda name: None)
    assert "C++ compiler" in str(backend.unavailable())
    assert "triton" not in sys.modules or importlib.util.find_spec("triton") is not None


def test_refusals_come_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    monkeypatch.setattr(CudaBackend, "unavailable", lambda self: "PyTorch sees no GPU")
    with pytest.raises(BackendUnavailableError, match=r"'cuda' cannot be used on this machine: PyTorch sees no GPU"):
        mobizo.compile(TokenWise().eval(), (IDS,), backend="cuda", progress=phases.append)
    assert phases == []
    monkeypatch.setattr(CudaBackend, "unavailable", lambda self: None)
    with pytest.raises(BackendRefusedError, match='state="io"'):
        mobizo.compile(
            TokenWise().eval(),
            (IDS,),
            LoraConfig(r=2, target_modules=("up",)),
            backend="cuda",
            progress=phases.append,
        )
    assert "lower" not in phases
