"""One rank of a distributed run, started by torchrun: `tests/test_ranks.py` says what it is to do."""

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


def work(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do a task, and say what came of it."""
    rank = int(os.environ["RANK"])
    session = mobizo.DistributedSession(task["programs"][rank % len(task["programs"])], timeout_s=60)
    if "steps" in task:

        def batches(number: int) -> tuple[Any, Tensor]:
            if number == task.get("dies_at"):
                os._exit(9)
            if number == task.get("wrong_at"):
                return torch.full((ROWS, TOKENS), VOCABULARY + 5), batch(number)[1]
            return batch(number)

        run = folder / "run" if task.get("run") and not rank else None
        summary = session.finetune(batches, steps=task["steps"], learning_rate=task["rate"], run=run, seed=3)
        losses, resumed = list(summary.losses), summary.resumed_at
    else:  # a step called by hand
        if task.get("state"):
            session.load_state(torch.full_like(session.state(), 0.01 * (1 + rank)))
        ids, labels = batch(rank)
        seed = 5 + rank * task.get("other_seed", 0)
        losses, resumed = [session.train_step((ids,), labels, seed=seed, learning_rate=0.1, eps=0.05).loss], 0
    return {"losses": losses, "resumed_at": resumed, "state": session.state().tolist(), "ranks": session.ranks}


def main() -> None:
    """Write what this rank found, or the code of its error, and fail then."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    try:
        found = work(json.loads((folder / "task.json").read_text()), folder)
    except MobizoError as error:
        found = {"error": error.code, "problem": error.problem}
    (folder / f"found.{os.environ['RANK']}.json").write_text(json.dumps(found))
    if "error" in found:
        sys.exit(1)


if __name__ == "__main__":
    main()
