"""Progress of a run on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mobizo_compiler.cli.app import Remarks
from mobizo_compiler.format.program import StepResult
from mobizo_compiler.text.evaluation import Score
from mobizo_compiler.text.training import Validation

_RECENT = 20  # steps, or batches, whose median says how long the next ones take


class TimeLeft:
    """How long a run still takes, from its last steps and its validations.

    Args:
        total: Steps of the run.
        first_epoch: Steps until every row was seen once, where the first time costs more than the others; 0 if not.
        validations: How many validations come after a step.

    >>> left = TimeLeft(total=10, first_epoch=0, validations=lambda step: 1)
    >>> for step in (1, 2, 3):
    ...     left.step(step, 2.0)
    >>> left.validation(30.0)
    >>> left.text(3)
    '0:00:44'
    """

    def __init__(self, total: int, first_epoch: int = 0, validations: Callable[[int], int] = lambda step: 0) -> None:
        self._total, self._first_epoch, self._validations = total, min(total, first_epoch), validations
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._measured: list[float] = []

    def step(self, done: int, seconds: float) -> None:
        """Note how long a step took; the run has so many now."""
        if done == self._first_epoch + 1:
            self._steps.clear()
        self._steps.append(seconds)

    def validation(self, seconds: float) -> None:
        """Note how long a validation took."""
        self._measured.append(seconds)

    def validations_cost(self, every: int) -> float:
        """Seconds of a validation, as a share of the steps between two; 0 where that is not known yet."""
        if len(self._steps) < _RECENT or not self._measured or not every:
            return 0.0
        return self._measured[-1] / (statistics.median(self._steps) * every)

    def text(self, done: int) -> str:
        """The time left after so many steps; with `>` where later steps are not known yet."""
        if not self._steps:
            return "-:--:--"
        early = done < self._first_epoch
        until = self._first_epoch if early else self._total
        seconds = statistics.median(self._steps) * (until - done)
        if self._measured:
            seconds += statistics.fmean(self._measured[-3:]) * self._validations(done)
        return ("> " if early and until < self._total else "") + clock(seconds)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3723.4)
    '1:02:03'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Bar:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, remark: Remarks) -> None:
        self._remark = remark
        self._live = remark.console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
        )
        self._progress = Progress(*columns, console=remark.console, disable=not self._live or remark.console.quiet)
        self._task: TaskID | None = None
        self._smooth: float | None = None
        self._total = 0
        self._left = TimeLeft(0)
        self._last = time.monotonic()
        self._before = self._validated = 0  # what was done, and validated, when it was last told
        self._told = False

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, done: int, total: int, what: str = "fine-tuning", left: TimeLeft | None = None) -> None:
        """The bar appears, with so much done of the total."""
        self._total, self._left, self._last = total, left or TimeLeft(total), time.monotonic()
        self._task = self._progress.add_task(what, total=total, completed=done, detail="", left="-:--:--")
        if done:
            self._remark(f"going on after step {done} of {total}")

    def done(self, count: int) -> None:
        """So many of the total are done, which are not steps."""
        now = time.monotonic()
        self._left.step(count, (now - self._last) / max(1, count - self._before))
        self._last, self._before = now, count
        if self._task is not None:
            self._progress.update(self._task, completed=count, left=self._left.text(count))

    def step(self, step: int, result: StepResult, detail: str | None = None) -> None:
        """A step is done; what is told of it is its loss, if there is nothing else."""
        now = time.monotonic()
        self._left.step(step + 1, now - self._last)
        self._last = now
        self._smooth = result.loss if self._smooth is None else 0.9 * self._smooth + 0.1 * result.loss
        left, told = self._left.text(step + 1), detail or f"loss {self._smooth:.3f}"
        if self._task is not None:
            self._progress.update(self._task, completed=step + 1, detail=told, left=left)
        if not self._live and (step + 1) % 50 == 0:
            self._remark(f"step {step + 1} of {self._total}: {told}, left {left}")

    def validation(self, found: Validation) -> None:
        """A validation is done; that it takes longer than the steps before it is said once."""
        now = time.monotonic()
        self._left.validation(now - self._last)
        self._last = now
        numbers = ", ".join(f"{name} {value}" for name, value in shown(found.score).items())
        self._remark(f"validation after step {found.step}: {numbers}")
        cost = self._left.validations_cost(found.step - self._validated)
        self._validated = found.step
        if cost > 1 and not self._told:
            self._told = True
            self._remark(
                f"a validation takes as long as {cost * 100:.0f} % of the steps between two of them; --validate-every "
                "makes them seldom, --validation-rows short",
                "yellow",
            )


def shown(found: Score) -> dict[str, str]:
    """The numbers of a score that are there, for people."""
    named = {"loss": found.loss, "choice loss": found.choice_loss, "accuracy": found.accuracy}
    named |= {"accuracy per token": found.accuracy_per_token, "AUC": found.auc}
    return {name: f"{value:.3f}" for name, value in named.items() if value is not None}
