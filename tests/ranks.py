"""One rank of a distributed run, a process: `tests/test_ranks.py` starts it, and says what it is to do."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mobizo_compiler as mobizo
from mobizo_compiler import MobizoError

VOCABULARY, ROWS, TOKENS = 11, 2, 5


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Rows by their number, the same in every process."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=draw)
    return ids, ids


def work(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """Do a task, and say what came of it."""
    program = task["programs"][rank % len(task["programs"])]
    session = mobizo.DistributedSession(program, timeout_s=60)
    if "steps" not in task:  # a step called by hand
        if task.get("state"):
            session.load_state(torch.full_like(session.state(), 0.01 * (1 + rank)))
        before, (ids, labels) = session.state(), batch(rank)
        try:
            session.train_step((ids,), labels, seed=5 if task.get("state") else 5 + rank, learning_rate=0.1, eps=0.05)
        finally:
            assert torch.equal(session.state(), before), "the state after an error is what it was"
    goes_wrong = task.get("wrong_at")

    def batches(number: int) -> tuple[Any, Tensor]:
        nonlocal goes_wrong
        if number == task.get("dies_at"):
            os._exit(9)
        if number == task.get("lost_at"):
            raise FileNotFoundError("rows that are not there")
        if number == goes_wrong:
            goes_wrong = None  # the second time it is right
            return torch.full((ROWS, TOKENS), VOCABULARY + 5), batch(number)[1]
        return batch(number)

    def call_meanwhile(step: int, result: object) -> None:
        if step == task.get("meanwhile"):
            session.train_step(batch(0)[0], batch(0)[1], seed=1, learning_rate=0.0)

    run = Path(task["folder"]) / "run" if task.get("run") and not rank else None
    options: dict[str, Any] = {"steps": task["steps"], "learning_rate": task["rate"], "seed": 3}
    try:
        summary = session.finetune(batches, run=run, on_step=call_meanwhile, **options)
    except MobizoError:
        if not task.get("again"):
            raise
        summary = session.finetune(batches, run=run, **options)
    return {
        "losses": list(summary.losses),
        "resumed_at": summary.resumed_at,
        "state": session.state().tolist(),
        "ranks": session.ranks,
    }


def main() -> None:
    """Write what this rank found, or its error, and fail then."""
    task, rank = json.loads(Path(sys.argv[1]).read_text()), int(os.environ["RANK"])
    torch.set_num_threads(1)
    try:
        found = work(task, rank)
    except MobizoError as error:
        found = {"error": error.code, "problem": error.problem}
    except OSError as error:
        found = {"error": "OSError", "problem": str(error)}
    (Path(task["folder"]) / f"found.{rank}.json").write_text(json.dumps(found))
    if "error" in found:
        sys.exit(1)


if __name__ == "__main__":
    main()
