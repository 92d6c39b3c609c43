"""Trust nothing that was lowered: one step and one evaluation of the artifact against the graphs it was made from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobizo_compiler.artifact import Program
from mobizo_compiler.backends.eager import EagerBackend
from mobizo_compiler.errors import LoweringError
from mobizo_compiler.manifest import Manifest
from mobizo_compiler.program import LABELS

# Two engines add float32 products in different orders: losses agree to LOSS_TOLERANCE of their size. The projected
# gradient divides a difference of two losses by 2 eps, so it agrees to the error of the loss divided by eps; the
# state moves by learning_rate * mean(g z), so its error is that of g times learning_rate * |z|, with |z| < 6.
LOSS_TOLERANCE = 1e-4
OUTPUT_TOLERANCE = 2e-3
EPS, LEARNING_RATE, SEED, STATE_SCALE = 1e-2, 1e-3, 20, 1e-2
LARGEST_NORMAL = 6.0


def check_lowered(program: Program, example_inputs: Sequence[Tensor]) -> None:
    """Run `train_step`, `evaluate` and `replay` in the artifact and in eager PyTorch from one random state.

    Raises:
        LoweringError: They disagree by more than rounding explains; the message names the method and the numbers.
    """
    if program.manifest.backend == "eager":
        return
    lowered = program.artifact.runner()
    expected = EagerBackend().lower(program.methods, program.manifest).runner()
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(program.parameters, generator=generator) * STATE_SCALE
    inputs = [value.contiguous() for value in example_inputs]
    labels = _random_labels(program.manifest, generator)
    scalars = torch.tensor([SEED], dtype=torch.int32), torch.tensor([LEARNING_RATE]), torch.tensor([EPS])
    step = _ordered(program, inputs, labels, *scalars)

    def run(method: str, arguments: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        results = []
        for runner in (lowered, expected):
            runner.state().copy_(start)
            results.append((runner.call(method, arguments), runner.state().clone()))
        return results[0][0], results[1][0], results[0][1], results[1][1]

    found, wanted, state, wanted_state = run("train_step", step)
    size = max(1.0, float(wanted[1].abs().max()))
    _compare("train_step", "lane losses", found[1], wanted[1], LOSS_TOLERANCE * size)
    _compare("train_step", "projected gradient", found[2], wanted[2], LOSS_TOLERANCE * size / EPS)
    moved = LEARNING_RATE * LARGEST_NORMAL * LOSS_TOLERANCE * size / EPS
    _compare("train_step", "state", state, wanted_state, moved)
    if torch.equal(state, start):
        raise LoweringError("train_step does not change the state", where=f"backend {program.manifest.backend!r}")
    gradient = [scalars[0], found[2].clone(), scalars[1]]
    _, _, replayed, _ = run("replay", gradient)
    _compare("replay", "state", replayed, state, 0.0)
    found, wanted, state, _ = run("evaluate", inputs)
    for position, (a, b) in enumerate(zip(found, wanted, strict=True)):
        _compare("evaluate", f"output {position}", a, b, OUTPUT_TOLERANCE * max(1.0, float(b.abs().max())))
    _compare("evaluate", "state", state, start, 0.0)


def _random_labels(manifest: Manifest, generator: torch.Generator) -> Tensor:
    """Labels anywhere in their range, as many of a row as may count."""
    spec = manifest.labels
    if spec.low is None or spec.high is None:
        return torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype))
    labels = torch.randint(spec.low, spec.high + 1, spec.shape, generator=generator)
    if spec.choices is not None:
        labels = torch.tensor(spec.choices)[labels % len(spec.choices)]
    if manifest.max_labels is not None and spec.also is not None:
        labels[:, : max(0, labels.shape[1] - manifest.max_labels)] = spec.also
    return labels.to(getattr(torch, spec.dtype))


def _ordered(program: Program, inputs: Sequence[Tensor], labels: Tensor, *scalars: Tensor) -> list[Tensor]:
    """Arguments of `train_step`, whose inputs are the model's, then labels, seed, learning rate and eps."""
    arguments = [*inputs, labels, *scalars]
    names = list(program.methods["train_step"].inputs)
    assert names.index(LABELS) == len(inputs) and len(names) == len(arguments), names
    return arguments


def _compare(method: str, what: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not error <= tolerance:
        raise LoweringError(
            f"the lowered program computes other numbers than the graph it was made from: {what} of {method} "
            f"differ by {error:.3g}, more than {tolerance:.3g}",
            where=f"{method}: found {_few(found)}, expected {_few(wanted)}",
            hint="report this with the program text (MOBIZO_DUMP=folder), and try another backend",
        )


def _few(values: Tensor) -> str:
    return "[" + ", ".join(f"{float(v):.6g}" for v in values.flatten()[:4]) + ", ...]"
