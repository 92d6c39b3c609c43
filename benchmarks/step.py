"""Time one training step beside its peers, in one process, in turns: same model, rows, adapters and threads.

    python -m benchmarks.step [--peers abcdef] [--rounds 7] [--threads 2] [--out runs/step] [options of a workload]

a  stock ExecuTorch inference of the rows of all lanes, 2qb, logits of the last position
b  PyTorch eager, the same MP-LoRA step (`mobizo_compiler/reference.py`)
c  the same with the model under torch.compile
d  MeZO one direction after the other around an inference program of ours: 2q calls of b rows, the rest on the host
e  PyTorch backpropagation of standard LoRA on qb rows, without and with gradient checkpointing
f  our step

Medians after a warm-up step of each; the ratios are what to quote. In the warm-up b, c, d and f use the same noise,
and the largest difference between their lane losses and ours is recorded. A peer that fails is listed as failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.compiled import CACHE, Compiled, Kind, compiled
from benchmarks.machine import describe, memory_mb, set_threads
from benchmarks.peers import Peer
from benchmarks.record import bar_chart
from benchmarks.workload import Workload
from examples.record import write_json

FILES: dict[str, Kind] = {"a": "stock", "b": "program", "c": "program", "d": "position", "f": "program"}
RATIOS = ("f/a", "f/b", "f/c", "d/f", "e/f", "e-checkpointed/f")
PAUSE = 0.1  # seconds between peers, in which the threads of the one before stop spinning


def main() -> None:
    """Compile what is not in the cache, measure, and leave step.json and step.png in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="abcdef", help="some of abcdef")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/step"))
    parser.add_argument("--cache", type=Path, default=CACHE, help="compiled programs are kept here")
    Workload.add_arguments(parser)
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    record = measure(workload, options.peers, options.rounds, options.threads, options.cache)
    write_json(options.out / "step.json", record)
    seconds = {letter: peer["median_seconds"] for letter, peer in record["peers"].items() if "median_seconds" in peer}
    bar_chart(
        options.out / "step.png",
        f"{workload.model}, q={workload.queries}, {workload.rows} rows of {workload.tokens} tokens",
        "seconds per step: median, least and most",
        {f"{letter}  {record['peers'][letter]['name']}": value for letter, value in seconds.items()},
        {
            f"{letter}  {peer['name']}": (peer["least_seconds"], peer["most_seconds"])
            for letter, peer in record["peers"].items()
            if letter in seconds
        },
    )
    show(record, Console(width=150))
    print(f"in {options.out}: step.json, step.png")


def measure(workload: Workload, letters: str, rounds: int, threads: int, cache: Path) -> dict[str, Any]:
    """Everything about one step, as JSON values."""
    files = {kind: compiled(kind, workload, cache) for kind in sorted({FILES[x] for x in letters if x in FILES})}
    record: dict[str, Any] = {
        "machine": describe() | {"threads": set_threads(threads)},
        "workload": dataclasses.asdict(workload),
        "rounds": rounds,
        "load_before": os.getloadavg(),
        "files": {kind: file.record for kind, file in files.items()},
    }
    found, record["peers"] = build(workload, letters, files)
    seconds: dict[str, list[float]] = {letter: [] for letter in found}
    losses: dict[str, torch.Tensor] = {}
    for letter in list(found):
        try:
            began = time.perf_counter()
            lane_losses = found[letter].warm_up(0)
            record["peers"][letter]["warm_up_seconds"] = round(time.perf_counter() - began, 4)
            if lane_losses is not None:
                losses[letter] = lane_losses.clone()
        except Exception as error:
            record["peers"][letter]["failed"] = f"{type(error).__name__}: {error}"
            del found[letter]
    for seed in range(1, rounds + 1):
        for letter, peer in found.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            peer.step(seed)
            seconds[letter].append(time.perf_counter() - began)
    for letter in found:
        values = seconds[letter]
        record["peers"][letter] |= {
            "median_seconds": round(statistics.median(values), 5),
            "least_seconds": round(min(values), 5),
            "most_seconds": round(max(values), 5),
        }
        if letter in losses and "f" in losses:
            difference = (losses[letter] - losses["f"]).abs().max()
            record["peers"][letter]["largest_difference_of_lane_losses"] = float(difference)
    medians = {letter: record["peers"][letter]["median_seconds"] for letter in found}
    pairs = [(ratio, *ratio.split("/")) for ratio in RATIOS]
    record["ratios"] = {
        name: round(medians[x] / medians[y], 3) for name, x, y in pairs if x in medians and y in medians
    }
    if {"program", "stock"} <= set(files):
        ours, stock = files["program"].record, files["stock"].record
        record["ratios"]["file, program/stock"] = round(ours["file_mb"] / stock["file_mb"], 3)
        record["ratios"]["compile seconds, program/stock"] = round(ours["total_seconds"] / stock["total_seconds"], 2)
    return record | {"load_after": os.getloadavg(), "process_memory_mb": memory_mb()}


def build(
    workload: Workload, letters: str, files: dict[Kind, Compiled]
) -> tuple[dict[str, Peer], dict[str, dict[str, Any]]]:
    """The peers, and a record of each by its letter."""
    model: Any = workload.load_model() if set(letters) & set("bce") else None
    sites, lora_a = files["program"].adapters() if set(letters) & set("bc") else ((), {})
    builders: dict[str, Callable[[], Peer]] = {
        "a": lambda: peers.stock_inference(workload, files["stock"].path),
        "b": lambda: peers.eager_step(workload, model, sites, lora_a),
        "c": lambda: peers.eager_step(workload, model, sites, lora_a, compiled=True),
        "d": lambda: peers.sequential_mezo(workload, files["position"].path),
        "e": lambda: peers.backpropagation(workload, model),
        "e-checkpointed": lambda: peers.backpropagation(workload, model, checkpointing=True),
        "f": lambda: peers.our_step(workload, files["program"].path),
    }
    if sites and model is not None:
        assert [site.fqn for site in sites] == workload.adapted(model), "peers adapt other layers than the program"
    found = {letter: make() for letter, make in builders.items() if letter[0] in letters}
    return found, {letter: {"name": peer.name} for letter, peer in found.items()}


def show(record: dict[str, Any], console: Console) -> None:
    """Steps, ratios and files as tables."""
    steps = Table("", "peer", "median s", "least", "most", "warm-up s", "lane losses from f", title="one step")
    for letter, peer in record["peers"].items():
        keys = ("median_seconds", "least_seconds", "most_seconds", "warm_up_seconds")
        cells = [f"{peer[key]:.4g}" if key in peer else "-" for key in keys]
        difference = peer.get("largest_difference_of_lane_losses")
        steps.add_row(letter, peer["name"], *cells, "" if difference is None else f"{difference:.1e}")
        if "failed" in peer:
            steps.add_row("", f"[red]failed: {peer['failed'].splitlines()[0]}")
    console.print(steps)
    console.print("   ".join(f"{name} {value}" for name, value in record["ratios"].items()))
    lowering = Table("file", "compile s", "phases", "peak MB", "MB", "method", "delegates", "outside", "planned MB")
    for kind, file in record["files"].items():
        phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in file["seconds"].items())
        cells = [kind, f"{file['total_seconds']:.0f}", phases, f"{file['peak_mb']:.0f}", f"{file['file_mb']:.1f}"]
        for name, method in file["methods"].items():
            planned = " + ".join(f"{size / 1e6:.2f}" for size in method["planned_bytes"])
            lowering.add_row(*cells, name, str(method["delegates"]), str(sum(method["outside"].values())), planned)
            cells = [""] * 5
    console.print(lowering)


if __name__ == "__main__":
    main()
