"""Rows per second of two ranks of one thread against one process of two threads, and what a step sends.

    python -m benchmarks.distributed [--ranks 2] [--steps 20] [--rounds 3] [--out runs/distributed]

SmolLM2, two-sided steps (q = 4, 2 rows of 64 tokens) on XNNPACK. The two ways run in turns, each in processes of its
own; the first steps of each are not counted. `--ranks 2` and one process use the same two cores. The bytes are those of
the tensors that a rank hands to torch.distributed, without what the network adds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.machine import describe, set_threads
from benchmarks.workload import Workload
from examples.record import write_json

WARM_UP, EXCHANGES = 3, 500


def main() -> None:
    """Measure, print, and leave distributed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
    parser.add_argument("--exchange", type=int, nargs="*", default=[2, 4, 8], help="ranks whose exchange is timed")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-exchange", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    workload = Workload("smollm2", queries=4, rows=2, tokens=64)
    program = options.out / "program.pte"
    if options.as_exchange:
        exchange(sum(numbers_of_a_step(workload)))
        return
    if options.as_rank or options.alone:
        work(program, workload, options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    compile_program(program, workload)
    seconds: dict[str, list[float]] = {"ranks": [], "alone": []}
    for _ in range(options.rounds):
        for name in seconds:
            threads = 1 if name == "ranks" else options.ranks
            seconds[name].append(run(f"--{name}".replace("ranks", "as-rank"), options.ranks, threads, options))
    rows = {"ranks": workload.rows * options.ranks, "alone": workload.rows}
    per_second = {name: rows[name] / statistics.median(values) for name, values in seconds.items()}
    record = {
        "machine": describe(),
        "ranks": options.ranks,
        "steps": options.steps,
        "step_seconds": seconds,
        "rows_per_second": per_second,
        "ratio": per_second["ranks"] / per_second["alone"],
        "bytes_of_a_step": 8 * sum(numbers_of_a_step(workload)),
        "exchange_seconds": {n: run("--as-exchange", n, 1, options) for n in options.exchange},
    }
    write_json(options.out / "distributed.json", record)
    print(f"{per_second['ranks']:.3f} rows/s with {options.ranks} ranks, {per_second['alone']:.3f} alone: ", end="")
    print(f"{record['ratio']:.3f}; {record['bytes_of_a_step']} bytes a step and rank")
    for ranks, spent in record["exchange_seconds"].items():
        print(f"{ranks} ranks: {1e3 * spent:.3f} ms for an exchange")


def numbers_of_a_step(workload: Workload) -> tuple[int, int]:
    """How many numbers of 8 bytes a rank gives all others in a step, and how many rank 0 tells them."""
    return 5 + 1 + 3 * workload.queries, 5


def compile_program(path: Path, workload: Workload) -> None:
    """The program of all ranks; once for all runs of this script."""
    if path.exists():
        return
    import mobizo_compiler as mobizo

    inputs, _ = workload.batch()
    zo = mobizo.ZOConfig(queries=workload.queries)
    mobizo.compile(workload.load_model(), inputs, workload.lora, zo, backend="xnnpack").save(path)


def run(what: str, ranks: int, threads: int, options: argparse.Namespace) -> float:
    """Seconds of a step or an exchange, the median of a run."""
    script = ["benchmarks.distributed", "--out", str(options.out), "--steps", str(options.steps), what]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    command = ["-m", *script] if what == "--alone" else [*torchrun, *script]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def exchange(numbers: int) -> None:
    """Gather that many numbers from all ranks, again and again; rank 0 prints the median time."""
    dist.init_process_group("gloo")
    given, times = torch.zeros(numbers, dtype=torch.float64), []
    found = [torch.empty_like(given) for _ in range(dist.get_world_size())]
    for _ in range(EXCHANGES):
        began = time.perf_counter()
        dist.all_gather(found, given)
        times.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": statistics.median(times)}))
    dist.destroy_process_group()


def work(program: Path, workload: Workload, options: argparse.Namespace) -> None:
    """Train, and print the median time of a step; of the ranks, number 0 prints."""
    import mobizo_compiler as mobizo

    set_threads(int(os.environ["OMP_NUM_THREADS"]))
    session = mobizo.DistributedSession(program) if options.as_rank else mobizo.Session(program)
    inputs, labels = workload.batch()
    times = []
    for step in range(WARM_UP + options.steps):
        began = time.perf_counter()
        session.train_step(inputs, labels, seed=step, learning_rate=1e-3)
        times.append(time.perf_counter() - began)
    if not options.as_rank or session.rank == 0:  # type: ignore[attr-defined]
        assert torch.isfinite(session.state()).all()
        print(json.dumps({"seconds": statistics.median(times[WARM_UP:])}))


if __name__ == "__main__":
    main()
