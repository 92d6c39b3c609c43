"""The contract of an estimator, as a check that authors of estimators run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.step.estimators import ESTIMATORS, Estimator
from mobizo_compiler.step.noise import noise
from mobizo_compiler.testing.require import pure, require, suite, traceable

PARAMETERS, QUERIES, DIRECTIONS, EPS = 12, 8, 16384, 1e-3
STANDARD_ERRORS = 4.5  # 12 coordinates of a normal distribution are all within, but for once in 12,000
SIGNAL = 10  # the gradient in standard errors: with less, nothing could be found wrong


def check_estimator(estimator: str | Estimator) -> None:
    """Hold an estimator to what it is: a frozen dataclass whose estimates have the gradient as their mean.

    Checks lanes and shapes, also of a step that is compiled; that the functions are pure and can be traced; that a
    loss that is the same everywhere has no slope; that on a linear loss the estimate depends neither on eps nor on the
    point, and follows the size of the loss; in float64, on a linear and on a curved function of 12 numbers, that each
    coordinate of the mean over 16,384 directions, with gaussian and with rademacher noise, lies within 4.5 standard
    errors of autograd's gradient, which must be 10 of them long; and that its JSON makes it again. One that has the
    gradient itself is compared with autograd in float64 on a small model instead.

    Args:
        estimator: An estimator, or the name of one.

    Raises:
        ContractError: It does not keep the contract; the message says how.
        ConfigError: There is none of that name.

    >>> check_estimator("two-sided")
    """
    with suite(ESTIMATORS, estimator) as (found, name):
        if found.differentiates:
            return _check_differentiated(found, name)
        fewest = max(_fewest(found, normalized) for normalized in (False, True))
        for queries in sorted({fewest, 3, QUERIES}):
            if queries >= fewest:
                _check_shapes(found, queries)
        _check_trace(found, max(fewest, 3))
        _check_slopes(found, max(fewest, QUERIES))
        for kind in ("gaussian", "rademacher"):
            for curved in (False, True):
                _check_mean(found, max(fewest, QUERIES), kind, curved)
        _check_compiled(found, name, max(fewest, 3))


def _fewest(estimator: Estimator, normalized: bool) -> int:
    fewest = estimator.fewest_queries(normalized)
    require(isinstance(fewest, int) and fewest >= 1, f"fewest_queries({normalized}) is {fewest!r}, not a number from 1")
    return fewest


def _check_shapes(estimator: Estimator, queries: int) -> None:
    lanes = estimator.lanes(queries)
    require(
        isinstance(lanes, int) and not isinstance(lanes, bool) and lanes >= 1,
        f"lanes({queries}) is {lanes!r}, not a number from 1",
    )
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(1)
        point = torch.randn(PARAMETERS, generator=generator, dtype=dtype)
        step = torch.randn(queries, PARAMETERS, generator=generator, dtype=dtype)
        losses, eps = torch.rand(lanes, generator=generator, dtype=dtype), torch.tensor([EPS], dtype=dtype)
        lanes_GP = pure("perturbed", estimator.perturbed, point, step)
        _check_tensor(f"perturbed, with {queries} queries,", lanes_GP, (lanes, PARAMETERS), dtype)
        slopes_Q = pure("projected_gradient", estimator.projected_gradient, losses, eps)
        _check_tensor(f"projected_gradient, with {queries} queries,", slopes_Q, (queries,), dtype)
        still_GP = estimator.perturbed(point, step * 0)
        require(torch.equal(still_GP, point.expand(lanes, -1)), "perturbed moves lanes by something else than the step")


def _check_tensor(what: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        require(False, f"{what} returns {value!r}, not a tensor")
    else:
        require(
            value.shape == shape and value.dtype == dtype,
            f"{what} returns {value.dtype} {list(value.shape)}, not {dtype} {list(shape)}",
        )
        require(bool(value.isfinite().all()), f"{what} returns values that are not finite")


def _check_trace(estimator: Estimator, queries: int) -> None:
    lanes, generator = estimator.lanes(queries), torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    points, steps, losses = drawn(PARAMETERS), drawn(queries, PARAMETERS), drawn(lanes)
    eps = torch.tensor([0.1]), torch.tensor([0.3])
    traceable("perturbed", estimator.perturbed, (points[0], steps[0]), (points[1], steps[1]))
    traceable("projected_gradient", estimator.projected_gradient, (losses[0], eps[0]), (losses[1], eps[1]))


Function = Callable[[Tensor], Tensor]


def _estimates(estimator: Estimator, loss: Function, point: Tensor, z_QP: Tensor, eps: float = EPS) -> Tensor:
    """g of every direction, from the losses of the lanes; `loss` takes lanes [G, P]."""
    lanes_GP = estimator.perturbed(point, eps * z_QP)
    return estimator.projected_gradient(loss(lanes_GP), torch.tensor([eps], dtype=point.dtype))


def _check_slopes(estimator: Estimator, queries: int) -> None:
    """What holds for every direction of every estimator that takes differences."""
    generator = torch.Generator().manual_seed(3)
    point, slope, z_QP = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((PARAMETERS,), (PARAMETERS,), (queries, PARAMETERS))
    )
    flat = _estimates(estimator, lambda lanes_GP: torch.full((len(lanes_GP),), 3.0).double(), point, z_QP)
    require(float(flat.abs().max()) == 0, f"a loss that is 3 everywhere has the slopes {flat.tolist()}, not zeros")
    wanted = _estimates(estimator, lambda lanes_GP: lanes_GP @ slope + 1.0, point, z_QP)
    size = float(wanted.abs().max())
    # Losses of some 10 carry 1e-15 of rounding, which is divided by eps = 1e-3.
    for what, found in (
        ("the size of eps", _estimates(estimator, lambda lanes_GP: lanes_GP @ slope + 1.0, point, z_QP, 0.3)),
        ("the point", _estimates(estimator, lambda lanes_GP: lanes_GP @ slope + 1.0, point * 0, z_QP)),
        ("the unit of the loss", _estimates(estimator, lambda lanes_GP: lanes_GP @ slope * 7.0, point, z_QP) / 7.0),
    ):
        require(
            float((found - wanted).abs().max()) < 1e-9 * max(1.0, size),
            f"on a linear loss the estimate depends on {what}: {found.tolist()} and {wanted.tolist()}",
        )


def _check_mean(estimator: Estimator, queries: int, kind: str, curved: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(PARAMETERS, PARAMETERS, generator=generator, dtype=torch.float64)
    point = torch.randn(PARAMETERS, generator=generator, dtype=torch.float64)

    def loss(lanes_GP: Tensor) -> Tensor:
        if not curved:
            return lanes_GP @ weights[0]
        return torch.logsumexp(lanes_GP @ weights.T, dim=-1) + 0.1 * (lanes_GP**4).sum(dim=-1)

    started = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(started[None])[0], started)
    z = noise(5, DIRECTIONS // queries * queries, PARAMETERS, kind).double()
    samples = torch.stack(
        [(_estimates(estimator, loss, point, z_QP)[:, None] * z_QP).mean(dim=0) for z_QP in torch.split(z, queries)]
    )
    mean, spread = samples.mean(dim=0), samples.std(dim=0) / len(samples) ** 0.5
    # The bias of differences is of the order eps^2 = 1e-6, which is nothing beside the spread.
    off, signal = float(((mean - gradient).abs() / spread).max()), float((gradient.abs() / spread).max())
    what = f"on a {'curved' if curved else 'linear'} loss, with {kind} noise,"
    require(
        off < STANDARD_ERRORS,
        f"{what} the mean over {DIRECTIONS} directions is {mean.tolist()}, {off:.1f} standard errors off the gradient "
        f"{gradient.tolist()}",
    )
    require(signal > SIGNAL, f"{what} the gradient is {signal:.1f} standard errors long: it is lost in the spread")


def _check_differentiated(estimator: Estimator, name: str) -> None:
    """What is not perturbed has the gradient in a compiled step; what is, is measured as by `perturbed`."""
    from mobizo_compiler import compile
    from mobizo_compiler.testing.check import check_gradient
    from mobizo_compiler.testing.models import TinyCausalLM, tiny_batch

    torch.manual_seed(0)
    if estimator.lanes(1) == 1:
        check_gradient(TinyCausalLM().eval(), tiny_batch()[0], backend="eager", estimator=estimator)
        return
    queries = max(_fewest(estimator, normalized=False), 3)
    _check_shapes(estimator, queries)
    _check_trace(estimator, queries)
    # `compile` compares what is measured with lanes that run alone, and what is not with autograd.
    zo = ZOConfig(queries=queries, estimator=estimator)
    compile(TinyCausalLM(layers=5).eval(), tiny_batch()[0], zo=zo, backend="eager")


def _check_compiled(estimator: Estimator, name: str, queries: int) -> None:
    """A step of a small program has the lanes, and computes what plain PyTorch does."""
    from mobizo_compiler import LoraConfig, Session, compile
    from mobizo_compiler.reference import ReferenceStep
    from mobizo_compiler.testing.models import TokenWise

    torch.manual_seed(0)
    model, tokens = TokenWise().eval(), torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 8, 9]])
    zo = ZOConfig(queries=queries, estimator=estimator)
    program = compile(model, (tokens,), LoraConfig(r=2, target_modules=("up",)), zo, backend="eager")
    session, reference = Session(program), ReferenceStep.of(model, program)
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    session.load_state(start)
    reference.state.copy_(start)
    steps = [
        stepper.train_step((tokens,), tokens, seed=1, learning_rate=0.0, eps=0.05) for stepper in (session, reference)
    ]
    reference.remove()
    found, wanted = (step.projected_gradient for step in steps)
    require(steps[0].lane_losses.shape == (estimator.lanes(queries),), f"a step of {name!r} has other lanes")
    # Losses near 2.4 carry 1e-6 of rounding, and g carries that over eps = 0.05.
    require(
        float((found - wanted).abs().max()) < 1e-4 * (1 + float(wanted.abs().max())),
        f"a compiled step has the projected gradient {found.tolist()}, plain PyTorch {wanted.tolist()}",
    )
