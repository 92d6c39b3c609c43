"""Distributed runs: several processes, one state, and what happens when one of them is lost."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
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
from mobizo_compiler.errors import ConfigError
from tests.ranks import ROWS, TOKENS, VOCABULARY, batch

pytestmark = pytest.mark.xdist_group("ranks")
Program = Callable[[str], Path]
ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "two-sided": (ZOConfig(queries=3), "sgd"),
    "adam": (ZOConfig(queries=2), "adam"),
    "exact": (ZOConfig(estimator="exact"), "sgd"),
    "other": (ZOConfig(queries=2), "sgd"),
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


def torchrun(folder: Path, count: int, programs: Sequence[Path], **task: Any) -> list[dict[str, Any]]:
    """What every rank found; empty for those that did not live to say so."""
    task = {"programs": [str(program) for program in programs], **task}
    (folder / "task.json").write_text(json.dumps(task))
    for old in folder.glob("found.*.json"):
        old.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run([*command, "-m", "tests.ranks", str(folder)], cwd=ROOT, capture_output=True, text=True)
    files = [folder / f"found.{rank}.json" for rank in range(count)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    assert (done.returncode == 0) == all("losses" in each for each in found), done.stderr[-3000:]
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


def test_a_rank_that_dies_is_noticed_and_the_run_goes_on(programs: Program, tmp_path: Path) -> None:
    program = programs("two-sided")
    torchrun(tmp_path, 2, [program], steps=9, rate=0.05, run=True, dies_at=2 * 5 + 1)  # rank 1, in step 5
    assert not (tmp_path / "found.1.json").exists()
    found = torchrun(tmp_path, 2, [program], steps=9, rate=0.05, run=True)
    losses, state = alone(program, 2, 9, 0.05)
    for each in found:
        assert each["ranks"] == 2 and each["resumed_at"] == 5
        assert torch.equal(torch.tensor(each["state"]), state) and state.any()
        torch.testing.assert_close(each["losses"], losses, rtol=1e-6, atol=0)
    session = Session(program)
    assert session.restore(tmp_path / "run") == 9 and torch.equal(session.state(), state)


@pytest.mark.slow
def test_a_run_goes_on_with_more_ranks(programs: Program, tmp_path: Path) -> None:
    program = programs("two-sided")
    before = torchrun(tmp_path, 2, [program], steps=5, rate=0.05, run=True)
    after = torchrun(tmp_path, 3, [program], steps=8, rate=0.05, run=True)
    assert [each["resumed_at"] for each in after] == [5] * 3 and after[0] == after[1] == after[2]
    assert after[0]["losses"][:5] == before[0]["losses"] and after[0]["state"] != before[0]["state"]
    session = Session(program)
    assert session.restore(tmp_path / "run") == 8 and session.state().tolist() == after[0]["state"]


@pytest.mark.slow
def test_a_rule_that_remembers_counts_a_step_once(programs: Program, tmp_path: Path) -> None:
    found = torchrun(tmp_path, 2, [programs("adam")], steps=6, rate=0.05)
    _, state = alone(programs("adam"), 2, 6, 0.05)
    assert all(torch.equal(torch.tensor(each["state"]), state) for each in found)


@pytest.mark.slow
def test_an_exact_gradient_is_averaged(programs: Program, tmp_path: Path) -> None:
    found = torchrun(tmp_path, 2, [programs("exact")], steps=4, rate=0.5)
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
def test_what_one_rank_gets_wrong_all_are_told(programs: Program, tmp_path: Path) -> None:
    # torchrun ends the ranks that are left soon after the first has failed, so either may have no time to say more.
    program = programs("two-sided")
    _, wrong = torchrun(tmp_path, 2, [program], steps=4, rate=0.05, wrong_at=3)
    assert wrong.get("error", "MBZ602") == "MBZ602"
    found = torchrun(tmp_path, 2, [program, programs("other")], steps=1, rate=0.05)
    assert any("rank 1 has another program" in each.get("problem", "") for each in found)
    found = torchrun(tmp_path, 2, [program], state=True)
    assert any("another state" in each.get("problem", "") for each in found)
    found = torchrun(tmp_path, 2, [program], other_seed=1)
    assert any("makes the step" in each.get("problem", "") for each in found)


def test_clipped_and_remembered_gradients_have_no_mean(programs: Program) -> None:
    manifest = load(programs("two-sided")).manifest
    for zo, rule in ((ZOConfig(estimator="exact", clip=1.0), "sgd"), (ZOConfig(estimator="exact"), "adamw")):
        program: Any = SimpleNamespace(manifest=dataclasses.replace(manifest, zo=zo, rule={"name": rule}))
        with pytest.raises(ConfigError, match="have a mean over ranks"):
            ranks._check_average(program)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8])
def test_many_ranks_have_one_state_after_many_steps(count: int, programs: Program, tmp_path: Path) -> None:
    found = torchrun(tmp_path, count, [programs("two-sided")], steps=200, rate=0.02, run=True)
    losses, state = alone(programs("two-sided"), count, 200, 0.02)
    assert all(torch.equal(torch.tensor(each["state"]), state) for each in found)
    torch.testing.assert_close(found[0]["losses"], losses, rtol=1e-6, atol=0)


def test_without_torchrun(programs: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        mobizo.DistributedSession(programs("two-sided"))
