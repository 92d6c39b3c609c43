"""Turn the losses of the rows into a loss per lane and the projected gradient (MeZO, Malladi et al. 2023).

Given:    return row_loss : f32[G*rows]      return row_weight : f32[G*rows]
Result:   %lane_losses = row_loss summed by lane / row_weight summed by lane            : f32[2q]
          %projected_gradient = (%lane_losses[:q] - %lane_losses[q:]) / (2 eps)         : f32[q]
          (normalized and clipped, where the configuration says so)
          return loss = mean of %lane_losses : f32[1], lane_losses, projected_gradient
          (and row_losses = row_loss / row_weight                                       : f32[2q, rows], if wanted)
Numbers: exact.

Where a lane that is not perturbed has its loss already, that is the loss, and its gradient stays an output.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import EPS_INPUT
from mobizo_compiler.step.estimators import get_estimator, gradient_of, scaled


@dataclasses.dataclass(frozen=True)
class DifferenceLosses(Pass):
    """Compare the losses of the lanes as the estimator says."""

    zo: ZOConfig
    needs = frozenset({facts.LOSS, facts.PERTURBED})
    gives = frozenset({facts.DIFFERENCED})
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Append the arithmetic and replace the outputs."""
        lanes = edit.values["lanes"].meta["val"].shape[0]
        zo, estimator = self.zo, get_estimator(self.zo.estimator)

        def differences(row_loss_N: Tensor, row_weight_N: Tensor, eps_1: Tensor) -> dict[str, Tensor]:
            weight_G = row_weight_N.reshape(lanes, -1).sum(dim=1)
            loss_G = row_loss_N.reshape(lanes, -1).sum(dim=1) / weight_G
            gradient_Q = gradient_of(estimator, loss_G, eps_1, zo.queries)
            rows = {"row_losses": _by_row(row_loss_N, row_weight_N).reshape(lanes, -1)} if zo.row_losses else {}
            return {
                "loss": loss_G.mean(dim=0, keepdim=True),
                "lane_losses": loss_G,
                "projected_gradient": scaled(gradient_Q, loss_G, eps_1, zo.normalize, zo.clip),
                **rows,
            }

        row_loss, row_weight = edit.outputs["row_loss"], edit.outputs["row_weight"]
        with edit.graph.inserting_before(edit.graph.output_node()):
            clean = {name: node for name, node in edit.outputs.items() if name in ("loss", "gradient")}
            edit.set_outputs(edit.inline(differences, row_loss, row_weight, edit.inputs[EPS_INPUT]) | clean)


def _by_row(row_loss_N: Tensor, row_weight_N: Tensor) -> Tensor:
    """The mean of a row's losses; 0 where it has none, of which the sum is 0."""
    return row_loss_N / (row_weight_N + (row_weight_N == 0.0).to(row_weight_N.dtype))
