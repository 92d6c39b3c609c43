"""`Session.finetune_privately`: a run that tells little of any one of its rows, whoever reads what it leaves.

DP-ZO (Tang et al. 2024, arXiv 2401.04343; DPZero, Zhang et al. 2024, arXiv 2310.09639). All that a step takes from rows
are q numbers, the slopes along its directions. So clipping by row and noise, which cost DP-SGD a gradient for every
row, cost an addition here:

    rows of the step    each by itself with probability sample_rows / rows
    a row says          s = its slopes [q], times min(1, row_clip / |s|)
    the step            projected gradient = (sum of s + noise_multiplier row_clip normal) / sample_rows
                        and the update is a replay of it

The directions come from seeds that everybody may know. Which rows are taken, and the noise, come from the randomness of
the operating system; the run does not keep them.

    privacy.json        in the folder of the run: what was asked for, and what is spent
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mobizo_compiler.device.run as runs
from mobizo_compiler.device.accountant import Accountant, Privacy
from mobizo_compiler.device.batches import Batch, Pair, labelled, pair
from mobizo_compiler.device.limits import Limits, Watch
from mobizo_compiler.device.scalars import whole
from mobizo_compiler.errors import ConfigError, InputError, JournalError, RunMismatchError
from mobizo_compiler.format.files import hold, whole_file
from mobizo_compiler.format.program import Program, StepResult
from mobizo_compiler.step.estimators import Estimator, get_estimator, gradient_of

BatchOf = Callable[[Sequence[int]], Batch]
OnBegin = Callable[[Privacy, Accountant, int], object]
_SYSTEM = random.SystemRandom()
_DRAWS = 4  # of which a number of noise is the sum: less of its last bits can be guessed (Holohan & Braghin 2021)


def finetune_privately(
    session: runs.Trainee,
    batch_of: BatchOf,
    rows: int,
    privacy: Privacy,
    *,
    steps: int,
    learning_rate: runs.LearningRate,
    run: str | PathLike[str],
    seed: int = 0,
    eps: float | None = None,
    on_step: runs.OnStep | None = None,
    on_begin: OnBegin = lambda privacy, accountant, steps: None,
    stop: runs.Stop | None = None,
    until: Limits | Watch | None = None,
) -> runs.RunSummary:
    """`finetune` with differential privacy of every row, for programs that return the losses of rows.

    A step tells no loss: the losses of the journal, of the summary and of `on_step` are 0. `ZOConfig.normalize` and
    `clip` are for plain steps, and do nothing here.

    Args:
        batch_of: (inputs, labels) of some rows, given their numbers: at least one, and at most as many as the program
            takes at once. What it makes of a row must not depend on the rows beside it, and all rows must be fit for
            the program: an error on the way tells that one was not.
        rows: How many rows there are.
        privacy: How much may be told. A run that is gone on with has what it was begun with; what is left open here
            is not compared.
        steps: Steps that the run has in the end.
        learning_rate: As for `finetune`, as all that follows.
        run: The folder, which a budget needs for its memory; what is spent is in its `privacy.json`.
        seed: Of the directions, and of nothing else.
        eps: As for `finetune`.
        on_step: Likewise.
        on_begin: Told the settings of the run, what counts it, and how many of the steps the budget is enough for,
            before the first one.
        stop: As for `finetune`.
        until: Likewise. When the budget is spent, that is the limit that the summary names.

    Raises:
        ConfigError: The program does not return the losses of rows, a step would take more rows than there are, or the
            run would start from a state that is not counted (see `Privacy.public_start`).
        RunMismatchError: The folder holds a run with other settings of privacy, or with steps that were not private.
        MissingPackageError: dp-accounting is missing.
        JournalError: The journal has lost steps that were counted; and all that `finetune` raises.
    """
    ignored, batch_rows = _check(session.program, batch_of, privacy)
    rows, steps, folder = whole("rows", rows, 1), whole("steps", steps, 0), Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        settled = _settled(session, folder, privacy, rows, batch_rows, steps)
        assert settled.sample_rows is not None and settled.noise_multiplier is not None and settled.delta is not None
        accountant = Accountant(settled.noise_multiplier, settled.sample_rows / rows, settled.delta)
        allowed = steps if settled.epsilon is None else accountant.steps_within(settled.epsilon, steps)
        on_begin(settled, accountant, allowed)
        trainee, tell = _Private(session, settled, ignored), on_step or (lambda step, result: None)

        def drawn(step: int) -> Any:
            numbers = [row for row in range(rows) if _SYSTEM.random() < accountant.sample_rate]
            chunks = [numbers[first : first + batch_rows] for first in range(0, len(numbers), batch_rows)]
            return ((len(chunk), pair(batch_of(chunk))) for chunk in chunks), None

        def after(step: int, result: StepResult) -> None:
            trainee.before = None  # the step is in the journal
            tell(step, result)

        try:
            summary = runs.finetune(
                trainee,
                drawn,
                steps=allowed,
                learning_rate=learning_rate,
                run=folder,
                seed=seed,
                eps=eps,
                on_step=after,
                stop=stop,
                until=until,
            )
        finally:
            trainee.forget()
            done = len(_losses(session, folder))
            _write(folder, Told(settled, rows, done), accountant.epsilon(done))
    if summary.steps == allowed < steps:
        summary = dataclasses.replace(summary, limit=f"the budget of epsilon {settled.epsilon:g} is spent")
    return summary


class _Private:
    """A session whose steps are noised. Inputs of a step are the batches of its rows, each with their number."""

    noised = True

    def __init__(self, session: runs.Trainee, privacy: Privacy, ignored: int) -> None:
        self._session, self._privacy, self._ignored, self.program = session, privacy, ignored, session.program
        self._estimator = get_estimator(session.program.manifest.zo.estimator)
        self.before: Tensor | None = None  # a step that is not in the journal yet

    def state(self) -> Tensor:
        """Of the session."""
        return self._session.state()

    def load_state(self, flat: Tensor) -> None:
        """Of the session."""
        self._session.load_state(flat)

    def replay(self, seed: int, projected_gradient: Tensor | Sequence[float], learning_rate: float) -> None:
        """As the session does."""
        self._session.replay(seed, projected_gradient, learning_rate)

    def forget(self) -> None:
        """Undo a step that did not come into the journal: nobody would count it."""
        if self.before is not None:
            self.load_state(self.before)

    def train_step(
        self, inputs: Any, labels: Tensor | None = None, *, seed: int, learning_rate: float, eps: float | None = None
    ) -> StepResult:
        """Measure all batches along the same directions, add them up, add noise, and make the step from that."""
        zo, privacy = self.program.manifest.zo, self._privacy
        assert privacy.noise_multiplier is not None and privacy.sample_rows is not None and privacy.row_clip is not None
        size = self.program.manifest.eps if eps is None else eps
        total_Q = torch.zeros(zo.queries, dtype=torch.float64)
        for slopes_QR in self._slopes(inputs, seed, size):
            total_Q += clipped(slopes_QR, privacy.row_clip).sum(dim=1)
        deviation = privacy.noise_multiplier * privacy.row_clip
        noised_Q = ((total_Q + deviation * _normals(zo.queries)) / privacy.sample_rows).float()
        before = self.state()
        self.replay(seed, noised_Q, learning_rate)
        self.before = before
        return StepResult(0.0, torch.zeros(zo.lanes), noised_Q)

    def _slopes(self, batches: Iterable[tuple[int, Pair]], seed: int, eps: float) -> Iterator[Tensor]:
        """What the rows of every batch say, [q, rows]. Measuring, at learning rate 0, leaves the state as it is."""
        for count, (inputs, labels) in batches:
            inputs, labels = labelled(inputs, labels, self.program.manifest.inputs)
            if not isinstance(labels, Tensor) or labels.dim() == 0 or len(labels) != count:
                shape = list(getattr(labels, "shape", []))
                raise InputError(
                    f"batch_of was asked for {count} rows and gave labels of shape {shape}",
                    hint="a batch has the rows that were asked for and no others; what is missing to a whole one is "
                    "filled in later",
                )
            if not bool((labels != self._ignored).any()):
                continue  # rows without a label say nothing
            found = self._session.train_step(inputs, labels, seed=seed, learning_rate=0.0, eps=eps)
            assert found.row_losses is not None
            queries = self.program.manifest.zo.queries
            yield slopes_of_rows(self._estimator, found.row_losses[:, :count], torch.tensor([eps]), queries)


def slopes_of_rows(estimator: Estimator, loss_GR: Tensor, eps_1: Tensor, queries: int) -> Tensor:
    """What every row says: its slopes along the directions, float32 [q, rows].

    Args:
        estimator: The estimator.
        loss_GR: Losses of the rows in the lanes.
        eps_1: Size of the perturbation.
        queries: Number q of directions.
    """
    columns = [gradient_of(estimator, loss_G, eps_1, queries) for loss_G in loss_GR.unbind(dim=1)]
    return torch.stack(columns, dim=1)


def clipped(slopes_QR: Tensor, row_clip: float) -> Tensor:
    """What rows say, none longer than `row_clip`; a row whose losses are not finite says nothing. float64 [q, rows].

    >>> clipped(torch.tensor([[3.0, 0.375, torch.nan], [4.0, 0.5, 1.0]]), 1.0).tolist()
    [[0.6..., 0.375, 0.0], [0.8, 0.5, 0.0]]
    """
    slopes_QR = slopes_QR.double()
    length_R = slopes_QR.norm(dim=0)
    finite_R = length_R.isfinite()
    factor_R = row_clip / length_R.clamp(min=row_clip)
    return torch.where(finite_R, slopes_QR * factor_R, 0.0)


def _normals(count: int) -> Tensor:
    draws = [[_SYSTEM.gauss(0.0, 1.0) for _ in range(_DRAWS)] for _ in range(count)]
    return torch.tensor([math.fsum(some) / math.sqrt(_DRAWS) for some in draws], dtype=torch.float64)


def _check(program: Program, batch_of: object, privacy: object) -> tuple[int, int]:
    """The label that does not count, and how many rows a batch has at most.

    Raises:
        ConfigError: The program cannot make private steps.
        InputError: An argument is something else.
    """
    labels = program.manifest.labels
    if not isinstance(privacy, Privacy) or not callable(batch_of):
        raise InputError("finetune_privately takes a function of row numbers, how many rows there are, and a Privacy")
    if not program.manifest.zo.row_losses:
        raise ConfigError(
            "the program does not return the losses of rows, which privacy needs",
            hint="compile(..., zo=ZOConfig(row_losses=True)), or mobizo compile --zo-row-losses",
        )
    if labels.also is None:
        raise ConfigError("the loss has no label that does not count, for batches that are not full")
    first = labels.shape[0]
    return labels.also, first if isinstance(first, int) else {s.name: s.high for s in program.manifest.sizes}[first]


class Told(NamedTuple):
    """What the folder of a run says of its privacy: settings, how many rows there are, and steps that were counted."""

    settings: Privacy
    rows: int
    steps: int


def read_privacy(folder: Path) -> Told | None:
    """Of a private run; None for a run without.

    Raises:
        JournalError: The file is damaged.
    """
    path = folder / runs.PRIVACY
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        settings = Privacy.from_json(values["settings"])
        if None in (settings.delta, settings.row_clip, settings.noise_multiplier, settings.sample_rows):
            raise ValueError("a setting is missing")
        return Told(settings, whole("rows", values["rows"], 1), whole("steps", values["steps"], 0))
    except (ValueError, TypeError, KeyError, ConfigError, InputError) as error:
        raise JournalError(f"what the run may tell cannot be read: {error!r}", where=str(path)) from None


def _write(folder: Path, told: Told, spent: float) -> None:
    values = {"settings": told.settings.to_json(), "rows": told.rows, "steps": told.steps, "epsilon_spent": spent}
    with whole_file(folder / runs.PRIVACY) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock = hold(folder / runs.PRIVACY, "another session makes this run", "wait for it to end")
    try:
        yield
    finally:
        lock.release()


def _losses(session: runs.Trainee, folder: Path) -> Sequence[float]:
    """Of the steps in the journal; none where it is not begun."""
    return runs.losses_of(session, folder) if (folder / runs.JOURNAL).exists() else ()


def _settled(session: runs.Trainee, folder: Path, privacy: Privacy, rows: int, batch_rows: int, steps: int) -> Privacy:
    """The settings of a run: those that it was begun with, or, before its first step, what is settled and written here.

    Raises:
        RunMismatchError: It was begun with others, or has steps that were not private.
        JournalError: The journal has fewer steps than were counted.
        ConfigError: It would start from a state that is not counted.
    """
    told, losses = read_privacy(folder), _losses(session, folder)
    done = len(losses)
    if told is None and done:
        raise RunMismatchError(
            "the run was begun without privacy", where=str(folder), hint="give this one a folder of its own"
        )
    if told is not None and done < told.steps:
        raise JournalError(
            f"{told.steps} steps were counted, and the journal has {done}: what was spent cannot be known",
            where=str(folder),
            hint="give this one a folder of its own, and its budget what is left",
        )
    if told is None or not done:
        _check_start(session, folder, privacy)
        settled = privacy.settled(rows, batch_rows, steps)
        _write(folder, Told(settled, rows, 0), 0.0)
        return settled
    if any(loss != 0 for loss in losses):
        raise RunMismatchError(
            "the run has steps that were not private, of another host or an older version", where=str(folder)
        )
    was, given = told.settings.to_json(), {n: v for n, v in privacy.to_json().items() if v not in (None, False)}
    other = [name for name, value in given.items() if was[name] != value]
    if other or told.rows != rows:
        name, old, new = (other[0], was[other[0]], given[other[0]]) if other else ("rows", told.rows, rows)
        raise RunMismatchError(
            f"the run was begun with another {name} ({old} before, {new} now)",
            where=str(folder),
            hint="what was spent counts for the settings that it was begun with; give this one a folder of its own",
        )
    return told.settings


def _check_start(session: runs.Trainee, folder: Path, privacy: Privacy) -> None:
    begun = folder / runs.START
    start = runs.read_state(begun, session)[0] if begun.exists() else session.state()
    if not privacy.public_start and not torch.equal(start, session.program.initial_state()):
        raise ConfigError(
            "the run would start from a state that is not the program's own, and what that tells is not counted",
            hint="Privacy(public_start=True), if nothing private is in it; else a session that was not trained",
        )
