"""Commands about program files and the machine, as a person and as a pipeline run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig, cli
from mobizo_compiler.inspection import machine as inspection

pytestmark = pytest.mark.xdist_group("cli_program")  # one process, so that its programs are made once

COLUMNS = {"COLUMNS": "100"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(16, 32), "up": nn.Linear(32, 32), "head": nn.Linear(32, 16)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    lora = LoraConfig(r=3, target_modules=("up", "head"))
    example = (torch.zeros(2, 5, dtype=torch.int64),)
    program = mobizo.compile(model.eval(), example, lora, ZOConfig(queries=2), quantization="8da8w")
    return program.save(tmp_path_factory.mktemp("program") / "program.pte")


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env=COLUMNS, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_inspect_for_pipelines(file: Path) -> None:
    found = json.loads(run("inspect", file, "--json"))
    assert (found["backend"], found["parameters"], found["lanes"]) == ("xnnpack", 3 * 32 + 3 * 16, 4)
    assert found["layers"] == {"up": 1, "head": 1}
    assert json.loads(found["quantization"])["recipe"] == "8da8w"
    assert found["file_bytes"] == file.stat().st_size
    assert set(found["methods"]) == {"train_step", "evaluate", "replay"}
    step = found["methods"]["train_step"]
    assert step["delegates"] >= 1 and "aten::bitwise_xor" in step["outside"] and sum(step["planned_bytes"]) > 0
    assert step["outside_multiply_adds"] == 0, "all products are in delegates"


def test_inspect_for_people(file: Path) -> None:
    text = run("inspect", file)
    for part in (
        "xnnpack",
        "two-sided, 2 queries, 4 lanes, gaussian; eps 0.1",
        "144 parameters in 2 layers",
        "int64 [2, 5]",
    ):
        assert part in text, text
    assert max(map(len, text.splitlines())) <= 100


def test_inspect_of_something_else(tmp_path: Path) -> None:
    assert "[MBZ501]" in run("inspect", tmp_path / "no.pte", code=1)
    (tmp_path / "bad.pte").write_bytes(b"x" * 1000)
    text = run("inspect", tmp_path / "bad.pte", code=1)
    assert "[MBZ501]" in text and "Traceback" not in text


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run("doctor", "--json"))
    assert found["ok"] and found["packages"]["torch"] == {
        "installed": torch.__version__,
        "tested": "2.13.*",
        "ok": True,
    }
    assert "XnnpackBackend" in found["runtime_backends"] and found["backends"]["xnnpack"] is None
    assert "XnnpackBackend" in run("doctor")
    other = inspection.installed_versions() | {"executorch": "1.4.0"}
    monkeypatch.setattr(inspection, "installed_versions", lambda: other)
    assert "1.4.0  tested with 1.5.*" in run("doctor", code=1)
    assert not json.loads(run("doctor", "--json", code=1))["ok"]


def test_export_adapter(file: Path, tmp_path: Path) -> None:
    tokens = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))
    session = Session(file)
    session.finetune([((tokens,), tokens)], steps=3, learning_rate=0.1, run=tmp_path / "run")
    text = run("export-adapter", file, tmp_path / "run", tmp_path / "adapter", "--base-model", "someone/model")
    assert "after 3 steps" in text
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.up.lora_B.weight"].t(), session.lora_b("up"))
    assert "[MBZ701]" in run("export-adapter", file, tmp_path, tmp_path / "adapter", code=1)
