"""`Session.finetune_privately`: a run that tells little of any one of its rows, whoever reads what it leaves.

DP-ZO (Tang et al. 2024, arXiv 2401.04343; DPZero, Zhang et al. 2024, arXiv 2310.09639). All that a step takes from rows
are q numbers, the slopes along its directions. So clipping by row and noise, which cost DP-SGD a gradient for every
row, cost an addition here:

    rows of the step    each by itself with probability sample_rows / rows
    a row says          s = its slopes [q], times min(1, row_clip / |s|)
    the step            projected gradient = (sum of s + noise_multiplier row_clip normal) / sample_rows
                        and the update is a replay of it

The directions come from seeds that everybody may know. Which rows are taken, and the noise, come from the randomness of
the operating system, and are kept nowhere.

    privacy.json        in the folder of the run: what was asked for, and what is spent
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import mobizo_compiler.device.run as runs
from mobizo_compiler.device.accountant import Accountant, Privacy
from mobizo_compiler.device.batches import Batch
from mobizo_compiler.device.limits import Limits, Watch, watch_of
from mobizo_compiler.device.scalars import whole
from mobizo_compiler.errors import ConfigError, JournalError, RunMismatchError
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.format.program import StepResult
from mobizo_compiler.step.estimators import Estimator, get_estimator, gradient_of

BatchOf = Callable[[Sequence[int]], Batch]
_SYSTEM = random.SystemRandom()
_DRAWS = 4  # of which a number of noise is the sum: less of its last bits can be guessed (Holohan & Braghin 2021)


class Measuring(runs.Trainee, Protocol):
    """What a private run needs of a session."""

    ranks: int


def finetune_privately(
    session: Measuring,
    batch_of: BatchOf,
    rows: int,
    privacy: Privacy,
    *,
    steps: int,
    learning_rate: runs.LearningRate,
    run: str | PathLike[str] | None = None,
    seed: int = 0,
    eps: float | None = None,
    on_step: runs.OnStep | None = None,
    on_begin: Callable[[Privacy, Accountant], object] = lambda privacy, accountant: None,
    stop: runs.Stop | None = None,
    until: Limits | Watch | None = None,
) -> runs.RunSummary:
    """`finetune` with differential privacy of every row, for programs that return the losses of rows.

    A step tells no loss: the losses of the journal, of the summary and of `on_step` are 0.

    Args:
        batch_of: (inputs, labels) of some rows, given their numbers: at least one, and at most as many as the program
            takes at once.
        rows: How many rows there are.
        privacy: How much may be told. A run that is gone on with has what it was begun with.
        steps: Steps that the run has in the end.
        learning_rate: As for `finetune`, as all that follows.
        run: The folder; what is spent is in its `privacy.json`.
        seed: Of the directions, and of nothing else.
        eps: As for `finetune`.
        on_step: Likewise.
        on_begin: Told the settings of the run, and what counts it, before the first step.
        stop: As for `finetune`.
        until: Likewise. When the budget is spent, that is the limit that the summary names.

    Raises:
        ConfigError: The program does not return the losses of rows, or a step would take more rows than there are.
        RunMismatchError: The folder holds a run with other settings of privacy, or without.
        MissingPackageError: dp-accounting is missing.
        InputError: As from `finetune`, and all that it raises.
    """
    manifest, rows = session.program.manifest, whole("rows", rows, 1)
    if not manifest.zo.row_losses:
        raise ConfigError(
            "the program does not return the losses of rows, which privacy needs",
            hint="compile(..., zo=ZOConfig(row_losses=True)), or mobizo compile --zo-row-losses",
        )
    if manifest.labels.also is None:
        raise ConfigError("the loss has no label that does not count, for batches that are not full")
    if session.ranks > 1:
        raise ConfigError("a run with privacy is of one process", hint="leave out the ranks")
    batch_rows = int(manifest.labels.shape[0])
    settled = _begun(session, run, privacy, rows, batch_rows, whole("steps", steps, 0))
    assert settled.sample_rows is not None and settled.noise_multiplier is not None and settled.delta is not None
    accountant = Accountant(settled.noise_multiplier, settled.sample_rows / rows, settled.delta)
    allowed = steps if settled.epsilon is None else accountant.steps_within(settled.epsilon, steps)
    on_begin(settled, accountant)

    def drawn(step: int) -> Any:
        numbers = [row for row in range(rows) if _SYSTEM.random() < accountant.sample_rate]
        batches = [numbers[first : first + batch_rows] for first in range(0, len(numbers), batch_rows)]
        return [batch_of(batch) for batch in batches], None

    watch = watch_of(until)
    summary = runs.finetune(
        _Private(session, settled),
        drawn,
        steps=allowed,
        learning_rate=learning_rate,
        run=run,
        seed=seed,
        eps=eps,
        on_step=on_step,
        stop=stop,
        until=watch,
    )
    if run is not None:
        _write(Path(run), settled, rows, summary.steps, accountant.epsilon(summary.steps))
    if summary.steps == allowed < steps:
        summary = dataclasses.replace(summary, limit=f"the budget of epsilon {settled.epsilon:g} is spent")
    return summary


class _Private:
    """A session whose steps are noised. Inputs of a step are the batches of its rows, of which there may be none."""

    def __init__(self, session: Measuring, privacy: Privacy) -> None:
        self._session, self._privacy, self.program = session, privacy, session.program
        self._estimator = get_estimator(session.program.manifest.zo.estimator)

    noised = True

    def state(self) -> Tensor:
        """Of the session."""
        return self._session.state()

    def load_state(self, flat: Tensor) -> None:
        """Of the session."""
        self._session.load_state(flat)

    def replay(self, seed: int, projected_gradient: Tensor | Sequence[float], learning_rate: float) -> None:
        """As the session does."""
        self._session.replay(seed, projected_gradient, learning_rate)

    def train_step(
        self, inputs: Any, labels: Tensor | None = None, *, seed: int, learning_rate: float, eps: float | None = None
    ) -> StepResult:
        """Measure all batches along the same directions, add them up, add noise, and make the step from that."""
        zo, privacy = self.program.manifest.zo, self._privacy
        assert privacy.noise_multiplier is not None and privacy.sample_rows is not None
        before, total_Q = self.state(), torch.zeros(zo.queries, dtype=torch.float64)
        with runs.all_or_none(self._session):
            for batch in inputs:
                found = self._session.train_step(*_pair(batch), seed=seed, learning_rate=0.0, eps=eps)
                self.load_state(before)  # a rule that remembers its steps has counted the measurement
                size_1 = torch.tensor([self.program.manifest.eps if eps is None else eps])
                assert found.row_losses is not None
                slopes_QR = slopes_of_rows(self._estimator, found.row_losses, size_1, zo.queries)
                total_Q += clipped(slopes_QR, privacy.row_clip).sum(dim=1)
            deviation = privacy.noise_multiplier * privacy.row_clip
            noised_Q = (total_Q + deviation * _normals(zo.queries)) / privacy.sample_rows
            self.replay(seed, noised_Q.float(), learning_rate)
        return StepResult(0.0, torch.zeros(zo.lanes), noised_Q.float())


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


def _pair(batch: Batch) -> tuple[Any, Tensor | None]:
    return (batch[0], batch[1]) if isinstance(batch, (tuple, list)) else (batch, None)


def _normals(count: int) -> Tensor:
    draws = [[_SYSTEM.gauss(0.0, 1.0) for _ in range(_DRAWS)] for _ in range(count)]
    return torch.tensor([math.fsum(some) / math.sqrt(_DRAWS) for some in draws], dtype=torch.float64)


def _begun(
    session: Measuring, run: str | PathLike[str] | None, privacy: Privacy, rows: int, batch_rows: int, steps: int
) -> Privacy:
    """The settings of a run, from its folder where it was begun, else settled for so many steps and written down.

    Raises:
        RunMismatchError: It was begun with others, or without privacy.
    """
    if run is None:
        return privacy.settled(rows, batch_rows, steps)
    folder = Path(run)
    before = read_privacy(folder)
    if before is None:
        if (folder / runs.JOURNAL).exists():
            raise RunMismatchError(
                "the run was begun without privacy", where=str(folder), hint="give this one a folder of its own"
            )
        settled = privacy.settled(rows, batch_rows, steps)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, settled, rows, 0, 0.0)
        return settled
    was, of_rows = before
    given = {name: value for name, value in privacy.to_json().items() if value is not None}
    other = [name for name, value in given.items() if was.to_json()[name] != value]
    if other or of_rows != rows:
        name, old, new = (other[0], was.to_json()[other[0]], given[other[0]]) if other else ("rows", of_rows, rows)
        raise RunMismatchError(
            f"the run was begun with another {name} ({old} before, {new} now)",
            where=str(folder),
            hint="what was spent counts for the settings that it was begun with; give this one a folder of its own",
        )
    return was


def read_privacy(folder: Path) -> tuple[Privacy, int] | None:
    """The settings of a private run and how many rows it has; None for a run without.

    Raises:
        JournalError: The file is damaged.
    """
    path = folder / runs.PRIVACY
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Privacy.from_json(values["settings"]), int(values["rows"])
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise JournalError(f"what the run may tell cannot be read: {error!r}", where=str(path)) from None


def _write(folder: Path, privacy: Privacy, rows: int, steps: int, spent: float) -> None:
    values = {"settings": privacy.to_json(), "rows": rows, "steps": steps, "epsilon_spent": spent}
    with whole_file(folder / runs.PRIVACY) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
