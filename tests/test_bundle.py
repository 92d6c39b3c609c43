"""Bundles: what a program computed where it was compiled, and the same calls anywhere else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig, cli
from mobizo_compiler.errors import ArtifactError, VerificationError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.bundle import LARGEST, NORM, OTHERS, Bundle, Expected, read_bundle

pytestmark = pytest.mark.xdist_group("bundle")  # one process, so that its programs are made once

WORDS = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))


def compiled(path: Path, change: float = 0.0, **options: Any) -> Path:
    """A program file, with one weight changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
    with torch.no_grad():
        model[1].weight[3, 5] += change
    options.setdefault("zo", ZOConfig(queries=2))
    return mobizo.compile(model, (WORDS,), LoraConfig(r=3), backend="portable", **options).save(path)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("bundle") / "program.pte")


@pytest.fixture(scope="module")
def bundle(program: Path) -> Path:
    return mobizo.write_bundle(program, program.with_name("program.bundle"))


def of_another(bundle: Path, program: Path, to: Path, **changed: torch.Tensor) -> Path:
    """The same bundle as if it had been made of another program, or with other tensors."""
    found = read_bundle(bundle)
    tensors = {**found.tensors, **changed}
    dataclasses.replace(found, program=checksum.of_file(program), tensors=tensors).write(to)
    return to


def test_what_was_computed_is_computed_again(program: Path, bundle: Path) -> None:
    found = mobizo.verify_bundle(program, bundle)
    names = ["evaluate/0", "evaluate/0", "step/0", "step/1", "step/2", "replayed/state", "again/state"]
    assert [name.partition(",")[0] for name in found] == names
    assert all(error == 0 for error, _ in found.values()), "it is the same engine"
    # ln 16 is the loss of a model that knows nothing: that much, times a share of 1e-4, and what six moves showed.
    assert 2.8e-4 < found["step/1, largest difference"][1] < 1e-3
    assert found["again/state, largest difference"][1] == 0
    assert [path.name for path in program.parent.iterdir() if path.name.startswith(".")] == [], "nothing is left behind"
    assert read_bundle(bundle).made_on["torch"] == torch.__version__


def test_the_same_program_gives_the_same_bundle(program: Path, bundle: Path, tmp_path: Path) -> None:
    one, other = read_bundle(bundle), read_bundle(mobizo.write_bundle(program, tmp_path / "again"))
    assert (one.program, one.calls, one.made_on) == (other.program, other.calls, other.made_on)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors | other.tensors)


def test_steps_begin_where_others_led(program: Path, tmp_path: Path) -> None:
    bundle = mobizo.write_bundle(program, tmp_path / "bundle", steps=3)
    found, tensors = mobizo.verify_bundle(program, bundle), read_bundle(bundle).tensors
    assert [f"step_{n}/1, largest difference" in found for n in (1, 2, 3)] == [True, True, False]
    states = [call.state for call in read_bundle(bundle).calls if call.method == "train_step"]
    assert states == ["start", "wanted replayed/state", "wanted replayed_1/state"] and int(tensors["seed_2"]) == 22


def test_one_wrong_weight_is_refused(bundle: Path, tmp_path: Path) -> None:
    wrong = compiled(tmp_path / "wrong.pte", change=0.05)
    with pytest.raises(ArtifactError, match="the bundle is of another program"):
        mobizo.verify_bundle(wrong, bundle)
    forged = of_another(bundle, wrong, tmp_path / "forged")
    with pytest.raises(VerificationError, match=r"evaluate/0: the largest difference is .* more than"):
        mobizo.verify_bundle(wrong, forged)


@pytest.mark.parametrize("value", ["step/1", "step/2", "replayed/state"])
def test_every_value_is_compared(value: str, program: Path, bundle: Path, tmp_path: Path) -> None:
    wanted = read_bundle(bundle).tensors[f"wanted {value}"]
    # A projected gradient may be off by what two losses may, over 2 eps.
    other = wanted + {"step/1": 1e-3, "step/2": 0.1, "replayed/state": 1e-6}[value]
    with pytest.raises(VerificationError, match=f"{value}: the "):
        mobizo.verify_bundle(program, of_another(bundle, program, tmp_path / "other", **{f"wanted {value}": other}))


def test_a_gradient_of_its_own_and_a_rule_that_remembers(tmp_path: Path) -> None:
    program = compiled(tmp_path / "exact.pte", zo=ZOConfig(estimator="exact"), rule="adamw")
    found = mobizo.verify_bundle(program, mobizo.write_bundle(program, tmp_path / "exact.bundle"))
    assert "step/state, norm of the difference" in found and not any("replay" in name for name in found)
    assert not Session(program).state().any(), "the program file is what it was"


def test_damage_and_other_files_are_refused(program: Path, bundle: Path, tmp_path: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[-3] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    (tmp_path / "cut").write_bytes(bundle.read_bytes()[:-8])
    (tmp_path / "foreign").write_bytes(program.read_bytes())
    problems = {"damaged": "its checksum is another", "cut": "cannot be read", "foreign": "cannot be read"}
    for name, problem in {**problems, "missing": "no such file"}.items():
        with pytest.raises(ArtifactError, match=problem):
            mobizo.verify_bundle(program, tmp_path / name)
    found = read_bundle(bundle)
    lacking = Bundle(
        found.program, found.made_on, found.calls, {n: t for n, t in found.tensors.items() if n != "start"}
    )
    lacking.write(tmp_path / "lacking")
    with pytest.raises(ArtifactError, match="no value 'start'"):
        mobizo.verify_bundle(program, tmp_path / "lacking")
    with pytest.raises(ArtifactError, match="there is no folder"):
        mobizo.write_bundle(program, tmp_path / "no" / "bundle")


def test_measures() -> None:
    inf, nan = float("inf"), float("nan")
    found, wanted = torch.tensor([1.0, inf, nan, 3.0]), torch.tensor([1.5, inf, nan, 3.0])
    assert Expected("a", "b", LARGEST, 0).error(found, wanted) == 0.5
    assert Expected("a", "b", LARGEST, 0).error(found, wanted.nan_to_num()) == inf
    assert Expected("a", "b", NORM, 0).error(torch.tensor([0.0, 3.0]), torch.tensor([4.0, 0.0])) == 5
    assert Expected("a", "b", OTHERS, 0).error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert Expected("a", "b", OTHERS, 0).error(torch.tensor([1]), torch.tensor([1, 2])) == inf


def test_commands(program: Path, tmp_path: Path) -> None:
    def run(*arguments: Any, code: int = 0) -> Any:
        result = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        return result

    said = run("bundle", program, "-o", tmp_path / "b")
    assert "7 values of 4 calls" in said.stdout and "mobizo_host verify" in said.stderr
    assert "step/1, largest difference: 0, of at most 0.000" in run("verify", program, tmp_path / "b").stdout
    found = json.loads(run("verify", program, tmp_path / "b", "--json").stdout)
    assert found["again/state, largest difference"] == {"found": 0.0, "allowed": 0.0}
    wrong = of_another(tmp_path / "b", program, tmp_path / "w", **{"wanted step/0": torch.tensor([0.0])})
    assert "[MBZ502] step/0: the largest difference is" in run("verify", program, wrong, code=1).stderr
