"""Files appear whole or not at all, and what processes that died left behind is removed by who writes next."""

from __future__ import annotations

import os
import signal
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.device.run import write_state
from mobizo_compiler.format.files import ScratchFolder, whole_file
from mobizo_compiler.text.plot import plot_run

pytestmark = pytest.mark.xdist_group("files")  # one process, so that its programs are made once

SIZE = 100_000


def in_a_child(work: Callable[[], object]) -> int:
    """How a process ends that does this."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at_the_rename(work: Callable[[], object]) -> None:
    """Do this in a process that is killed when all is written and nothing has its name yet."""

    def die(*names: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        os.replace = die  # type: ignore[assignment]
        work()

    assert os.WTERMSIG(in_a_child(child)) == signal.SIGKILL


@pytest.fixture(scope="module")
def session() -> Session:
    torch.manual_seed(0)
    model, words = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval(), torch.zeros(2, 5, dtype=torch.int64)
    lora, zo = LoraConfig(r=3, target_modules=("1",)), ZOConfig(queries=2)
    return Session(mobizo.compile(model, (words,), lora, zo, backend="portable"))


WRITERS: dict[str, Callable[[Session, Path], object]] = {
    "program.pte": lambda session, path: session.program.save(path),
    "state.ptd": lambda session, path: session.export_ptd(path),
    "snapshot.safetensors": lambda session, path: write_state(path, session, 1),
    "adapter_model.safetensors": lambda session, path: session.export_adapter(path.parent),
    "run.png": lambda session, path: plot_run({"summary": {"losses": [1.0, 0.5]}, "validations": []}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_next_writer_removes_what_killed_ones_left(name: str, session: Session, tmp_path: Path) -> None:
    for _ in range(3):
        killed_at_the_rename(lambda: WRITERS[name](session, tmp_path / name))
        assert len(list(tmp_path.iterdir())) == 1, "each removes what the one before it left"
    (other,) = tmp_path.iterdir()
    assert other.name.startswith(f".{name}.")
    foreign = tmp_path / f".{name}.settings"
    foreign.write_text("somebody's")
    killed_at_the_rename(lambda: WRITERS["program.pte"](session, tmp_path / "other.pte"))
    WRITERS[name](session, tmp_path / name)
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert foreign.name in left and len(left) == 2, "files of others stay, and those that are to become other files"
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.slow
def test_a_folder_of_compiled_programs(tmp_path: Path) -> None:
    """Its names are hashes: the next program in it has another one."""

    def compiled(seed: int) -> object:
        torch.manual_seed(seed)
        layer = nn.Sequential(nn.Linear(6, 5)).eval()
        options = {"loss": mobizo.MSELoss(), "backend": "portable", "cache_dir": tmp_path}
        return mobizo.compile(layer, (torch.ones(2, 6),), LoraConfig(r=2), ZOConfig(queries=1), **options)

    killed_at_the_rename(lambda: compiled(0))
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    compiled(1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pte"]


def test_living_writers_are_left_alone(tmp_path: Path) -> None:
    """Several processes write one file again and again, and each of them succeeds."""
    target, writers, turns = tmp_path / "file", 4, 100

    def write(content: bytes) -> None:
        for _ in range(turns):
            with whole_file(target) as file:
                file.write(content)
            assert len(set(target.read_bytes())) == 1 and target.stat().st_size == SIZE

    children = []
    for number in range(writers):
        child = os.fork()
        if child == 0:
            try:
                write(bytes([number]) * SIZE)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * writers
    assert list(tmp_path.iterdir()) == [target]

    with whole_file(target) as slow:
        slow.write(b"slow")
        assert in_a_child(lambda: write(b"q" * SIZE)) == 0
    assert target.read_bytes() == b"slow"


def test_temporary_folders_of_dead_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def die() -> None:
        (ScratchFolder().path / "program.pte").write_bytes(bytes(SIZE))
        os.kill(os.getpid(), signal.SIGKILL)

    living = ScratchFolder()
    in_a_child(die)
    (tmp_path / "mobizo-of-somebody").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    with ScratchFolder() as next_one:
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {living.path.name, next_one.path.name, "mobizo-of-somebody"}
    living.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["mobizo-of-somebody"]


def test_a_program_lies_in_such_a_folder(session: Session) -> None:
    path: Path = session.program.artifact.path  # type: ignore[attr-defined]
    assert path.parent.name.startswith(ScratchFolder.prefix) and (path.parent / ".lock").exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_are_those_that_the_process_gives(mask: int, mode: int, tmp_path: Path) -> None:
    def write() -> None:
        os.umask(mask)
        for name, asked in (("plain", 0o666), ("private", 0o600)):
            with whole_file(tmp_path / name, asked) as file:
                file.write(b"")

    assert in_a_child(write) == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"plain": mode, "private": 0o600}
