"""Peak resident memory of fresh processes that only load and run two steps.

    python -m benchmarks.memory [--children ...] [--threads 2] [--out runs/memory] [options of a workload]

stock             stock ExecuTorch inference of the rows of all lanes
train             our program, `train_step` alone
train-evaluate    our program, `train_step` and `evaluate`, both loaded and run
position          our inference program of b rows, which sequential MeZO would call
eager             PyTorch eager, the same MP-LoRA step
backprop          PyTorch backpropagation of LoRA on qb rows
checkpointed      the same with gradient checkpointing

The parent compiles what is missing; a child imports as little as it can. The peak is VmHWM; below it stands what a
process needs that imports the same and does nothing. Weights in a program file are mapped: RssFile at the end says how
much of the resident memory the system could drop, RssAnon how much it could not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, memory_mb, set_threads
from benchmarks.workload import Workload

RUNTIME = {
    "stock": ("stock", ("forward",)),
    "train": ("program", ("train_step",)),
    "train-evaluate": ("program", ("train_step", "evaluate")),
    "position": ("position", ("evaluate",)),
}
PYTORCH = ("eager", "backprop", "checkpointed")
BASELINES = {**dict.fromkeys(RUNTIME, "imports-runtime"), **dict.fromkeys(PYTORCH, "imports-pytorch")}
BASELINES["eager"] = "imports-compiler"
STEPS = 2


def main() -> None:
    """Measure every child, and leave memory.json and memory.png in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--children", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--child", choices=[*BASELINES, *BASELINES.values()], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    Workload.add_arguments(parser)
    options = parser.parse_args()
    workload = Workload.from_arguments(options)
    if options.child:
        print(json.dumps(child(options.child, workload, options.file, options.threads)))
    else:
        parent(workload, options)


def child(name: str, workload: Workload, file: Path | None, threads: int) -> dict[str, dict[str, float]]:
    """Memory after every stage, in this process."""
    run = prepare(name, file, threads)
    stages = {"imports": memory_mb()}
    if run is not None:
        steps = run(workload)
        stages["loaded"] = memory_mb()
        for number in range(STEPS):
            for step in steps:
                step(number)
            stages[f"step {number + 1}"] = memory_mb()
    return stages


def prepare(name: str, file: Path | None, threads: int) -> Callable[[Workload], list[Callable[[int], Any]]] | None:
    """Import what the child needs; what is returned loads it and gives the steps to run."""
    if name in RUNTIME or name == "imports-runtime":
        from executorch.runtime import Runtime

        set_threads(threads)

        def load(workload: Workload) -> list[Callable[[int], Any]]:
            program = Runtime.get().load_program(file)
            with contextlib.nullcontext() if name == "stock" else shared_packed_weights():
                return [runner(program.load_method(m), workload.call_arguments(m)) for m in RUNTIME[name][1]]

        def runner(method: Any, arguments: list[Any]) -> Callable[[int], Any]:
            return lambda seed: method.execute(arguments)

        return load if name in RUNTIME else None

    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    from benchmarks import peers

    torch.set_num_threads(threads)
    if name in ("eager", "imports-compiler"):
        from benchmarks.compiled import Compiled

        if name == "eager":
            assert file is not None
            sites, lora_a = Compiled(file, json.loads(file.with_suffix(".json").read_text())).adapters()
            return lambda workload: [peers.eager_step(workload, workload.load_model(), sites, lora_a).step]
    if name in ("backprop", "checkpointed"):
        ckpt = name == "checkpointed"
        return lambda workload: [peers.backpropagation(workload, workload.load_model(), checkpointing=ckpt).step]
    return None


def shared_packed_weights() -> contextlib.AbstractContextManager[None]:
    """How `Session` loads methods; imported from its file, because a host would not import the compiler."""
    file = Path(__file__).parent.parent / "backends" / "executorch" / "runtime_options.py"
    spec = importlib.util.spec_from_file_location("runtime_options", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shared: contextlib.AbstractContextManager[None] = module.shared_packed_weights()
    return shared


def parent(workload: Workload, options: argparse.Namespace) -> None:
    """Compile, run the children one after the other, and report."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.compiled import Kind, compiled
    from benchmarks.record import bar_chart
    from examples.record import write_json

    kinds: dict[str, Kind] = {name: RUNTIME[name][0] if name in RUNTIME else "program" for name in options.children}  # type: ignore[misc]
    files = {kind: compiled(kind, workload, options.cache) for kind in sorted(set(kinds.values()))}
    record: dict[str, Any] = {
        "machine": describe() | {"threads": options.threads},
        "workload": dataclasses.asdict(workload),
        "files": {kind: file.record for kind, file in files.items()},
        "children": {},
    }
    names = [*dict.fromkeys(BASELINES[name] for name in options.children), *options.children]
    for name in names:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--child", name]
        command += ["--threads", str(options.threads), *workload.to_arguments()]
        if name in kinds:
            command += ["--file", str(files[kinds[name]].path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            record["children"][name] = {"failed": done.stderr[-2000:]}
            continue
        stages = json.loads(done.stdout.splitlines()[-1])
        peak = list(stages.values())[-1]["VmHWM"]
        record["children"][name] = {"stages": stages, "peak_mb": peak}
        if name in BASELINES:
            baseline = record["children"][BASELINES[name]]["peak_mb"]
            record["children"][name] |= {"baseline_mb": baseline, "above_baseline_mb": round(peak - baseline, 1)}
    write_json(options.out / "memory.json", record)

    table = Table("MB", "peak", "of that imports", "above", "at the end: RssAnon", "RssFile", title="fresh processes")
    for name, found in record["children"].items():
        if "failed" in found:
            table.add_row(name, "[red]failed", found["failed"].splitlines()[-1][:80])
            continue
        end = list(found["stages"].values())[-1]
        values = [
            found["peak_mb"],
            found.get("baseline_mb"),
            found.get("above_baseline_mb"),
            end["RssAnon"],
            end["RssFile"],
        ]
        table.add_row(name, *("" if value is None else f"{value:.0f}" for value in values))
    Console(width=150).print(table)
    above = {n: c["above_baseline_mb"] for n, c in record["children"].items() if "above_baseline_mb" in c}
    title = f"{workload.model}, q={workload.queries}, {workload.rows} rows of {workload.tokens} tokens"
    bar_chart(options.out / "memory.png", title, "peak resident MB above imports", above, {})
    print(f"in {options.out}: memory.json, memory.png")


if __name__ == "__main__":
    main()
