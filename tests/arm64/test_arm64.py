"""Programs that were compiled on this machine, on 64-bit Arm under emulation, and runs that go there and back."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mobizo_compiler as mobizo
from examples.cpp_host.write_tokens import write_tokens
from mobizo_compiler import Session
from mobizo_compiler.device.journal import read_journal
from mobizo_compiler.device.run import JOURNAL, SNAPSHOT
from mobizo_compiler.format import checksum
from mobizo_compiler.format.bundle import read_bundle
from tests.arm64 import emulated, recipes

# One process, so that the host is built once.
pytestmark = [pytest.mark.slow, pytest.mark.arm64, pytest.mark.xdist_group("arm64")]

STEPS, LEARNING_RATE = 10, 0.01
BAD_DATA, OTHER_NUMBERS = 4, 7


class Machine:
    """The host on Arm, and the programs that it runs."""

    def __init__(self, host: Path, folder: Path) -> None:
        self.host, self.folder = host, folder

    @functools.cache  # noqa: B019  (one for all tests)
    def program(self, recipe: str, wrong: bool = False) -> Path:
        """A program file, compiled when it is first asked for."""
        return recipes.compiled(recipe, self.folder / f"{recipe}{'-wrong' * wrong}.pte", wrong)

    @functools.cache  # noqa: B019
    def bundle(self, recipe: str) -> Path:
        """Ten steps of a program on this machine."""
        return mobizo.write_bundle(self.program(recipe), self.folder / f"{recipe}.bundle", steps=STEPS)

    def tokens(self, recipe: str) -> Path:
        path = self.folder / f"{recipe}.tokens"
        write_tokens(path, mobizo.load(self.program(recipe)).manifest, recipes.batches())
        return path

    def run(self, processor: str, *arguments: object, code: int = 0) -> str:
        """Stdout of the host; its error where it is to fail."""
        command = emulated.on_arm(processor, self.host, *arguments, "--threads", "1")
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stderr if code else done.stdout

    def train(self, processor: str, recipe: str, run: Path, steps: int, *options: object) -> None:
        """Train in a run folder, which may have been begun elsewhere."""
        rate = ("--steps", steps, "--learning-rate", LEARNING_RATE)
        self.run(processor, self.program(recipe), self.tokens(recipe), run, *rate, *options)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    try:
        return Machine(emulated.host(), tmp_path_factory.mktemp("arm64"))
    except emulated.MissingToolError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.mark.parametrize("processor", emulated.PROCESSORS)
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_ten_steps(recipe: str, processor: str, machine: Machine) -> None:
    """Lane losses, gradients and states of every step within what was measured on this machine."""
    said = machine.run(processor, "verify", machine.program(recipe), machine.bundle(recipe))
    print(f"\n{recipe} on {processor}\n{said}")  # pytest -s shows how near they are
    assert len(re.findall(r"^step\w*/1: the largest difference", said, re.MULTILINE)) == STEPS
    assert said.endswith(" values agree\n")


def test_outer_products_of_bytes(machine: Machine) -> None:
    """The kernels for SME are right on an emulator that is, and one that is not is found out."""
    right = emulated.qemu_version() >= 9
    for recipe in ("8da8w", "8da4w"):
        command = (emulated.WITH_SME, "verify", machine.program(recipe), machine.bundle(recipe))
        said = machine.run(*command, code=0 if right else OTHER_NUMBERS)
        assert ("values agree" if right else "computes other numbers") in said


@pytest.mark.parametrize("recipe", ["float32", "8da4w"])
def test_one_wrong_weight_is_refused(recipe: str, machine: Machine, tmp_path: Path) -> None:
    processor, wrong, bundle = emulated.PROCESSORS[-1], machine.program(recipe, wrong=True), machine.bundle(recipe)
    assert "the bundle is of another program" in machine.run(processor, "verify", wrong, bundle, code=BAD_DATA)
    forged = dataclasses.replace(read_bundle(bundle), program=checksum.of_file(wrong))
    forged.write(tmp_path / "forged")
    assert "computes other numbers" in machine.run(processor, "verify", wrong, tmp_path / "forged", code=OTHER_NUMBERS)


def test_tokens_that_go_on(machine: Machine) -> None:
    program = machine.program("rademacher")
    wanted = list(Session(program).generate([1, 2, 3], 20))
    for processor in emulated.PROCESSORS:
        said = machine.run(processor, "generate", program, "--prompt", "1 2 3", "--steps", "20", "--quiet")
        assert list(map(int, said.split())) == wanted


def finetuned(machine: Machine, recipe: str, run: Path, steps: int) -> Tensor:
    """The state after so many steps of a run that this machine goes on with."""
    session = Session(machine.program(recipe))
    session.finetune(recipes.batches(), steps=steps, learning_rate=LEARNING_RATE, run=run)
    return session.state()


@pytest.mark.parametrize("recipe", ["float32", "8da4w", "rademacher"])
def test_a_run_goes_there_and_back(recipe: str, machine: Machine, tmp_path: Path) -> None:
    run, processor = tmp_path / "run", emulated.PROCESSORS[-1]
    finetuned(machine, recipe, run, 3)
    machine.train(processor, recipe, run, 6)
    here = finetuned(machine, recipe, run, 9)
    assert [record.step for record in read_journal(run / JOURNAL, mobizo.load(machine.program(recipe)))] == [*range(9)]
    (run / SNAPSHOT).unlink()
    machine.train(processor, recipe, run, 9, "--save", tmp_path / "there.ptd")
    session = Session(machine.program(recipe))
    session.import_ptd(tmp_path / "there.ptd")
    assert torch.equal(session.state(), here)


def test_a_thousand_steps_are_replayed(machine: Machine, tmp_path: Path) -> None:
    for recipe in ("float32", "rademacher"):
        run = tmp_path / recipe
        here = finetuned(machine, recipe, run, 1000)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(run, tmp_path / "copy")
        (tmp_path / "copy" / SNAPSHOT).unlink()
        machine.train(emulated.PROCESSORS[-1], recipe, tmp_path / "copy", 1000, "--save", tmp_path / "there.ptd")
        session = Session(machine.program(recipe))
        session.import_ptd(tmp_path / "there.ptd")
        assert torch.equal(session.state(), here)


def test_the_folder_is_all_that_it_needs(machine: Machine) -> None:
    """No torch, no Python, nothing of this machine but the C library."""
    folder = machine.host.parent
    files = [machine.host, *sorted((folder / "lib").iterdir())]
    names = {file.name for file in files}
    needed: set[str] = set()
    for file in files:
        said = subprocess.run(
            ["aarch64-linux-gnu-readelf", "-d", str(file)], capture_output=True, text=True, check=True
        )
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", said.stdout))
        assert re.search(r"RUNPATH.*\[\$ORIGIN", said.stdout) or file.parent.name == "lib"
    system = re.compile(r"(libc|libm|libdl|libpthread|ld-linux-aarch64)\.so\.\d+")
    assert all(system.fullmatch(name) for name in needed - names), needed - names
    size = sum(file.stat().st_size for file in files)
    print(f"\n{size / 1e6:.1f} MB: " + ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f}" for file in files))
    assert size < 20e6
