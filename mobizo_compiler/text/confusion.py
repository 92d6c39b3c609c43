"""Where a classifier is wrong: which answer is taken for which, and what that makes of each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How often each answer was chosen where each was right.

    Args:
        choices: The answers.
        counts: By the right answer, then by the one that was chosen.

    >>> found = Confusion(("no", "yes"), ((3, 1), (0, 2)))
    >>> found.recall, found.precision[0]
    ((0.75, 1.0), 1.0)
    """

    choices: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, chosen: Tensor, answers: Tensor, choices: tuple[str, ...]) -> Confusion:
        """Count.

        Args:
            chosen: Number of the choice of each sample, int64 [samples].
            answers: Number of the right one; -1 for a sample that does not count.
            choices: The answers.
        """
        known, size = answers >= 0, len(choices)
        counts = torch.bincount(answers[known] * size + chosen[known], minlength=size * size)
        return cls(choices, tuple(map(tuple, counts.reshape(size, size).tolist())))

    @property
    def _table(self) -> Tensor:
        return torch.tensor(self.counts, dtype=torch.float64)

    @property
    def precision(self) -> tuple[float | None, ...]:
        """Share of the samples with that choice for which it is right; None where it was never chosen."""
        return _shares(self._table.diag(), self._table.sum(dim=0))

    @property
    def recall(self) -> tuple[float | None, ...]:
        """Share of the samples with that answer for which it was chosen; None where there are none."""
        return _shares(self._table.diag(), self._table.sum(dim=1))

    @property
    def f1(self) -> tuple[float | None, ...]:
        """Harmonic mean of precision and recall; None where an answer is neither there nor chosen."""
        return _shares(2 * self._table.diag(), self._table.sum(dim=0) + self._table.sum(dim=1))

    @property
    def macro_f1(self) -> float | None:
        """Mean of F1 over the answers that have one, each as important as the others."""
        known = [value for value in self.f1 if value is not None]
        return sum(known) / len(known) if known else None

    def by_choice(self) -> dict[str, dict[str, Any]]:
        """Samples, precision, recall and F1 of each answer, as JSON values."""
        rows = zip(self.choices, self.counts, self.precision, self.recall, self.f1, strict=True)
        return {name: {"rows": sum(n), "precision": p, "recall": r, "f1": f} for name, n, p, r, f in rows}


def _shares(parts: Tensor, wholes: Tensor) -> tuple[float | None, ...]:
    pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
    return tuple(part / whole if whole else None for part, whole in pairs)
