"""Compile the whole SmolLM2-135M and measure: phases, peak memory, agreement with plain PyTorch, and time per step.

    python -m benchmarks.smollm2 [--queries 4] [--rows 4] [--tokens 48] [--steps 7]

Our step and the eager PyTorch step (hooks on the model, the head on two positions of a row as in the program) take
turns in one process, on the same rows and threads. Medians after one warm-up step each; the ratio is what to quote.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import resource
import statistics
import time

import torch

import mobizo_compiler as mobizo
from examples.smollm2 import load_smollm2
from mobizo_compiler.compiling.described import installed_versions
from mobizo_compiler.reference import ReferenceStep


def peak_gb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("queries", 4), ("rows", 4), ("tokens", 48), ("steps", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    _, model = load_smollm2()
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (options.rows, options.tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]

    start, phases = time.monotonic(), []
    program = mobizo.compile(
        model,
        inputs,
        zo=mobizo.ZOConfig(queries=options.queries),
        loss=mobizo.CausalLMLoss(max_labels=1),
        progress=lambda phase: phases.append((phase, time.monotonic() - start)),
    )
    ends = [*[begin for _, begin in phases[1:]], time.monotonic() - start]
    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": installed_versions(),
        "options": vars(options),
        "compile_seconds": round(ends[-1], 1),
        "phase_seconds": {name: round(end - begin, 1) for (name, begin), end in zip(phases, ends, strict=True)},
        "compile_peak_gb": round(peak_gb(), 2),
        "file_mb": round(program.artifact.path.stat().st_size / 1e6, 1),  # type: ignore[attr-defined]
        "delegates": {name: d.delegates for name, d in program.artifact.delegation.items()},  # type: ignore[attr-defined]
    }

    session = mobizo.Session(program)
    reference = ReferenceStep(model, program.sites, program.lora_a_by_fqn, zo=program.manifest.zo)
    model.forward = functools.partial(model.forward, logits_to_keep=2)
    begin = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.02
    session.load_state(begin)
    reference.state.copy_(begin)
    errors = {"lane_losses": 0.0, "projected_gradient": 0.0, "state": 0.0}
    seconds: dict[str, list[float]] = {"program": [], "eager": []}
    for seed in range(options.steps):
        began = time.perf_counter()
        found = session.train_step(inputs, labels, seed=seed, learning_rate=1e-3, eps=1e-2)
        middle = time.perf_counter()
        wanted = reference.train_step(inputs, labels[:, -2:], seed=seed, learning_rate=1e-3, eps=1e-2)
        ended = time.perf_counter()
        if seed > 0:
            seconds["program"].append(middle - began)
            seconds["eager"].append(ended - middle)
        for name, a, b in (
            ("lane_losses", found.lane_losses, wanted.lane_losses),
            ("projected_gradient", found.projected_gradient, wanted.projected_gradient),
            ("state", session.state(), reference.state),
        ):
            errors[name] = max(errors[name], float((a - b).abs().max()))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report |= {
        "largest_errors": errors,
        "largest_loss": float(wanted.lane_losses.max()),
        "largest_projected_gradient": float(wanted.projected_gradient.abs().max()),
        "state_movement": float((session.state() - begin).abs().max()),
        "median_step_seconds": {name: round(value, 3) for name, value in medians.items()},
        "step_ratio_to_eager": round(medians["program"] / medians["eager"], 2),
        "spread": {name: [round(min(v), 3), round(max(v), 3)] for name, v in seconds.items()},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
