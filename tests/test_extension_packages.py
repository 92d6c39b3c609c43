"""The packages of examples/extensions, installed as pip would leave them: found by name, used from the command line."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler.cli import app
from mobizo_compiler.errors import ExtensionUnavailableError, PassContractError, UnknownExtensionError
from mobizo_compiler.graph import program_text
from mobizo_compiler.testing import TinyCausalLM, check_against_oracle, check_backend, tiny_batch

EXTENSIONS = Path(__file__).parent.parent / "examples" / "extensions"


def install(name: str, folder: Path) -> None:
    """Put the modules of a package and its entry points into a folder."""
    source = EXTENSIONS / name
    project = tomllib.loads((source / "pyproject.toml").read_text())
    info = folder / f"{project['project']['name'].replace('-', '_')}-{project['project']['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 0.1.0\n")
    groups = project["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for module in project["tool"]["setuptools"]["py-modules"]:
        (folder / f"{module}.py").write_text((source / f"{module}.py").read_text())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with both packages."""
    folder = tmp_path / "site"
    for name in ("silu_pass", "torch_file_backend"):
        install(name, folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for module in ("mobizo_silu", "mobizo_torch_file", "test_silu"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("file", sorted(EXTENSIONS.glob("*/mobizo_*.py")), ids=lambda file: file.stem)
def test_a_newcomer_writes_fewer_than_60_lines(file: Path) -> None:
    assert file.read_text().count("\n") < 60


def test_the_test_of_the_pass(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that authors copy; and it fails for a pass that does something else."""
    monkeypatch.syspath_prepend(EXTENSIONS / "silu_pass")
    copied = importlib.import_module("test_silu")
    copied.test_silu()
    step: Any = copied.SpellOutSilu
    monkeypatch.setattr(step, "rewrite", lambda self, edit: None)
    with pytest.raises(PassContractError, match="the golden text is another one"):
        copied.test_silu()


def test_the_pass_by_its_name(installed: Path) -> None:
    """Whole steps against plain PyTorch, with the pass in both methods that have a network."""
    inputs, _ = tiny_batch()
    torch.manual_seed(0)
    report = check_against_oracle(TinyCausalLM().eval(), inputs, backend="eager", passes=["spell-out-silu"])
    for method, where in (("train_step", True), ("evaluate", True), ("replay", False)):
        assert any("SpellOutSilu" in step for step in report.program.manifest.history[method]) == where
        assert "silu(" not in program_text(report.program.methods[method])


def test_the_name_is_written_down(installed: Path) -> None:
    options = mobizo.Options(passes=("spell-out-silu",))
    assert [type(own.step).__name__ for own in options.passes] == ["SpellOutSilu"]
    written = json.loads(json.dumps(options.to_json()))
    assert written["passes"] == ["spell-out-silu"]
    assert mobizo.Options.from_json(written) == options


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("insertion = None", "spell-out-silu' .mobizo_silu:insertion. cannot be loaded"),
        ("insertion = SpellOutSilu", "is not a pass: it is a SpellOutSilu, not an Insertion"),
        ("import missing_engine", "cannot be loaded: No module named 'missing_engine'"),
    ],
)
def test_a_package_that_is_broken(installed: Path, value: str, message: str) -> None:
    """It harms who names it, and nobody else."""
    with (installed / "mobizo_silu.py").open("a") as file:
        file.write(f"\n{value}\n")
    assert mobizo.Options().passes == ()
    with pytest.raises(ExtensionUnavailableError, match=message):
        mobizo.Options(passes=("spell-out-silu",))


def test_a_function_that_returns_the_insertion(installed: Path) -> None:
    with (installed / "mobizo_silu.py").open("a") as file:
        file.write("\nmade = insertion\ndef insertion():\n    return made\n")
    assert mobizo.Options(passes=("spell-out-silu",)).passes[0].after == "specialize"


def test_a_name_that_is_no_pass(installed: Path) -> None:
    with pytest.raises(UnknownExtensionError, match=r"no pass 'spell-out-gelu'(.|\n)*spell-out-silu"):
        mobizo.Options(passes=("spell-out-gelu",))


def test_the_backend_keeps_the_contract(installed: Path) -> None:
    check_backend("torch-file")


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_line(installed: Path, tiny_model: Path, compile_options: tuple[str, ...], tmp_path: Path) -> None:
    """Compiled in a process of its own for the backend with the pass; then looked at, and trained."""
    listed = json.loads(run("passes", "--pass", "spell-out-silu", "--backend", "torch-file", "--json"))
    assert [step["name"] for step in listed["evaluate"]][-3:] == ["specialize", "mobizo_silu", "canonicalize"]
    assert "--pass spell-out-silu puts in a pass of mobizo_silu:insertion" in run("passes", "--backend", "eager")
    file, rows = tmp_path / "program.torch", tmp_path / "rows.csv"
    line = [sys.executable, "-m", "mobizo_compiler", "compile", tiny_model, "-o", file, "--quiet", *compile_options]
    line += ["--backend", "torch-file", "--pass", "spell-out-silu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(EXTENSIONS.parents[1])])}
    subprocess.run(line, env=environment, check=True)
    found = json.loads(run("inspect", file, "--json"))
    assert found["backend"] == "torch-file"
    assert "SpellOutSilu()" in found["history"]["train_step"]
    rows.write_text("text,tone\n" + "lovely day,happy\ngrim rain,sad\n" * 4)
    prompt = ("--template", r"Message :\n{text}", "--answer-column", "tone", "--learning-rate", "0.03")
    done = run("finetune", file, "--data", rows, "--run", tmp_path / "run", *prompt, "--steps", 2, "--json")
    assert json.loads(done)["steps"] == 2
