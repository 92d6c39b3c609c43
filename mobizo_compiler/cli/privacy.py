"""What `mobizo finetune` says of a private run: its settings, and what is spent, after every pass over the rows."""

from __future__ import annotations

from mobizo_compiler.cli.app import Remarks
from mobizo_compiler.cli.progress import Bar
from mobizo_compiler.device.accountant import Accountant, Privacy
from mobizo_compiler.format.program import StepResult


class Private:
    """A private run on the command line.

    Args:
        privacy: What was asked for.
    """

    def __init__(self, privacy: Privacy) -> None:
        self.privacy = privacy
        self._accountant: Accountant | None = None
        self._remark: Remarks | None = None
        self._epoch = 1  # steps of a pass over the rows, on average

    def begin(self, remark: Remarks, rows: int, settled: Privacy, accountant: Accountant, steps: int) -> None:
        """The run has its settings, and a budget for so many steps."""
        self.privacy, self._accountant, self._remark = settled, accountant, remark
        self._epoch = max(1, round(1 / accountant.sample_rate))
        budget = "no budget" if settled.epsilon is None else f"epsilon {settled.epsilon:g} at most"
        remark(
            f"private: {budget}, delta {settled.delta:.2g}; each of {rows} rows is in a step with probability "
            f"{accountant.sample_rate:.3g}; noise {settled.noise_multiplier:.3g} times the {settled.row_clip:g} that a "
            f"row may say; enough for {steps} steps"
        )

    def step(self, bar: Bar, step: int, result: StepResult) -> None:
        """A step is done: what is spent is told after every pass over the rows, and its bound in place of a loss."""
        done = step + 1
        if done % self._epoch == 0 and self._remark is not None:
            self._remark(f"epoch {done // self._epoch}: {self.told(done)}", "dim")
        most = self.spent((done // self._epoch + 1) * self._epoch)  # when this pass is over
        bar.step(step, result, f"epsilon below {most:.2f}")

    def spent(self, steps: int) -> float:
        """Epsilon after so many steps."""
        return 0.0 if self._accountant is None else self._accountant.epsilon(steps)

    def told(self, steps: int) -> str:
        """The same in words."""
        return f"epsilon {self.spent(steps):.3f} with delta {self.privacy.delta:.2g} spent"
