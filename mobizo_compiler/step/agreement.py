"""When numbers of two engines are the same up to rounding, and the error where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mobizo_compiler.errors import CaptureError, LoweringError

# Two engines add float32 products in different orders. Losses then agree to LOSS_TOLERANCE of their size and outputs to
# OUTPUT_TOLERANCE of the largest, whatever the model; most models agree much better, to CLOSE of the size of a loss and
# of the root mean square of an output. What is not as close as that must be explained by the rounding that the model
# itself shows: how far its own float32 numbers are from float64, FACTOR times.
LOSS_TOLERANCE, OUTPUT_TOLERANCE = 1e-4, 2e-3
CLOSE, FACTOR = 2e-5, 32.0
# Where activations are rounded to integers, a value in the last place decides now and then which integer it is, and two
# engines that agree to rounding part by up to what all the rounding does. That is measured, by leaving it out.
ROUNDING = 4.0
# Given the losses, the projected gradient is a few operations on them; given the gradient, an update agrees to the last
# bits of its sum, as a share of its norm, and a rule that takes signs may turn a few of them.
ARITHMETIC = 1e-5
UPDATE_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 1e-3  # of an exact gradient, as a share of its norm
INTEGERS = 0.02  # share of integers in an output that may be others, as the best of values that are nearly equal are

HALF = 16.0  # last places of half precision that a model in it may be off, as a root mean square

Compare = Callable[[str, str, Tensor, Tensor, float], None]


def compare(
    backend: str, problem: str, method: str, what: str, found: Tensor, wanted: Tensor, tolerance: float
) -> None:
    """Raise `LoweringError` unless the largest difference is within the tolerance."""
    error = largest_difference(found, wanted)
    if not error <= tolerance:
        raise LoweringError(
            f"{problem}: {what} of {method} differ by {error:.3g}, more than {tolerance:.3g}",
            where=f"backend {backend!r}, {method}: found {_few(found)}, expected {_few(wanted)}",
            hint="report this with the program text (MOBIZO_DUMP=folder), and try another backend",
        )


def check_half(whole: Sequence[Tensor], half: Sequence[Tensor]) -> None:
    """Raise `CaptureError` if a graph in float32 computes something else than its model in half precision.

    Args:
        whole: Outputs of the graph.
        half: Outputs of the model, of which some are in half precision.
    """
    for position, (found, wanted) in enumerate(zip(whole, half, strict=True)):
        if not wanted.is_floating_point():
            continue
        counts = wanted.isfinite() & found.isfinite()
        values = found[counts].float()
        error = root_mean_square(values - wanted[counts].float())
        eps = torch.finfo(torch.float16 if wanted.dtype == torch.float16 else torch.bfloat16).eps
        allowed = HALF * eps * root_mean_square(values)
        if not error <= allowed + 1e-7:
            raise CaptureError(
                f"the graph in float32 computes other numbers than the model in {wanted.dtype}: output {position} "
                f"differs by {error:.3g}, as a root mean square, more than {allowed:.3g}",
                hint="compile model.float(), if that is what you mean",
            )


def compare_outputs(
    compare: Compare,
    method: str,
    what: str,
    found: Tensor,
    wanted: Tensor,
    rounded: float | None,
    single_precision: Callable[[], float],
) -> None:
    """Compare what a model returns.

    Args:
        compare: `compare`, for a backend and a problem.
        method: The method that returned it.
        what: What it is.
        found: What the engine returned.
        wanted: What it should be.
        rounded: How far it may be off because values are rounded to integers; None if none are.
        single_precision: How far float32 is from float64, as a root mean square; asked for if it matters.
    """
    if found.shape != wanted.shape or not wanted.dtype.is_floating_point:
        share = float((found != wanted).float().mean()) if found.shape == wanted.shape else float("inf")
        compare(method, f"the share of other integers in {what}", torch.tensor(share), torch.zeros(()), INTEGERS)
        return
    counts = wanted.isfinite()
    values = wanted[counts].float()
    largest = max(1.0, float(values.abs().max())) if values.numel() else 1.0
    compare(method, what, found.float(), wanted.float(), OUTPUT_TOLERANCE * largest + (rounded or 0.0))
    size, error = root_mean_square(values), root_mean_square(found[counts].float() - values)
    allowed = may_differ(error, CLOSE * size + 1e-7, OUTPUT_TOLERANCE * size + 1e-7, rounded, single_precision)
    compare(method, f"root mean square of {what}", torch.tensor(error), torch.zeros(()), allowed)


def may_differ(
    error: float, close: float, most: float, rounded: float | None, single_precision: Callable[[], float]
) -> float:
    """What a difference may be; what the model itself shows in float32 is looked at where it is not close."""
    if rounded is not None:
        return most + rounded
    return close if error <= close else min(most, max(close, FACTOR * single_precision()))


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference; what is infinite or no number must be so in both."""
    if found.shape != wanted.shape:
        return float("inf")
    finite = wanted.isfinite()
    same = torch.where(finite, found.isfinite(), (found == wanted) | (found.isnan() & wanted.isnan()))
    if not bool(same.all()):
        return float("inf")
    return float((found[finite] - wanted[finite]).abs().max()) if bool(finite.any()) else 0.0


def root_mean_square(values: Tensor) -> float:
    """Of all values, 0 if there are none."""
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def _few(values: Tensor) -> str:
    return "[" + ", ".join(f"{float(v):.6g}" for v in values.flatten()[:4]) + ", ...]"


def slope(losses: Tensor, eps: float, normalize: bool) -> float:
    """How much of an error of a loss a projected gradient has, in units of 1 where it is normalized."""
    if not normalize:
        return 1 / eps
    smallest = 2.0**-22 * max(1e-3, float(losses.abs().max()))  # lanes may all have one loss
    return 1 / max(float(losses.std()), smallest)
