"""The packages of examples/extensions, installed as pip would leave them: found by name, used from the command line."""

from __future__ import annotations

import importlib
import json
import os
import shutil
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
from mobizo_compiler.analysis.axes import AXIS_RULES, AxisRule
from mobizo_compiler.cli import app
from mobizo_compiler.errors import ExtensionUnavailableError, PassContractError, UnknownExtensionError
from mobizo_compiler.graph import program_text
from mobizo_compiler.step.losses import get_loss
from mobizo_compiler.step.rules import get_rule
from mobizo_compiler.testing import TinyCausalLM, check_against_oracle, check_backend, tiny_batch

EXTENSIONS = Path(__file__).parent.parent / "examples" / "extensions"
MODULES = sorted(file.stem for file in EXTENSIONS.glob("*/*.py"))


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
    """A folder on the path with all packages, of which none is imported before or after."""
    folder = tmp_path / "site"
    for source in EXTENSIONS.iterdir():
        install(source.name, folder)
    forget()
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget()


def forget() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


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
    report = check_against_oracle(TinyCausalLM(layers=1).eval(), inputs, backend="eager", passes=["spell-out-silu"])
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


@pytest.mark.slow
def test_the_backend_keeps_the_contract(installed: Path) -> None:
    check_backend("torch-file")


@pytest.mark.parametrize(
    ("package", "test"),
    [
        ("leave_one_out_estimator", "test_leave_one_out"),
        ("lion_rule", "test_lion"),
        ("focal_loss", "test_focal"),
        ("scan_axis_rule", "test_scan"),
    ],
)
def test_the_tests_of_what_a_step_is_made_of(
    package: str, test: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that authors copy; `tests/test_suites.py` has what the suites find wrong."""
    monkeypatch.syspath_prepend(EXTENSIONS / package)
    getattr(importlib.import_module(test), test)()


def test_an_operator_whose_rule_is_in_a_package(installed: Path) -> None:
    """The rule is found by the name of the operator, and loaded when a graph has it."""
    assert AXIS_RULES.names()["mobizo_scan.scan"] == "mobizo_scan:SCAN" and "mobizo_scan" not in sys.modules
    assert AXIS_RULES.load("mobizo_scan.scan").to_json() == {
        "operators": ["mobizo_scan::scan"],
        "function": "mobizo_scan:rows_of_scan",
    }
    sys.modules["mobizo_scan"].SCAN = AxisRule(("mobizo_scan::other",), print)  # type: ignore[attr-defined,arg-type]
    with pytest.raises(ExtensionUnavailableError, match="the rule of mobizo_scan::other, not of mobizo_scan::scan"):
        AXIS_RULES.load("mobizo_scan.scan")


METHOD = ("--rule", "lion", "--rule-options", '{"beta1": 0.8}', "--estimator", "leave-one-out", "--zo-queries", "3")
METHOD += ("--loss", "focal", "--loss-options", '{"gamma": 1.5}')


@pytest.mark.slow
def test_estimator_rule_and_loss_from_the_command_line(installed: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Compiled by name; opened and trained with the packages, and without them in a process that never saw them."""
    file, rows = tmp_path / "program.pte", tmp_path / "rows.csv"
    rows.write_text("text,tone\n" + "lovely day,happy\ngrim rain,sad\n" * 4)
    run("compile", tiny_model, "-o", file, "--quiet", "--tokens", "12", "--backend", "portable", *METHOD)
    found = json.loads(run("inspect", file, "--json"))
    assert found["rule"] == {"name": "lion", "weight_decay": 0.0, "beta1": 0.8, "beta2": 0.99}
    assert (found["loss"], found["zo"]["estimator"], found["lanes"]) == (
        {"name": "focal", "gamma": 1.5},
        "leave-one-out",
        3,
    )
    manifest = mobizo.load(file).manifest
    assert [type(v).__name__ for v in (get_rule(manifest.rule), get_loss(manifest.loss))] == ["Lion", "FocalLoss"]
    prompt = ["--template", r"Message :\n{text}", "--answer-column", "tone", "--learning-rate", "0.001"]
    finetune = ["finetune", file, "--data", rows, *prompt, "--steps", "2", "--json", "--quiet"]
    assert json.loads(run(*finetune, "--run", tmp_path / "with"))["steps"] == 2
    environment = {**os.environ, "PYTHONPATH": str(EXTENSIONS.parents[1])}
    line = [sys.executable, "-m", "mobizo_compiler", *finetune, "--run", tmp_path / "without"]
    done = subprocess.run(line, env=environment, check=True, capture_output=True)
    assert json.loads(done.stdout)["steps"] == 2
    journals = [(tmp_path / name / "journal").read_bytes() for name in ("with", "without")]
    assert journals[0] == journals[1]


def test_options_from_a_file(installed: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "options.toml"
    config.write_text(
        '[compile]\ntokens = 5\nbackend = "portable"\n[compile.rule]\nrule = "lion"\noptions = {beta2 = 0.5}\n'
        '[compile.loss]\nkind = "focal"\n[compile.zo]\nestimator = "leave-one-out"\n'
    )
    text = run("compile", tiny_model, "--config", config, "--dry-run", "--quiet", "--loss-options", '{"gamma": 3}')
    text = " ".join(text.split())
    assert "focal(gamma=3)" in text and "lion(weight_decay=0.0, beta1=0.9, beta2=0.5)" in text
    assert "leave-one-out, 4 queries, 4 lanes" in text


def test_the_list_of_extensions(installed: Path) -> None:
    """Everything is there with its package, and what is broken is named and harms nothing."""
    (installed / "mobizo_lion.py").write_text("raise OSError('liblion.so is missing')\n")
    listed = {(row["kind"], row["name"]): row for row in json.loads(run("extensions", "--json"))}
    origins = {key: row["origins"][0]["distribution"] for key, row in listed.items()}
    assert origins["estimator", "leave-one-out"] == "mobizo-leave-one-out 0.1.0"
    assert origins["axis rule", "mobizo_scan.scan"] == "mobizo-scan 0.1.0"
    assert origins["pass", "spell-out-silu"] == "mobizo-silu 0.1.0"
    assert origins["loss", "causal-lm"] == origins["axis rule", "softmax"] == f"mobizo-compiler {mobizo.__version__}"
    assert {key for key, row in listed.items() if row["reason"] is not None} == {("update rule", "lion")}
    assert "liblion.so is missing" in listed["update rule", "lion"]["reason"]
    table = run("extensions")
    assert "leave-one-out" in table and "operators of torch" in table and "liblion.so" in table


@pytest.mark.slow
def test_all_packages_installed_by_pip(tmp_path: Path) -> None:
    """Built and installed as a user would, and listed by a process that was told nothing else."""
    folder = tmp_path / "site"
    shutil.copytree(EXTENSIONS, tmp_path / "source")  # building leaves files beside the source
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    sources = sorted((tmp_path / "source").iterdir())
    subprocess.run([*pip, "--no-build-isolation", "--target", folder, *sources], check=True, timeout=600)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(EXTENSIONS.parents[1])])}
    line = [sys.executable, "-m", "mobizo_compiler", "extensions", "--json"]
    done = subprocess.run(line, env=environment, check=True, capture_output=True, text=True)
    found = {row["name"]: row["reason"] for row in json.loads(done.stdout)}
    names = ["leave-one-out", "lion", "focal", "mobizo_scan.scan", "spell-out-silu", "torch-file"]
    assert [found[name] for name in names] == [None] * len(names)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_line(installed: Path, tiny_model: Path, compile_options: tuple[str, ...], tmp_path: Path) -> None:
    """Compiled for the backend with the pass; then looked at, and trained."""
    listed = json.loads(run("passes", "--pass", "spell-out-silu", "--backend", "torch-file", "--json"))
    assert [step["name"] for step in listed["evaluate"]][-3:] == ["specialize", "mobizo_silu", "canonicalize"]
    assert "--pass spell-out-silu puts in a pass of mobizo_silu:insertion" in run("passes", "--backend", "eager")
    file, rows = tmp_path / "program.torch", tmp_path / "rows.csv"
    options = (*compile_options, "--backend", "torch-file", "--pass", "spell-out-silu")
    run("compile", tiny_model, "-o", file, "--quiet", *options)
    found = json.loads(run("inspect", file, "--json"))
    assert found["backend"] == "torch-file"
    assert "SpellOutSilu()" in found["history"]["train_step"]
    rows.write_text("text,tone\n" + "lovely day,happy\ngrim rain,sad\n" * 4)
    prompt = ("--template", r"Message :\n{text}", "--answer-column", "tone", "--learning-rate", "0.03")
    done = run("finetune", file, "--data", rows, "--run", tmp_path / "run", *prompt, "--steps", 2, "--json")
    assert json.loads(done)["steps"] == 2
