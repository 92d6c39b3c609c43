"""Write the update into the state: B <- B - learning_rate / q * sum_i g_i z_i.

Given:    %noise : f32[q, P]    return projected_gradient = %g : f32[q]
Result:   input %mobizo_learning_rate: f32[1]
          %g1 = where(sum(g * 0) == 0, g, 0)
          update %b_mobizo_lora_b <- state - (learning_rate / q) * sum(g1 * noise, 0)
Numbers: exact; with learning rate 0 the state keeps its bits, and where a projected gradient is not finite as well.

`replay.py` builds the same update as a program of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mobizo_compiler import facts
from mobizo_compiler.editor import Editor
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import EPS, LEARNING_RATE


def updated_state(queries: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The update as a function of state [P], noise [q, P], projected gradient [q] and learning rate [1]."""

    def update(state_P: Tensor, noise_QP: Tensor, gradient_Q: Tensor, learning_rate_1: Tensor) -> Tensor:
        finite_1 = (gradient_Q * 0.0).sum(dim=0, keepdim=True) == 0.0
        gradient_Q = torch.where(finite_1, gradient_Q, torch.zeros_like(gradient_Q))
        direction_P = (noise_QP * gradient_Q.reshape(queries, 1)).sum(dim=0)
        return state_P - direction_P * (learning_rate_1 * (1.0 / queries))

    return update


@dataclasses.dataclass(frozen=True)
class UpdateState(Pass):
    """Plain ZO-SGD."""

    needs = frozenset({facts.DIFFERENCED})
    gives = frozenset({facts.UPDATED})

    def rewrite(self, edit: Editor) -> None:
        """Append the update and mark the state as changed."""
        noise, gradient = edit.values["noise"], edit.outputs["projected_gradient"]
        learning_rate = edit.add_input(LEARNING_RATE, [1], torch.float32, before=edit.inputs[EPS])
        update = updated_state(noise.meta["val"].shape[0])
        with edit.graph.inserting_before(edit.graph.output_node()):
            edit.mutate_state(edit.inline(update, edit.state, noise, gradient, learning_rate))
