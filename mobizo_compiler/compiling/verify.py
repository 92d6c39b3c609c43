"""Trust nothing: an artifact must compute what the model computes, in every lane, and leave the state that it should.

What is compared with what, each in float32 and on the rows of the example:

    evaluate, adapters at zero                      the outputs of the model itself
    train_step, adapters at random, other rows      losses of lanes that ran alone on the captured graph
    a gradient that the program has itself          that of PyTorch on the captured graph
    the projected gradient                          that of the losses that were found
    the state after a step, and after replay        the update rule in PyTorch, with the gradient that was found
    evaluate, adapters at random, other rows        the captured graph
    what a prefix keeps of a row                    the same row in another place
    losses of rows from what a prefix keeps         the loss of the captured graph's outputs, row by row
    forward, a prompt at once and token by token    the model itself; with adapters, the graph captured with a cache
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mobizo_compiler.compiling.captured_forward import CapturedForward
from mobizo_compiler.compiling.captured_step import CapturedStep, rounds, without_rounding
from mobizo_compiler.errors import LoweringError, UnsupportedGraphError
from mobizo_compiler.format.probe import random_labels
from mobizo_compiler.format.program import Program, Runner
from mobizo_compiler.graph.eager import EagerArtifact
from mobizo_compiler.graph.example import Example
from mobizo_compiler.graph.paging import give_back
from mobizo_compiler.graph.program import LABELS_INPUT, STATE_INPUT
from mobizo_compiler.passes.update_state import updated_by_both, updated_by_gradient, updated_state
from mobizo_compiler.step import agreement
from mobizo_compiler.step.agreement import (
    ARITHMETIC,
    CLOSE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    OUTPUT_TOLERANCE,
    ROUNDING,
    UPDATE_TOLERANCE,
    Compare,
    compare_outputs,
    largest_difference,
    may_differ,
    root_mean_square,
    slope,
)
from mobizo_compiler.step.estimators import get_estimator, measured_numbers, scaled
from mobizo_compiler.step.rules import get_rule

LANE_TOLERANCE = 1e-5  # one engine, other batch sizes
MOST_LANES = 8  # that are run alone; of more, as many from the first to the last
EPS, LEARNING_RATE, SEED, STATE_SCALE = 1e-2, 1e-3, 20, 1e-2
DRAWS = 4  # of labels, until the loss is finite
SIDE_BY_SIDE_BYTES = 1 << 28  # of the largest value of lanes that are run at a time


def check_program(
    program: Program,
    captured: CapturedStep,
    example: Example,
    at_zero: list[Tensor],
    forward: CapturedForward | None = None,
) -> str | None:
    """Compare a program with the model that it was compiled from.

    Args:
        program: What was compiled.
        captured: The same on the captured graph.
        example: The example inputs.
        at_zero: Outputs of the model itself on the example inputs; of its graph, where weights were quantized.
        forward: The same with a cache, where the program generates.

    Returns:
        Why the artifact was not run, where it says that it cannot run here; then the graphs are compared in its place.

    Raises:
        UnsupportedGraphError: A lane has another loss among other lanes than alone: the model mixes rows.
        LoweringError: Model and artifact disagree by more than rounding explains; the message names the method and the
            numbers, and says whether the graphs that were lowered disagree already.
    """
    reason: str | None = program.artifact.cannot_run
    check = _Check(program, captured, example, at_zero, forward)
    graphs = EagerArtifact(dict(program.methods))
    if reason is not None:
        check.compare(graphs.runner(), "the graphs compute other numbers than the model")
        return reason
    give_back()  # before the engine packs its weights
    # Where a switch of the engine rounds, it is the code that is compared; what rounding does is the user's choice.
    try:
        check.compare(program.artifact.exact_runner(), "the lowered program computes other numbers than the model")
    except LoweringError:
        check.compare(graphs.runner(), "the graphs that were lowered compute other numbers than the model")
        raise
    return None


class _Exact(NamedTuple):
    """A gradient, zero for what is measured, and its length; the loss, if it is not that of the one lane; the learning
    rate of the step that is compared, and what may differ in its result, as a share."""

    gradient: Tensor
    norm: Tensor
    loss: Tensor | None
    rate: Tensor
    tolerance: float


class _Check:
    """One comparison: the batches, the state, and what the captured graph makes of them, computed once."""

    def __init__(
        self,
        program: Program,
        captured: CapturedStep,
        example: Example,
        at_zero: list[Tensor],
        forward: CapturedForward | None,
    ) -> None:
        self.program, self.captured, self.example, self.manifest = program, captured, example, program.manifest
        self.forward = forward
        generator = torch.Generator().manual_seed(SEED)
        self.first = [leaf.tensor.contiguous() for leaf in example.leaves]
        # The same rows in another order, because not every model takes every row; where there is one, it stays.
        self.second = [
            leaf.tensor.roll(1, leaf.row_axis).contiguous() if leaf.row_axis is not None else leaf.tensor.contiguous()
            for leaf in example.leaves
        ]
        parameters = program.parameters
        self.zero = program.initial_state()
        self.start = self.zero.clone()
        self.start[:parameters] += torch.randn(parameters, generator=generator) * STATE_SCALE
        count = self.manifest.zo.lanes
        spread = min(MOST_LANES, count)
        self.lanes = [round(index * (count - 1) / max(1, spread - 1)) for index in range(spread)]
        self.outputs_at_zero = at_zero
        largest = max([captured.largest_bytes, *(output.nbytes for output in at_zero)])
        self.at_a_time = max(1, SIDE_BY_SIDE_BYTES // max(1, largest))
        of_lanes = self._lanes(captured)
        self.outputs = next(of_lanes)
        for _ in range(DRAWS):
            self.labels = random_labels(self.manifest, self.second, generator)
            if bool(captured.loss_of(self.outputs, self.labels).isfinite()):
                break
        self.losses = self._losses(itertools.chain([self.outputs], of_lanes))
        self.rounded = self._rounded() if rounds(captured.program) else self._rounded_by_backend()

    def _lane(self, index: int) -> Tensor:
        return self.captured.lane(index, self.start[: self.program.parameters], SEED, EPS)

    def _lanes(self, captured: CapturedStep) -> Iterator[list[Tensor]]:
        """The outputs of the lanes that are compared, one after the other."""
        for begin in range(0, len(self.lanes), self.at_a_time):
            lanes = [self._lane(index) for index in self.lanes[begin : begin + self.at_a_time]]
            yield from captured.evaluate_each(self.second, lanes)

    def _losses(self, of_lanes: Iterable[list[Tensor]]) -> Tensor:
        """The losses of lanes by their outputs."""
        return torch.stack([self.captured.loss_of(outputs, self.labels) for outputs in of_lanes]).float()

    def _rounded(self) -> tuple[float, list[float]]:
        """How far activations that are rounded to integers move losses and outputs."""
        of_lanes = self._lanes(self.captured.without_rounding())
        outputs = next(of_lanes)
        losses = largest_difference(self._losses(itertools.chain([outputs], of_lanes)), self.losses)
        return ROUNDING * losses, [
            ROUNDING * largest_difference(a, b) for a, b in zip(outputs, self.outputs, strict=True)
        ]

    def _rounded_by_backend(self) -> tuple[float, list[float]] | None:
        """The same where it is the backend that rounds, to bfloat16: by its own graph, with rounding and without."""
        if not rounds(self.program.methods["evaluate"]):
            return None
        losses, outputs = 0.0, [0.0] * len(self.outputs)
        for index in self.lanes:
            state = self.start.clone()
            state[: self.program.parameters] = self._lane(index)
            both = [found for found, _ in self._both("evaluate", self.second, state)]
            outputs = [max(most, largest_difference(a, b)) for most, a, b in zip(outputs, *both, strict=True)]
            losses = max(losses, largest_difference(*(self.captured.loss_of(found, self.labels) for found in both)))
        return ROUNDING * losses, [ROUNDING * most for most in outputs]

    def _both(self, name: str, arguments: Sequence[Tensor], state: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
        """What a method's own graph returns and the state after it, with the rounding of the backend and without."""
        graph = self.program.methods[name]
        for method in (graph, without_rounding(graph)):
            runner = EagerArtifact({name: method}).runner()
            runner.state().copy_(state)
            yield runner.call(name, arguments), runner.state()

    @functools.cached_property
    def _single_precision(self) -> tuple[float, list[float]]:
        """How far float32 is from float64 in the loss, and in the root mean square of each output."""
        trained = self._lane(0)
        exact = self.captured.evaluate_exactly(self.second, trained)
        loss = float(self.captured.loss_of(exact, self.labels))
        found = float(self.captured.loss_of(self.outputs, self.labels))
        pairs = zip(exact, self.outputs, strict=True)
        return abs(loss - found), [root_mean_square((a.double() - b.double())[b.isfinite()]) for a, b in pairs]

    def compare(self, runner: Runner, problem: str) -> None:
        """Raise an error that begins with `problem` unless a runner computes what the captured graph does."""
        compare = functools.partial(agreement.compare, self.manifest.backend, problem)
        zo, rule = self.manifest.zo, get_rule(self.manifest.rule)
        seed, rate, eps = torch.tensor([SEED], dtype=torch.int32), torch.tensor([LEARNING_RATE]), torch.tensor([EPS])

        def run(method: str, arguments: list[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
            runner.state().copy_(state)
            return runner.call(method, arguments), runner.state().clone()

        outputs, _ = run("evaluate", self.first, self.zero)
        for position, (found, wanted) in enumerate(zip(outputs, self.outputs_at_zero, strict=True)):
            self._compare_outputs(compare, "evaluate", f"output {position} without adapters", position, found, wanted)

        starts = self._prefix(compare, runner) if self.manifest.prefix else self.second
        exact = self._exact_gradient(starts, seed, eps) if zo.differentiates else None
        rate = rate if exact is None else exact.rate
        (loss, losses, slopes, *of_rows), after = run("train_step", self._ordered(starts, seed, rate, eps), self.start)
        size = max(1.0, float(self.losses.abs().max()))
        allowed = may_differ(
            largest_difference(losses[self.lanes], self.losses),
            CLOSE * size,
            LOSS_TOLERANCE * size,
            None if self.rounded is None else self.rounded[0],
            lambda: self._single_precision[0],
        )
        try:
            compare("train_step", "lane losses", losses[self.lanes], self.losses, allowed)
        except LoweringError:
            self._check_rows_apart(allowed)
            raise
        if self.manifest.prefix:
            self._compare_row_losses(compare, run, starts, allowed)
        if of_rows:
            self._compare_rows(compare, losses, of_rows[0], allowed)
        mean = losses.mean() if exact is None or exact.loss is None else exact.loss
        compare("train_step", "loss", loss, mean.reshape(1), allowed)
        if zo.measures:
            wanted = get_estimator(zo.estimator).projected_gradient(losses, eps)
            wanted = scaled(wanted, losses, eps, zo.normalize, zo.clip)
            largest = float(wanted.nan_to_num(posinf=0, neginf=0).abs().max())
            last_place = 2.0**-22 * float(losses.nan_to_num(posinf=0, neginf=0).abs().max())
            steepness = slope(losses, EPS, zo.normalize) * (1 + largest * zo.normalize)
            allowed = ARITHMETIC * (1 + largest) + last_place * steepness
            compare("train_step", "projected gradient", slopes, wanted, allowed)
        if exact is not None:
            self._compare_exact(compare, after, slopes, exact)
            self._compare_evaluate(compare, run)
            return self._compare_forward(compare, runner)

        def moved(state: Tensor, seed: int) -> Tensor:
            return updated_state(zo.queries, rule)(state, rate, slopes, self.captured.directions(seed))

        self._compare_updates(compare, "train_step", "change of the state", after, moved(self.start, SEED), self.start)
        replay = [seed, slopes.clone(), rate]
        _, replayed = run("replay", replay, self.start)
        compare("replay", "state", replayed, after, 0.0)
        if self.manifest.memory:  # what the rule remembers counts from the second step on
            _, again = run("replay", [seed + 1, slopes.clone(), rate], after)
            what = "second change of the state"
            self._compare_updates(compare, "replay", what, again, moved(after, SEED + 1), after)

        self._compare_evaluate(compare, run)
        self._compare_forward(compare, runner)

    def _prefix(self, compare: Callable[..., None], runner: Runner) -> list[Tensor]:
        """What the prefix makes of the second batch; a row must be made the same in any place, or cannot be kept."""
        starts = [value.clone() for value in runner.call("prefix", [*self.second, self.labels])]
        rows = len(self.labels)
        if all(value.dim() and len(value) == rows for value in starts):
            axes = [*(leaf.row_axis for leaf in self.example.leaves), 0]
            again = [
                value if axis is None else value.index_select(axis, torch.tensor([rows - 1, *range(1, rows)]))
                for value, axis in zip((*self.second, self.labels), axes, strict=True)
            ]
            for name, start, found in zip(self.manifest.prefix, starts, runner.call("prefix", again), strict=True):
                what = f"the last row of {name.name} in place of the first"
                first, last = found[0].float(), start[-1].float()
                compare("prefix", what, first, last, OUTPUT_TOLERANCE * max(1.0, float(last.nan_to_num().abs().max())))
        return starts

    def _compare_rows(self, compare: Compare, losses: Tensor, loss_GR: Tensor, allowed: float) -> None:
        """The losses of rows in the lanes: of the first lane against the model, and all against those of lanes."""
        found_R, weight_R = self.captured.row_losses(self.outputs, self.labels)
        wanted_R = found_R / weight_R.where(weight_R != 0, 1.0)
        least = float(weight_R[weight_R > 0].min())
        compare("train_step", "losses of rows", loss_GR[0], wanted_R, allowed * float(weight_R.sum()) / least)
        mean_G = (loss_GR * weight_R).sum(1) / weight_R.sum()
        compare("train_step", "mean loss of rows", mean_G, losses, CLOSE * max(1.0, float(losses.abs().max())))

    def _compare_row_losses(
        self, compare: Compare, run: Callable[..., tuple[list[Tensor], Tensor]], starts: list[Tensor], allowed: float
    ) -> None:
        """The losses of rows from what the prefix made of them, for the labels that it was given and for others.

        One row may have all of what a lane may differ.
        """
        state = self.start.clone()
        state[: self.program.parameters] = self._lane(0)
        other = random_labels(self.manifest, self.second, torch.Generator().manual_seed(SEED))
        if (ignored := self.manifest.labels.also) is not None:
            other = torch.where(self.labels == ignored, self.labels, other)
            other = torch.where(other == ignored, self.labels, other)
        for what, labels in (("", self.labels), (" with another label", other)):
            (row_loss, row_weight), kept = run("row_losses", [*starts, labels], state)
            wanted, weight = self.captured.row_losses(self.outputs, labels)
            compare("row_losses", f"number of losses of a row{what}", row_weight, weight, 0.0)
            compare("row_losses", f"loss of a row{what}", row_loss, wanted, allowed * float(weight.sum()))
            compare("row_losses", "state", kept, state, 0.0)

    def _exact_gradient(self, starts: Sequence[Tensor], seed: Tensor, eps: Tensor) -> _Exact:
        """The gradient that a step has itself, by PyTorch on the captured graph, and how the step is compared."""
        trained, zo = self.start[: self.program.parameters], self.manifest.zo
        has_gradient = measured_numbers(get_estimator(zo.estimator), self.program.sites) == 0
        found = self.captured.gradient(self.second, self.labels, trained) * has_gradient
        norm = found.norm().reshape(1)
        # As large as the state, so that the last bits of the state do not hide the gradient; a rule that remembers
        # makes steps of a size of its own.
        rate = (
            torch.tensor([LEARNING_RATE])
            if self.manifest.memory
            else trained.norm() / (norm if zo.clip is None else norm.clamp(max=zo.clip))
        )
        tolerance = GRADIENT_TOLERANCE + (UPDATE_TOLERANCE if self.manifest.memory else 0.0)
        if rounds(self.captured.program):
            smooth = self.captured.without_rounding().gradient(self.second, self.labels, trained) * has_gradient
            tolerance += ROUNDING * float((smooth - found).norm() / found.norm())
        elif rounds(self.program.methods["train_step"]):
            (_, rounded), (_, smooth) = self._both("train_step", self._ordered(starts, seed, rate, eps), self.start)
            moved, differ = smooth - self.start, rounded - smooth
            part = slice(len(trained))
            tolerance += ROUNDING * float(differ[part][has_gradient].norm() / moved[part][has_gradient].norm())
        loss = None
        if zo.measures:
            loss = self.captured.loss_of(self.captured.evaluate(self.second, trained), self.labels).float()
        return _Exact(found, norm, loss, rate, tolerance)

    def _compare_exact(self, compare: Callable[..., None], after: Tensor, slopes: Tensor, exact: _Exact) -> None:
        """The state after a step with a gradient of its own; what is measured and what is exact are compared apart."""
        zo, rule, what = self.manifest.zo, get_rule(self.manifest.rule), "change of the state"
        if not zo.measures:
            size = float(exact.norm)
            compare("train_step", "length of the gradient", slopes, exact.norm, exact.tolerance * size)
            wanted = updated_by_gradient(rule, zo.clip)(self.start, exact.rate, exact.norm, exact.gradient)
            return self._compare_updates(compare, "train_step", what, after, wanted, self.start, exact.tolerance)
        update = updated_by_both(zo, rule, self.program.sites)
        wanted = update(self.start, exact.rate, slopes, self.captured.directions(SEED), exact.gradient)
        measured = measured_numbers(get_estimator(zo.estimator), self.program.sites) > 0
        for name, part in (("measured", measured), ("exact", ~measured)):
            found, right, start = (state[: len(part)][part] for state in (after, wanted, self.start))
            where = f"{what}, where it is {name}"
            self._compare_updates(compare, "train_step", where, found, right, start, exact.tolerance)

    def _compare_evaluate(self, compare: Compare, run: Callable[..., tuple[list[Tensor], Tensor]]) -> None:
        state = self.start.clone()
        state[: self.program.parameters] = self._lane(0)
        outputs, kept = run("evaluate", self.second, state)
        for position, (found, wanted) in enumerate(zip(outputs, self.outputs, strict=True)):
            self._compare_outputs(compare, "evaluate", f"output {position}", position, found, wanted)
        compare("evaluate", "state", kept, state, 0.0)

    def _compare_forward(self, compare: Compare, runner: Runner) -> None:
        if self.forward is not None:
            self.forward.check(runner, compare, self.zero, self.start)

    def _compare_updates(
        self,
        compare: Compare,
        method: str,
        what: str,
        found: Tensor,
        wanted: Tensor,
        start: Tensor,
        share: float = UPDATE_TOLERANCE,
    ) -> None:
        """The state after an update, by norm: a rule may make much of a small difference in a few numbers."""
        if torch.equal(found, start) and not torch.equal(wanted, start):
            raise LoweringError(f"{method} does not change the state", where=f"backend {self.manifest.backend!r}")
        moved = share * float((wanted - start).norm())
        compare(method, what, (found - wanted).norm(), torch.zeros(()), moved)

    def _compare_outputs(
        self, compare: Compare, method: str, what: str, position: int, found: Tensor, wanted: Tensor
    ) -> None:
        rounded = None if self.rounded is None else self.rounded[1][position]
        compare_outputs(compare, method, what, found, wanted, rounded, lambda: self._single_precision[1][position])

    def _check_rows_apart(self, allowed: float) -> None:
        """Raise `UnsupportedGraphError` if the captured model itself gives rows other losses among other rows."""
        try:
            both = self.captured.for_rows(2 * self.example.rows)
        except UnsupportedGraphError:  # their number is fixed in the graph
            return
        inputs = [
            second if leaf.row_axis is None else torch.cat([second, first], leaf.row_axis)
            for leaf, second, first in zip(self.example.leaves, self.second, self.first, strict=True)
        ]
        outputs = both.evaluate(inputs, self._lane(0))
        row_loss, row_weight = both.row_losses(outputs, torch.cat([self.labels, self.labels]))
        rows = self.labels.shape[0]
        among = row_loss[:rows].sum() / row_weight[:rows].sum()
        if not largest_difference(among, self.losses[0]) <= max(allowed, LANE_TOLERANCE):
            alone = float(self.losses[0])
            raise UnsupportedGraphError(
                f"the model mixes rows: they have loss {alone:.6g} alone and {float(among):.6g} beside others",
                hint="remove what computes over the batch (a mean over rows, batch statistics), or put it into eval "
                "mode",
            )

    def _ordered(self, inputs: Sequence[Tensor], *scalars: Tensor) -> list[Tensor]:
        """Arguments of `train_step`, whose inputs are the model's, then labels, seed, learning rate and eps."""
        arguments = [*inputs, self.labels, *scalars]
        names = [name for name in self.program.methods["train_step"].inputs if name != STATE_INPUT]
        assert names.index(LABELS_INPUT) == len(inputs) and len(names) == len(arguments), names
        return arguments
