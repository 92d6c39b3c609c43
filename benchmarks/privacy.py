"""What differential privacy costs in accuracy: SmolLM2's head on review sentences, at several budgets and without one.

    python -m benchmarks.privacy [--epsilon 1 3 8] [--seed 0 1 2] [--steps 1000] [--output runs/privacy]

Every sentence of the training split is a row that is protected. Without a budget, rows are drawn and clipped in the
same way, and there is hardly any noise; "plain" is `finetune`, which does neither. Scores are those of held-out
sentences about other movies. What comes before the head is computed once for every sentence, by the first run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mobizo_compiler as mobizo
from benchmarks.machine import describe, set_threads
from benchmarks.tasks import TASKS, Batch, Choice, Options
from examples.demo import SETUPS
from examples.record import write_json
from examples.smollm2 import cache_folder, load_smollm2, load_tokenizer
from mobizo_compiler.device.private_run import clipped, slopes_of_rows
from mobizo_compiler.step.estimators import get_estimator

HEAD = SETUPS["head"]
ZO = dataclasses.replace(HEAD.zo, normalize=False, row_losses=True)
LITTLE_NOISE = 0.2  # the least that there is


def main() -> None:
    """Train once for every budget and seed, print, and leave privacy.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sample-rows", type=int, default=256, help="sentences of a step, on average")
    parser.add_argument("--row-clip", type=float, default=10.0)
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of plain runs, at the start; falls to 0")
    parser.add_argument("--private-rate", type=float, default=0.05, help="of the others, whose steps are shorter")
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/privacy"))
    options = parser.parse_args()
    set_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    task = TASKS["A"](load_tokenizer(), Options(None, options.held_out))
    assert isinstance(task, Choice)
    program = compiled(task)
    runs: list[dict[str, Any]] = []
    with_noise = [
        (f"epsilon {epsilon:g}", mobizo.Privacy(epsilon, row_clip=options.row_clip)) for epsilon in options.epsilon
    ]
    little = ("little noise", mobizo.Privacy(noise_multiplier=LITTLE_NOISE, row_clip=options.row_clip))
    session = mobizo.Session(program, prefix_cache=options.output / "prefix")
    lengths = lengths_of_rows(session, task)
    print(
        f"a row says {statistics.median(lengths):.2f} before the first step (median), {max(lengths):.2f} at most",
        flush=True,
    )
    runs.append({"what": "before", **task.scores(session.evaluate, HEAD.rows)})
    print(runs[-1], flush=True)
    for name, privacy in (("plain", None), little, *with_noise):
        for seed in options.seed:
            session.load_state(program.initial_state())
            start = time.monotonic()
            made = train(session, task, privacy, seed, options)
            minutes = (time.monotonic() - start) / 60
            found = {"what": name, "seed": seed, "minutes": round(minutes, 2), **made}
            runs.append(found | task.scores(session.evaluate, HEAD.rows))
            print(runs[-1], flush=True)
    settings = {
        name: getattr(options, name)
        for name in ("steps", "sample_rows", "row_clip", "learning_rate", "private_rate", "held_out")
    }
    described = {"machine": describe(), "rows": len(task.train), **settings, "queries": ZO.queries}
    write_json(options.output / "privacy.json", {**described, "says": statistics.median(lengths), "runs": runs})


def compiled(task: Choice) -> mobizo.Program:
    """The program of the demo's head whose steps return the losses of rows."""
    _, model = load_smollm2()
    inputs, _ = next(task.batches(HEAD.rows, seed=0))
    lora = HEAD.lora_of(model)
    folder = cache_folder() / "programs"
    return mobizo.compile(model, inputs, lora, ZO, task.loss, backend="xnnpack", split_prefix=True, cache_dir=folder)


def batch_of(task: Choice, numbers: Sequence[int]) -> Batch:
    """Sentences by their number."""
    inputs, labels, _ = task.prompter.encode([task.train[number] for number in numbers])
    return inputs, labels


def lengths_of_rows(session: mobizo.Session, task: Choice) -> list[float]:
    """How much some sentences say before the first step: the data that a bound is chosen by is not private then."""
    inputs, labels = batch_of(task, range(HEAD.rows))
    assert HEAD.eps is not None
    result = session.train_step(inputs, labels, seed=0, learning_rate=0.0, eps=HEAD.eps)
    assert result.row_losses is not None
    estimator = get_estimator(ZO.estimator)
    slopes_QR = slopes_of_rows(estimator, result.row_losses, torch.tensor([HEAD.eps]), ZO.queries)
    return [float(length) for length in clipped(slopes_QR, 1e9).norm(dim=0)]


def train(
    session: mobizo.Session, task: Choice, privacy: mobizo.Privacy | None, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """One run from the state that the session has, and what is spent."""
    highest = options.learning_rate if privacy is None else options.private_rate
    rate = mobizo.schedule("linear", highest, options.steps)
    settings: dict[str, Any] = {"steps": options.steps, "learning_rate": rate, "seed": seed, "eps": HEAD.eps}
    if privacy is None:
        batches = task.batches(HEAD.rows, seed)
        session.finetune(lambda step: next(batches), **settings)
        return {}
    privacy, spent = dataclasses.replace(privacy, sample_rows=options.sample_rows), dict[str, float]()

    def told(settled: mobizo.Privacy, accountant: Any, steps: int) -> None:
        assert settled.noise_multiplier is not None
        spent["noise_multiplier"] = settled.noise_multiplier
        spent["epsilon_spent"] = accountant.epsilon(options.steps)

    with tempfile.TemporaryDirectory() as folder:
        session.finetune_privately(
            lambda numbers: batch_of(task, numbers), len(task.train), privacy, run=folder, on_begin=told, **settings
        )
    return spent


if __name__ == "__main__":
    main()
