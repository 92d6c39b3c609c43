"""Program files: they explain themselves, appear whole or not at all, and damage is noticed before it does harm."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.compiling.described import installed_versions
from mobizo_compiler.errors import ArtifactError, NotSupportedYetError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.manifest import FORMAT_VERSION, Manifest
from mobizo_compiler.testing import TinyCausalLM, TokenWise, tiny_batch

pytestmark = pytest.mark.xdist_group("artifact")  # one process, so that its programs are made once

IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[mobizo.Program, Path]:
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    program = mobizo.compile(
        TinyCausalLM(layers=1).eval(), inputs, LoraConfig(r=3, lora_alpha=5), ZOConfig(queries=2), backend="portable"
    )
    return program, program.save(tmp_path_factory.mktemp("saved") / "tiny.pte")


def test_a_file_gives_the_program_back(saved: tuple[mobizo.Program, Path]) -> None:
    program, path = saved
    loaded = mobizo.load(path)
    assert loaded.sites == program.sites
    assert loaded.manifest == program.manifest
    for site in program.sites:
        assert torch.equal(loaded.lora_a(site.fqn), program.lora_a(site.fqn))
    inputs, labels = tiny_batch()
    results = []
    for source in (program, loaded, path, str(path)):
        session = Session(source)
        for seed in range(3):
            result = session.train_step(inputs, labels, seed=seed, learning_rate=0.1, eps=0.01)
        results.append((session.state(), result.lane_losses, session.evaluate(inputs)["logits"]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_manifest_says_what_a_host_needs(saved: tuple[mobizo.Program, Path]) -> None:
    manifest = mobizo.load(saved[1]).manifest
    assert [spec.name for spec in manifest.inputs] == ["input_ids", "attention_mask"]
    assert (manifest.inputs[0].low, manifest.inputs[0].high) == (0, 22)
    assert manifest.inputs[1].high is None
    assert (manifest.labels.shape, manifest.labels.high, manifest.labels.also) == ((3, 7), 22, -100)
    assert manifest.keywords and manifest.backend == "portable"
    assert manifest.versions == installed_versions()
    assert manifest.versions["torch"].startswith("2.13.")
    assert Manifest.from_json(manifest.to_json(), "memory") == manifest


def test_saving_is_atomic(saved: tuple[mobizo.Program, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = saved
    target = tmp_path / "program.pte"
    target.write_bytes(b"precious")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            program.save(target)
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]
    program.save(target)
    assert mobizo.load(target).manifest == program.manifest
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(ArtifactError, match="no folder"):
        program.save(tmp_path / "missing" / "program.pte")


@given(share=st.floats(0, 0.9999))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_refused(saved: tuple[mobizo.Program, Path], tmp_path: Path, share: float) -> None:
    whole = saved[1].read_bytes()
    path = tmp_path / "cut.pte"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ArtifactError, match=r"truncated|not a program of any installed backend|no checksum"):
        mobizo.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        Session(tmp_path / "nothing.pte")
    text = tmp_path / "text.pte"
    text.write_text("this is no program, " * 100)
    with pytest.raises(ArtifactError, match="not a program of any installed backend"):
        mobizo.load(text)
    stock = tmp_path / "stock.pte"
    stock.write_bytes(to_edge(torch.export.export(TokenWise().eval(), (IDS,))).to_executorch().buffer)
    with pytest.raises(ArtifactError, match="no checksum at its end"):
        mobizo.load(stock)
    with pytest.raises(ArtifactError, match=r"not one of this compiler: its methods are \['forward'\]"):
        mobizo.load(stock, verify=False)
    header = tmp_path / "header.pte"
    header.write_bytes(stock.read_bytes()[:64] + b"\xff" * (len(stock.read_bytes()) - 64))
    with pytest.raises(ArtifactError, match="cannot load this file"):
        mobizo.load(header, verify=False)


def test_the_checksum_is_of_everything_before_it(saved: tuple[mobizo.Program, Path], tmp_path: Path) -> None:
    """As docs/program_format.md says it, for those who write other hosts."""
    data = saved[1].read_bytes()
    assert data[-40:-32] == b"MBZSHA2\n" and data[-32:] == hashlib.sha256(data[:-40]).digest()
    path = tmp_path / "program.pte"
    path.write_bytes(data[:-40])
    with pytest.raises(ArtifactError, match="no checksum at its end"):
        mobizo.load(path)
    assert mobizo.load(path, verify=False).manifest == saved[0].manifest
    checksum.seal(path)
    assert path.read_bytes() == data
    checksum.seal(path)
    assert path.read_bytes() == data, "a second time the trailer is replaced"
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(ArtifactError, match="its checksum is not that of its contents"):
        mobizo.load(path)


@pytest.mark.slow
def test_a_damaged_file_in_the_cache_is_made_again(tmp_path: Path) -> None:
    said: list[str] = []

    def compiled() -> mobizo.Program:
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=("up",))
        options = {"backend": "portable", "cache_dir": tmp_path, "progress": said.append}
        return mobizo.compile(TokenWise().eval(), (IDS,), lora, ZOConfig(queries=1), **options)  # type: ignore[arg-type]

    compiled()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:3000] + b"?" + whole[3001:])
    said.clear()
    compiled()
    assert path.read_bytes() == whole
    assert any("cached, but not usable: the file is damaged" in line for line in said), said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), f"has format 99, this version reads format {FORMAT_VERSION}"),
        (lambda m: m.pop("sites"), "lacks or has unknown fields"),
        (lambda m: m.update(colour="red"), "lacks or has unknown fields"),
        (lambda m: m["lora"].update(r=0), "LoraConfig.r is 0"),
    ],
)
def test_bad_manifests(saved: tuple[mobizo.Program, Path], change, message: str) -> None:  # type: ignore[no-untyped-def]
    values = json.loads(saved[0].manifest.to_json())
    change(values)
    with pytest.raises(mobizo.MobizoError, match=message):
        Manifest.from_json(json.dumps(values), "here")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Manifest.from_json("{", "here")


def test_temporary_files_go_with_the_program() -> None:
    program = mobizo.compile(TokenWise().eval(), (IDS,), LoraConfig(target_modules=("up",)), backend="portable")
    path: Path = program.artifact.path  # type: ignore[attr-defined]
    session = Session(program)
    del program
    session.evaluate(IDS)
    assert path.exists()
    del session
    assert not path.parent.exists()


def test_the_eager_backend_has_no_file_format(tmp_path: Path) -> None:
    program = mobizo.compile(TokenWise().eval(), (IDS,), LoraConfig(target_modules=("up",)), backend="eager")
    with pytest.raises(NotSupportedYetError, match=r"lives in memory(.|\n)*portable"):
        program.save(tmp_path / "program.pte")
    assert not list(tmp_path.iterdir())
