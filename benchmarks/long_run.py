"""Resident memory of a process over 20,000 steps, 50 epochs of 400 batches, in a run folder: a table and a plot.

    python -m benchmarks.long_run [--steps 20000] [--epoch 400] [--out runs/long]

A Llama of two narrow layers with random weights on XNNPACK, so that what grows is not hidden behind weights; two-sided
steps (q = 4) and exact ones, each in a process of its own. Every step is flushed to the journal as in any run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.machine import describe, memory_mb
from examples.record import write_json
from mobizo_compiler.drawing import BLUE, ORANGE, pyplot, write_figure

ESTIMATORS = ("two-sided", "exact")
SAMPLES = 100


def main() -> None:
    """Measure, print, and leave long_run.json and long_run.svg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--epoch", type=int, default=400, help="batches that are gone through again and again")
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--estimator", choices=ESTIMATORS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.estimator:
        print(json.dumps(train(options.estimator, options)))
        return
    script = ["-m", "benchmarks.long_run", "--out", str(options.out), "--steps", str(options.steps)]
    script += ["--epoch", str(options.epoch)]
    found, environment = {}, os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ESTIMATORS:
        command = [sys.executable, *script, "--estimator", name]
        found[name] = json.loads(
            subprocess.run(command, env=environment, check=True, capture_output=True).stdout.splitlines()[-1]
        )
        first, last = growth(found[name]["mb"])
        print(f"{name}: {first:.1f} MB in the second tenth of the run, {last:.1f} MB in the last")
    steps = {"steps": options.steps, "batches_of_an_epoch": options.epoch}
    write_json(options.out / "long_run.json", {"machine": describe(), **steps, "runs": found})
    draw(found, options.out / "long_run.svg")


def growth(megabytes: Sequence[float]) -> tuple[float, float]:
    """Means of the second and the last tenth: the first one loads and warms up."""
    tenth = max(1, len(megabytes) // 10)
    parts = (megabytes[tenth : 2 * tenth], megabytes[-tenth:])
    means = [sum(part) / len(part) for part in parts]
    return means[0], means[1]


def train(estimator: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Resident megabytes over a run, and after which steps."""
    import mobizo_compiler as mobizo

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.randint(0, 500, (options.epoch, 2, 16))
    path = options.out / f"{estimator}.pte"
    if not path.exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(vocab_size=500, num_key_value_heads=2, **sizes)).eval()
        zo = mobizo.ZOConfig(queries=1 if estimator == "exact" else 4, estimator=estimator)
        mobizo.compile(model, {"input_ids": ids[0]}, zo=zo, backend="xnnpack").save(path)
        del model
        # What compiling took is given back at the end of a process alone, so another one trains.
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.long_run", *sys.argv[1:]])
    session, after, megabytes = mobizo.Session(path), [], []

    def look(step: int, result: object) -> None:
        if step % max(1, options.steps // SAMPLES) == 0:
            after.append(float(step))
            megabytes.append(memory_mb(os.getpid())["VmRSS"])

    batches = [({"input_ids": rows}, rows) for rows in ids]
    run = options.out / f"{estimator}-{os.getpid()}"
    session.finetune(batches, steps=options.steps, learning_rate=1e-4, run=run, on_step=look)
    return {"after": after, "mb": megabytes}


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Resident memory over the steps of both runs."""
    figure, axes = pyplot("the plot").subplots(figsize=(7, 3), layout="constrained")
    for (name, values), colour, style in zip(found.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
        axes.plot(values["after"], values["mb"], style, label=name, color=colour)
    highest = max(max(values["mb"]) for values in found.values())
    axes.set(xlabel="step", ylabel="resident memory, MB", ylim=(0, 1.3 * highest))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_figure(figure, path)


if __name__ == "__main__":
    main()
