"""One lane a direction, each compared with the mean of the others: q lanes in place of 2q or q + 1."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from mobizo_compiler.step import Estimator


@dataclasses.dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """Lanes B + eps z_i; the slope along z_i is how far its loss is above the mean of the others, over eps."""

    def lanes(self, queries: int) -> int:
        """q."""
        return queries

    def perturbed(self, trained_P: Tensor, step_QP: Tensor) -> Tensor:
        """B + eps z_i, [G, P]."""
        return trained_P + step_QP

    def projected_gradient(self, loss_G: Tensor, eps_1: Tensor) -> Tensor:
        """The others' directions have mean zero, so that in the mean what is taken off is L(B)."""
        others = loss_G.shape[0] - 1
        return (loss_G - loss_G.mean(dim=0, keepdim=True)) * (1 + 1 / others) / eps_1

    def fewest_queries(self, normalized: bool) -> int:
        """Two: a lane needs another one to be compared with."""
        return 2
