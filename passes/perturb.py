"""Move every lane's B: for the two-sided estimator, B + eps z_i in lane i, B - eps z_i in lane q + i.

Given:    %lanes = expand(view(%state, [1, P]), [2q, P])
Result:   input %mobizo_seed: i32[1]   input %mobizo_eps: f32[1]
          %z = ... of seed             : f32[q, P]
          %step = mul(%z, %mobizo_eps)
          %lanes = cat([add(%state, %step), sub(%state, %step)])  : f32[2q, P]
Numbers: changes, because lanes are perturbed; with eps = 0 exact.

Where the lanes are is the estimator's (`mobizo_compiler.step.estimators`). The noise is a function of the seed alone
(`mobizo_compiler.step.noise`), inside the graph and for all sites at once.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import EPS_INPUT, SEED_INPUT
from mobizo_compiler.step.estimators import directions, get_estimator, lanes_of
from mobizo_compiler.step.noise import NORMAL_TABLE, normal_table


@dataclasses.dataclass(frozen=True)
class Perturb(Pass):
    """Add noise as the estimator and its distribution say."""

    zo: ZOConfig
    needs = frozenset({facts.LANES})
    gives = frozenset({facts.PERTURBED})
    inputs = "added"
    numbers = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Replace the value `lanes` and name the noise `noise`."""
        old = edit.values["lanes"]
        estimator = get_estimator(self.zo.estimator)
        seed = edit.add_input(SEED_INPUT, [1], torch.int32)
        eps = edit.add_input(EPS_INPUT, [1], torch.float32)

        def perturbed(trained_P: Tensor, seed_1: Tensor, eps_1: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
            noise_QP = directions(estimator, edit.sites, seed_1, self.zo.queries, self.zo.noise, *table)
            return noise_QP, lanes_of(estimator, trained_P, noise_QP * eps_1)

        with edit.graph.inserting_before(old):
            edit.values["noise"], new = edit.inline(
                perturbed, edit.values["trained"], seed, eps, *normal_constant(edit, self.zo.noise)
            )
        edit.replace(old, new)


def normal_constant(edit: Editor, distribution: str) -> tuple[fx.Node, ...]:
    """The table that `noise_values` takes normal numbers from, as a constant of the program; none for signs."""
    return (edit.shared_constant(NORMAL_TABLE, normal_table()),) if distribution == "gaussian" else ()
