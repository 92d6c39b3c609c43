"""Distributed runs: several processes, one state, and what happens when one of them is lost."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig, load
from mobizo_compiler.device import ranks
from mobizo_compiler.device.run import step_seed
from mobizo_compiler.errors import ConfigError, InputError, TokenRangeError
from tests.ranks import ROWS, TOKENS, VOCABULARY, batch

pytestmark = pytest.mark.xdist_group("ranks")
Program = Callable[[str], Path]
ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "two-sided": (ZOConfig(queries=3), "sgd"),
    "adam": (ZOConfig(queries=2), "adam"),
    "exact": (ZOConfig(estimator="exact"), "sgd"),
    "other": (ZOConfig(queries=2), "sgd"),
    "one-sided": (ZOConfig(queries=3, estimator="one-sided"), "sgd"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A program of `PROGRAMS`, compiled the first time that it is asked for."""
    folder = tmp_path_factory.mktemp("programs")

    @functools.cache
    def program(name: str) -> Path:
        zo, rule = PROGRAMS[name]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, 12), nn.Linear(12, VOCABULARY)).eval()
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=("1", "2"))
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
        path = folder / f"{name}.pte"
        mobizo.compile(model, (ids,), lora, zo, rule=rule, backend="portable").save(path)
        return path

    return program


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def together(folder: Path, count: int, programs: Sequence[Path], **task: Any) -> list[dict[str, Any]]:
    """What every rank found, each left to end by itself; empty for those that did not live to say so."""
    for old in folder.glob("found.*.json"):
        old.unlink()
    path = folder / "task.json"
    path.write_text(json.dumps({"programs": [str(program) for program in programs], "folder": str(folder), **task}))
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ranks", str(path)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | group | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(count)
    ]
    said = [process.communicate(timeout=300)[1].decode() for process in running]
    files = [folder / f"found.{rank}.json" for rank in range(count)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    for process, each, words in zip(running, found, said, strict=True):
        assert (process.returncode == 0) == ("losses" in each), words[-3000:]
    return found


def alone(program: Path, count: int, steps: int, rate: float) -> tuple[list[float], torch.Tensor]:
    """The same steps made one after the other by one session, without the code of ranks."""
    session = Session(program)
    losses = []
    for step in range(steps):
        seed = step_seed(3, step)
        before, found = session.state(), []
        for rank in range(count):
            ids, labels = batch(step * count + rank)
            found.append(session.train_step((ids,), labels, seed=seed, learning_rate=0.0))
            session.load_state(before)
        gradient = torch.stack([each.projected_gradient for each in found]).double().mean(dim=0)
        session.replay(seed, gradient.float(), rate)
        losses.append(sum(each.loss for each in found) / count)
    return losses, session.state()


@pytest.mark.slow
def test_a_rank_that_dies_is_noticed_and_the_run_goes_on(programs: Program, tmp_path: Path) -> None:
    program = programs("two-sided")
    first, dead = together(tmp_path, 2, [program], steps=9, rate=0.05, run=True, dies_at=2 * 5 + 1)  # rank 1, in step 5
    assert first["error"] == "MBZ606" and "a rank is gone" in first["problem"] and dead == {}
    found = together(tmp_path, 2, [program], steps=9, rate=0.05, run=True)
    losses, state = alone(program, 2, 9, 0.05)
    for each in found:
        assert each["ranks"] == 2 and each["resumed_at"] == 5
        assert torch.equal(torch.tensor(each["state"]), state) and state.any()
        torch.testing.assert_close(each["losses"], losses, rtol=1e-6, atol=0)
    session = Session(program)
    assert session.restore(tmp_path / "run") == 9 and torch.equal(session.state(), state)


@pytest.mark.slow
def test_a_run_with_nothing_left_to_do_leaves_one_state(programs: Program, tmp_path: Path) -> None:
    program = programs("two-sided")
    before = together(tmp_path, 2, [program], steps=3, rate=0.05, run=True)
    after = together(tmp_path, 2, [program], steps=3, rate=0.05, run=True)
    assert [each["state"] for each in after] == [before[0]["state"]] * 2 and after[0]["resumed_at"] == 3


@pytest.mark.slow
def test_a_run_goes_on_with_more_ranks(programs: Program, tmp_path: Path) -> None:
    program = programs("two-sided")
    before = together(tmp_path, 2, [program], steps=5, rate=0.05, run=True)
    after = together(tmp_path, 3, [program], steps=8, rate=0.05, run=True)
    assert [each["resumed_at"] for each in after] == [5] * 3 and after[0] == after[1] == after[2]
    assert after[0]["losses"][:5] == before[0]["losses"] and after[0]["state"] != before[0]["state"]
    session = Session(program)
    assert session.restore(tmp_path / "run") == 8 and session.state().tolist() == after[0]["state"]


@pytest.mark.slow
def test_a_rule_that_remembers_counts_a_step_once(programs: Program, tmp_path: Path) -> None:
    found = together(tmp_path, 2, [programs("adam")], steps=6, rate=0.05)
    _, state = alone(programs("adam"), 2, 6, 0.05)
    assert all(torch.equal(torch.tensor(each["state"]), state) for each in found)


@pytest.mark.slow
def test_an_exact_gradient_is_averaged(programs: Program, tmp_path: Path) -> None:
    found = together(tmp_path, 2, [programs("exact")], steps=4, rate=0.5)
    assert found[0] == found[1]
    session = Session(programs("exact"))
    for step in range(4):
        before, moved = session.state(), []
        for rank in range(2):
            ids, labels = batch(2 * step + rank)
            session.train_step((ids,), labels, seed=0, learning_rate=0.5)
            moved.append(session.state() - before)
            session.load_state(before)
        session.load_state((before.double() + torch.stack(moved).double().sum(dim=0) / 2).float())
    assert torch.equal(torch.tensor(found[0]["state"]), session.state()) and session.state().any()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what, code", [("wrong_at", "MBZ602"), ("lost_at", "OSError")])
def test_what_one_rank_gets_wrong_all_are_told(
    what: str, code: str, rank: int, programs: Program, tmp_path: Path
) -> None:
    began = time.monotonic()
    found = together(tmp_path, 2, [programs("two-sided")], steps=4, rate=0.05, **{what: 2 + rank})
    assert found[rank]["error"] == code
    if rank == 0 and what == "lost_at":  # before the others were told of a step
        assert found[1]["problem"] == "rank 0 failed"
    else:
        assert found[1 - rank] == {"error": "MBZ606", "problem": f"rank {rank} failed"}
    assert time.monotonic() - began < 50, "nobody waited for the timeout"


@pytest.mark.slow
def test_a_run_is_called_again_after_an_error(programs: Program, tmp_path: Path) -> None:
    program = programs("adam")
    found = together(tmp_path, 2, [program], steps=6, rate=0.05, run=True, wrong_at=5, again=True)
    assert found[0] == found[1] and found[0]["resumed_at"] == 2
    assert torch.equal(torch.tensor(found[0]["state"]), alone(program, 2, 6, 0.05)[1])


@pytest.mark.slow
def test_ranks_must_be_alike(programs: Program, tmp_path: Path) -> None:
    program = programs("two-sided")
    for other in ("other", "one-sided"):
        found = together(tmp_path, 2, [program, programs(other)], steps=1, rate=0.05)
        assert [each["problem"] for each in found] == ["rank 1 has another program than rank 0"] * 2
    found = together(tmp_path, 2, [program], state=True)
    assert all(each["error"] == "MBZ606" and "another state" in each["problem"] for each in found)
    found = together(tmp_path, 2, [program])
    assert all(each["error"] == "MBZ606" and "makes the step" in each["problem"] for each in found)


@pytest.mark.slow
def test_a_step_within_a_run_is_refused(programs: Program, tmp_path: Path) -> None:
    found = together(tmp_path, 2, [programs("two-sided")], steps=4, rate=0.05, meanwhile=1)
    assert [each["error"] for each in found] == ["MBZ101", "MBZ606"]


def test_clipped_and_remembered_gradients_have_no_mean(tiny_program: Path) -> None:
    manifest = load(tiny_program).manifest
    for zo, rule in ((ZOConfig(estimator="exact", clip=1.0), "sgd"), (ZOConfig(estimator="exact"), "adamw")):
        program: Any = SimpleNamespace(manifest=dataclasses.replace(manifest, zo=zo, rule={"name": rule}))
        with pytest.raises(ConfigError, match="have a mean over ranks"):
            ranks._check_average(program)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8])
def test_many_ranks_have_one_state_after_many_steps(count: int, programs: Program, tmp_path: Path) -> None:
    found = together(tmp_path, count, [programs("two-sided")], steps=200, rate=0.02, run=True)
    losses, state = alone(programs("two-sided"), count, 200, 0.02)
    assert all(torch.equal(torch.tensor(each["state"]), state) for each in found)
    torch.testing.assert_close(found[0]["losses"], losses, rtol=1e-6, atol=0)


def test_one_rank_is_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)).eval()
    lora, ids = LoraConfig(r=2, lora_alpha=4, target_modules=("1",)), torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    program = mobizo.compile(model, (ids,), lora, ZOConfig(queries=3), rule="adam", backend="eager")
    session, other = mobizo.DistributedSession(program), Session(program)
    try:
        with pytest.raises(RuntimeError, match="stop here"):
            session.finetune(stop_at(5), steps=8, learning_rate=0.05, run=tmp_path / "run", seed=3)
        found = session.finetune(batch, steps=8, learning_rate=0.05, run=tmp_path / "run", seed=3)
        assert found.resumed_at == 5
        assert found.losses == other.finetune(batch, steps=8, learning_rate=0.05, seed=3).losses
        assert torch.equal(session.state(), other.state()) and session.state().any()
        step: dict[str, Any] = {"seed": 9, "learning_rate": 0.1}
        one, two = (each.train_step(*batch(9), **step) for each in (session, other))
        assert one.loss == two.loss and torch.equal(session.state(), other.state())
        before = session.state()
        with pytest.raises(TokenRangeError):
            session.train_step(batch(9)[0] + VOCABULARY, batch(9)[1], **step)
        assert torch.equal(session.state(), before)
        with pytest.raises(ConfigError, match="step of all ranks"):
            session.finetune(
                batch, steps=1, learning_rate=0.05, on_step=lambda n, r: session.train_step(*batch(n), **step)
            )
        with pytest.raises(InputError):
            session.train_step(*batch(9), seed=-1, learning_rate=0.1)
    finally:
        ranks._leave()


def stop_at(step: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    def batches(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number == step:
            raise RuntimeError("stop here")
        return batch(number)

    return batches


def test_without_torchrun(tiny_program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        mobizo.DistributedSession(tiny_program)
