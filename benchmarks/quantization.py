"""What quantizing the base weights does to zeroth-order training, on SmolLM2 and review sentences.

    python -m benchmarks.quantization quality [--recipes ...] [--backend eager] [--seeds 64] [--out runs/quantization]
    python -m benchmarks.quantization exact [--recipes none 8da8w 8da4w] [--backend xnnpack] [--seeds 8]
    python -m benchmarks.quantization cost [--recipes none 8da8w 8da4w] [options of a workload]
    python -m benchmarks.quantization publish runs/demo runs/demo-8da8w ...

quality   For each recipe and eps: the projected gradients of the same seeds as in float32, as a vector of all queries,
          and its cosine with that of float32 at the same eps and at eps 0.01. The program is the demo's, the sentences
          are the demo's, and the adapter is off its zero start, as after some training.
exact     The exact gradient of the demo's program in every recipe, and its cosine with that of float32, batch by batch.
cost      Seconds of a step (medians, programs in turns), of PyTorch's eager float32 MP-LoRA step beside them, megabytes
          of the file, and peak resident memory of a fresh process that loads the program and runs two steps.

publish   Write docs/quantization_measured.json from what the others and the demo (`python -m examples.demo
          --quantization 8da8w --output runs/demo-8da8w`) have left behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mobizo_compiler as mobizo
from benchmarks.compiled import CACHE, compiled
from benchmarks.machine import describe, set_threads
from benchmarks.workload import Workload
from examples.record import write_json
from mobizo_compiler.quantization.weights import RECIPES

EPS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.5e-1, 3e-1)
REFERENCE_EPS = 1e-2
STATE_SCALE = 2e-2  # standard deviation of B after the demo's training
STEPS = 7


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "exact", "cost", "publish"))
    parser.add_argument("demos", nargs="*", type=Path, help="folders of the demo, for `publish`")
    parser.add_argument("--recipes", nargs="+", choices=("none", *RECIPES))
    parser.add_argument("--backend", default="eager", help="engine of `quality` and `exact`")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--eps", nargs="+", type=float, default=EPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    Workload.add_arguments(parser)
    options = parser.parse_args()
    set_threads(options.threads)
    {"quality": quality, "exact": exact, "cost": cost, "publish": publish}[options.what](options)


def quality(options: argparse.Namespace) -> None:
    """Projected gradients of all recipes; one JSON file per backend, to which later runs add."""
    path = options.out / f"quality-{options.backend}.json"
    record = json.loads(path.read_text()) if path.exists() else {"gradients": {}}
    record |= {"machine": describe(), "backend": options.backend, "seeds": options.seeds, "state_scale": STATE_SCALE}
    for recipe in options.recipes or ("none", *RECIPES):
        session, batch = demo_session(recipe, options.backend, "all-blocks")
        found = {str(eps): gradients(session, batch, eps, options.seeds) for eps in options.eps}
        record["gradients"][recipe] = record["gradients"].get(recipe, {}) | found
        write_json(path, record)
    if str(REFERENCE_EPS) in record["gradients"].get("none", {}):
        show_quality(record)
    print(f"in {path}")


def exact(options: argparse.Namespace) -> None:
    """Cosines of exact gradients, each recipe's with float32's on the same batch; every batch is another seed."""
    record: dict[str, Any] = {"machine": describe(), "backend": options.backend, "state_scale": STATE_SCALE}
    of_float32: list[Tensor] = []
    for recipe in ("none", *(name for name in options.recipes or ("8da8w", "8da4w") if name != "none")):
        session, batch = demo_session(recipe, options.backend, "exact")
        found = [exact_gradient(session, *batch(seed)) for seed in range(options.seeds)]
        of_float32 = of_float32 or found
        cosine = [float(torch.cosine_similarity(*both, dim=0)) for both in zip(found, of_float32, strict=True)]
        ratio = [float(one.norm() / other.norm()) for one, other in zip(found, of_float32, strict=True)]
        record[recipe] = {"cosine": cosine, "norm": ratio}
        print(
            f"{recipe}: cosine {statistics.median(cosine):.4f} ({min(cosine):.4f} to {max(cosine):.4f}), "
            f"norm {statistics.median(ratio):.3f} of float32's, {len(found)} batches",
            flush=True,
        )
        write_json(options.out / f"exact-{options.backend}.json", record)


def exact_gradient(session: mobizo.Session, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The gradient of the mean loss, float64: what a step of plain SGD with learning rate 1 takes from the state."""
    before = session.state()
    session.train_step(inputs, labels, seed=0, learning_rate=1.0)
    gradient = before.double() - session.state().double()
    session.load_state(before)
    return gradient


def demo_session(
    recipe: str, backend: str, setup_name: str
) -> tuple[mobizo.Session, Callable[[int], tuple[dict[str, Tensor], Tensor]]]:
    """The demo's program with the adapters of a setup and that recipe, and its batches by seed."""
    from examples.demo import SETUPS, TOKENS, example_inputs
    from examples.rotten_tomatoes import Prompter, by_label, load_sentences, split_by_movie
    from examples.smollm2 import cache_folder, load_smollm2

    tokenizer, model = load_smollm2()
    prompter, setup = Prompter(tokenizer, TOKENS), SETUPS[setup_name]
    train = split_by_movie(load_sentences())["train"]
    classes = by_label(train)

    def batch(seed: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = random.Random(seed)
        chosen = [generator.choice(members) for members in classes for _ in range(setup.rows // 2)]
        return prompter.encode(chosen)[:2]

    program = mobizo.compile(
        model,
        example_inputs(prompter, setup.rows),
        lora=setup.lora_of(model),
        zo=setup.zo,
        loss=mobizo.ChoiceLoss(prompter.answers),
        quantization=None if recipe == "none" else recipe,
        backend=backend,
        cache_dir=None if backend == "eager" else cache_folder() / "programs",
        progress=lambda line: print(f"{recipe}: {line}", flush=True),
    )
    session = mobizo.Session(program)
    noise = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * STATE_SCALE
    session.load_state(session.state() + noise)  # A that is trained has its own values
    return session, batch


def gradients(
    session: mobizo.Session, batch: Callable[[int], tuple[dict[str, Tensor], Tensor]], eps: float, seeds: int
) -> list[float]:
    """Projected gradients of all queries of all seeds, each seed on a batch of its own."""
    values: list[float] = []
    for seed in range(seeds):
        inputs, labels = batch(seed)
        result = session.train_step(inputs, labels, seed=seed, learning_rate=0.0, eps=eps)
        values += result.projected_gradient.tolist()
    return values


def cosines(record: dict[str, Any], of_float32: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """By recipe and eps: cosine with float32 at the same eps, and at the reference eps."""
    reference = (of_float32 or record)["gradients"]["none"]
    at_reference = torch.tensor(reference[str(REFERENCE_EPS)], dtype=torch.float64)
    found: dict[str, dict[str, Any]] = {}
    for recipe, by_eps in record["gradients"].items():
        for eps, values in by_eps.items():
            if eps not in reference:
                continue
            g = torch.tensor(values, dtype=torch.float64)
            same = torch.tensor(reference[eps], dtype=torch.float64)
            common = min(len(g), len(same))
            found.setdefault(recipe, {})[eps] = [
                round(float(torch.cosine_similarity(g[:common], other[:common], dim=0)), 4)
                for other in (same, at_reference)
            ]
    return found


def show_quality(record: dict[str, Any]) -> None:
    """A row per recipe, a column per eps."""
    found = cosines(record)
    columns = sorted({eps for by_eps in found.values() for eps in by_eps}, key=float)
    table = Table("recipe", *columns, title=f"{record['backend']}: cosine with float32 at the same eps / at eps 0.01")
    for recipe, by_eps in found.items():
        table.add_row(recipe, *(" / ".join(f"{c:.3f}" for c in by_eps[e]) if e in by_eps else "" for e in columns))
    Console(width=130).print(table)


def cost(options: argparse.Namespace) -> None:
    """Step, file and memory of every recipe, beside float32 and PyTorch."""
    from benchmarks import peers

    base = Workload.from_arguments(options)
    recipes = options.recipes or ["none", "8da8w", "8da4w"]
    record: dict[str, Any] = {"machine": describe() | {"threads": options.threads}, "recipes": {}}
    files = {}
    for recipe in recipes:
        workload = dataclasses.replace(base, quantization=None if recipe == "none" else recipe)
        files[recipe] = compiled("program", workload, options.cache)
        record["recipes"][recipe] = {
            "file_mb": files[recipe].record["file_mb"],
            "compile_seconds": files[recipe].record["total_seconds"],
            "compile_peak_mb": files[recipe].record["peak_mb"],
            "delegates": {name: m["delegates"] for name, m in files[recipe].record["methods"].items()},
            "memory": peak_of_a_process(workload, files[recipe].path, options.threads),
        }
    inputs, labels = base.batch()
    steps: dict[str, Callable[[int], Any]] = {}
    for recipe, file in files.items():
        session = mobizo.Session(file.path)
        steps[recipe] = lambda seed, session=session: session.train_step(
            inputs, labels, seed=seed, learning_rate=1e-3, eps=0.03
        )
    sites, lora_a = files[recipes[0]].adapters()
    steps["eager"] = peers.eager_step(base, base.load_model(), sites, lora_a).step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + STEPS):
        for name, step in steps.items():
            start = time.perf_counter()
            step(turn)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    record |= {"workload": dataclasses.asdict(base), "seconds": seconds, "medians": medians}
    write_json(options.out / "cost.json", record)
    table = Table("recipe", "step s", "x float32", "x eager", "file MB", "x float32", "peak MB", "compile s")
    first = record["recipes"][recipes[0]]
    for recipe in recipes:
        found = record["recipes"][recipe]
        table.add_row(
            recipe,
            f"{medians[recipe]:.3f}",
            f"{medians[recipe] / medians[recipes[0]]:.3f}",
            f"{medians[recipe] / medians['eager']:.3f}",
            f"{found['file_mb']:.1f}",
            f"{found['file_mb'] / first['file_mb']:.3f}",
            f"{found['memory']:.0f}",
            f"{found['compile_seconds']:.0f}",
        )
    table.add_row("PyTorch eager, float32", f"{medians['eager']:.3f}", "", "1", "", "", "", "")
    Console(width=130).print(table)
    print(f"in {options.out / 'cost.json'}")


def publish(options: argparse.Namespace) -> None:
    """The numbers of the page docs/quantization.md."""
    records = {
        engine: json.loads(path.read_text())
        for engine in ("eager", "xnnpack")
        if (path := options.out / f"quality-{engine}.json").exists()
    }
    measured: dict[str, Any] = {"eps": [str(eps) for eps in EPS if any(_has_eps(r, eps) for r in records.values())]}
    measured["quality"] = {}
    fewer = []
    number = len(records["eager"]["gradients"]["none"][str(REFERENCE_EPS)])
    for engine, record in records.items():
        found = cosines(record, records["eager"])
        measured["quality"][f"{engine}, {number} directions"] = {
            recipe: found[recipe] for recipe in ("none", *RECIPES) if recipe in found
        }
        for recipe in found:
            least = min(map(len, record["gradients"][recipe].values()))
            fewer += [f"{recipe} on {engine}: {least}"] if least < number else []
    record = json.loads((options.out / "cost.json").read_text())
    medians, first = record["medians"], record["recipes"]["none"]
    measured["cost"] = [
        "SmolLM2-135M, adapters of rank 8 on all layers but the head, q=4, 2 rows of 64 tokens, medians of "
        f"{STEPS} steps in turns (`python -m benchmarks.quantization cost --queries 4 --rows 2 --tokens 64`); "
        f"{record['machine']['processor']}, {record['machine']['threads']} threads. Memory is the peak of a fresh "
        "process that loads `train_step` and `evaluate` and runs each twice.",
        "",
        "| weights | step, of float32 | of eager PyTorch in float32 | file MB | of float32 | peak memory MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {'float32' if recipe == 'none' else recipe} | {medians[recipe] / medians['none']:.2f} | "
            f"{medians[recipe] / medians['eager']:.2f} | {found['file_mb']:.0f} | "
            f"{found['file_mb'] / first['file_mb']:.2f} | {found['memory']:.0f} |"
            for recipe, found in record["recipes"].items()
        ),
    ]
    demos = [json.loads((folder / "run.json").read_text()) for folder in options.demos]
    measured["accuracy"] = [
        "The demo (`python -m examples.demo --quantization ...`): 400 held-out sentences, before and after training.",
        "",
        "| weights | seed | steps | eps | accuracy | AUC |",
        "| --- | ---: | ---: | ---: | --- | --- |",
        *(
            f"| {_recipe_of(run)} | {run['seed']} | "
            f"{run['steps']} | {run['eps']} | {run['before']['accuracy']:.3f} to {run['after']['accuracy']:.3f} | "
            f"{run['before']['auc']:.3f} to {run['after']['auc']:.3f} |"
            for run in demos
        ),
    ]
    measured["quality_text"] = (
        "Cosine between the projected gradients of a recipe and those of float32, as a vector over all directions, on "
        "the demo's program and sentences: with float32 at the same eps / with float32 at eps 0.01. The first number "
        "falls where rounding drowns the difference of two losses; the second also where the step is so large that the "
        "loss is no longer straight. "
        + (f"Some recipes are compared in fewer directions ({', '.join(fewer)}). " if fewer else "")
        + "(`python -m benchmarks.quantization quality`)"
    )
    write_json(Path("docs/quantization_measured.json"), measured)
    print("wrote docs/quantization_measured.json; now make docs")


def _recipe_of(run: dict[str, Any]) -> str:
    return str(json.loads(run["quantization"])["recipe"]) if run.get("quantization") else "float32"


def _has_eps(record: dict[str, Any], eps: float) -> bool:
    return any(str(eps) in by_eps for by_eps in record["gradients"].values())


def peak_of_a_process(workload: Workload, file: Path, threads: int) -> float:
    """VmHWM in megabytes of a process that imports the runtime alone, loads two methods and runs each twice."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--child", "train-evaluate"]
    command += ["--file", str(file), "--threads", str(threads), *workload.to_arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stages = json.loads(done.stdout.splitlines()[-1])
    return float(list(stages.values())[-1]["VmHWM"])


if __name__ == "__main__":
    main()
