"""Peak memory of the C++ host of `examples/cpp_host` while it trains: no Python, no PyTorch.

    python -m benchmarks.host_memory build/cpp_host/mobizo_host [--threads 2] [--steps 3] [options of a workload]

The peak is VmHWM. Weights in a program file are mapped: RssFile says how much of the resident memory the system could
drop, RssAnon how much it could not, both after the last step. What is missing is compiled first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import mobizo_compiler as mobizo
from benchmarks.compiled import CACHE, compiled
from benchmarks.machine import describe, memory_mb
from benchmarks.workload import Workload
from examples.cpp_host.write_tokens import write_tokens


def main() -> None:
    """Train for some steps in a folder that is thrown away, and print what the process needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path, help="the program that CMake built")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    Workload.add_arguments(parser)
    parser.set_defaults(rows=2, tokens=64, targets="qv")
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    program = compiled("program", workload, options.cache)
    with tempfile.TemporaryDirectory() as folder:
        tokens, run = Path(folder) / "train.tokens", Path(folder) / "run"
        write_tokens(tokens, mobizo.load(program.path).manifest, [workload.batch()])
        places = [options.host.resolve(), program.path, tokens, run]
        arguments = ["--steps", options.steps, "--learning-rate", 1e-3, "--threads", options.threads]
        memory = measured([str(part) for part in (*places, *arguments)], options.steps)
    file_mb = round(program.path.stat().st_size / 1e6, 1)
    print(json.dumps({"workload": workload.to_arguments(), "file_mb": file_mb, **memory, **describe()}, indent=1))


def measured(command: list[str], steps: int) -> dict[str, float]:
    """Megabytes of the process after its last step, and at the most."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found: dict[str, float] = {}
        for line in process.stdout:
            if line.startswith(f"step {steps - 1} "):
                found = memory_mb(process.pid)
            elif line.startswith("peak memory"):
                found["VmHWM"] = round(int(line.split()[2]) / 1e3, 1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return found


if __name__ == "__main__":
    main()
