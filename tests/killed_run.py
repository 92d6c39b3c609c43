"""Train, be killed, go on: run by `test_journal.py` and `test_exact.py` as a process of its own, because it forks.

    python -m tests.killed_run PROGRAM FOLDER KILLS STEPS

A child trains in FOLDER and is killed at a random instant; the next one goes on; after each, the restored state must be
that of an uninterrupted run with as many steps, and no step that the child reported may be missing. Where steps are
gradients, which records cannot repeat, a copy of FOLDER goes on in this process to where its journal ends.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mobizo_compiler as mobizo
from mobizo_compiler.device.run import OnStep, RunSummary, step_seed
from mobizo_compiler.testing import tiny_batch

Batch = Callable[[int], tuple[Any, torch.Tensor]]
LEARNING_RATE, EPS = 0.05, 0.01


def batches(program: mobizo.Program) -> Batch:
    """Of the model that the program is of: one layer of tokens, or `TinyCausalLM`."""

    def tokens(step: int) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        drawn = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(step))
        return (drawn,), drawn

    return tokens if len(program.manifest.inputs) == 1 else lambda step: tiny_batch(seed=step)


def train(
    program: mobizo.Program, folder: Path, steps: int, on_step: OnStep | None = None
) -> tuple[mobizo.Session, RunSummary]:
    session = mobizo.Session(program)
    summary = session.finetune(
        batches(program),
        steps=steps,
        learning_rate=LEARNING_RATE,
        eps=EPS,
        run=folder,
        snapshot_every=3,
        on_step=on_step,
    )
    return session, summary


def report(to: int, step: int, result: mobizo.StepResult) -> None:
    os.write(to, b".")


def restored(program: mobizo.Program, folder: Path) -> tuple[torch.Tensor, int]:
    """The state that the run in a folder goes on from, and its steps."""
    if not program.manifest.zo.differentiates:
        session = mobizo.Session(program)
        steps = session.restore(folder)
        return session.state(), steps
    again = folder.with_name("again")
    shutil.copytree(folder, again)
    session, summary = train(program, again, steps=0)
    shutil.rmtree(again)
    return session.state(), summary.steps


def survives(program: mobizo.Program, folder: Path, kills: int, steps: int) -> None:
    """Run this module on a program, in a folder of its own."""
    file = program.save(folder / "program.pte")
    (folder / "run").mkdir()
    command = [sys.executable, "-m", "tests.killed_run", str(file), str(folder / "run"), str(kills), str(steps)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{kills} kills" in done.stdout


def main() -> None:
    file, folder, kills, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", mobizo.JournalWarning)
    program = mobizo.load(file)
    session = mobizo.Session(program)
    states, batch = [session.state()], batches(program)
    for step in range(steps):
        inputs, labels = batch(step)
        session.train_step(inputs, labels, seed=step_seed(0, step), learning_rate=LEARNING_RATE, eps=EPS)
        states.append(session.state())
    rng = random.Random(0)
    before = killed = torn = 0
    while killed < kills:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            train(program, folder, steps, functools.partial(report, write))
            os._exit(0)
        os.close(write)
        reported = len(os.read(read, 1)) if rng.random() < 0.8 else 0  # else also before the first step
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        with os.fdopen(read, "rb") as reports:
            reported += len(reports.read())
        found = 0
        if (folder / "journal").exists():
            torn += ((folder / "journal").stat().st_size - 64) % (24 + 4 * program.manifest.zo.queries) != 0
            state, found = restored(program, folder)
            assert torch.equal(state, states[found]), f"after {killed} kills, at step {found}"
        assert before + reported <= found <= before + reported + 1, (before, reported, found)
        before = found
        if found == steps:  # start over, so that there is something left to kill
            before = 0
            for path in folder.iterdir():
                path.unlink()
    print(f"{killed} kills, {torn} torn records")


if __name__ == "__main__":
    main()
