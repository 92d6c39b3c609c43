"""Write the update into the state, for plain ZO-SGD: B <- B - learning_rate * mean of g_i z_i.

Given:    %noise : f32[q, P]    return projected_gradient = %g : f32[q]
Result:   input %mobizo_learning_rate: f32[1]
          %finite = sum(g * 0) + learning_rate * 0 == 0
          %g1 = where(%finite, g, 0)      %rate = where(%finite, learning_rate, 0)
          update %b_mobizo_lora_b <- state - %rate * sum(g1 / q * noise, 0)
Numbers: exact; with learning rate 0 the state keeps its bits, and so it does where that or a projected gradient is not
finite.

Where the program has the gradient itself, as %gradient : f32[P], that is the direction; the check for finite numbers
takes its length, which is the projected gradient then.

Other rules (`mobizo_compiler.step.rules`) make another step of the mean, and keep what they remember behind B in the
state. `replay.py` builds the same update as a program of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import EPS_INPUT, LEARNING_RATE_INPUT
from mobizo_compiler.step.rules import PLAIN, UpdateRule, updated


def updated_state(queries: int, rule: UpdateRule) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The update as a function of state [S], noise [q, P], projected gradient [q] and learning rate [1]."""

    def update(state_S: Tensor, noise_QP: Tensor, gradient_Q: Tensor, learning_rate_1: Tensor) -> Tensor:
        finite_1 = (gradient_Q * 0.0).sum(dim=0, keepdim=True) + learning_rate_1 * 0.0 == 0.0
        gradient_Q = torch.where(finite_1, gradient_Q, torch.zeros_like(gradient_Q)) * (1.0 / queries)
        rate_1 = torch.where(finite_1, learning_rate_1, torch.zeros_like(learning_rate_1))
        direction_P = (noise_QP * gradient_Q.reshape(queries, 1)).sum(dim=0)
        return updated(rule, int(noise_QP.shape[1]), state_S, direction_P, rate_1)

    return update


def updated_by_gradient(rule: UpdateRule, clip: float | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The update as a function of state [S], gradient [P], its length [1] and learning rate [1].

    A gradient that is longer than `clip` is shortened to that.
    """

    def update(state_S: Tensor, gradient_P: Tensor, norm_1: Tensor, learning_rate_1: Tensor) -> Tensor:
        finite_1 = (norm_1 + learning_rate_1) * 0.0 == 0.0
        direction_P = torch.where(finite_1, gradient_P, torch.zeros_like(gradient_P))
        if clip is not None:
            direction_P = direction_P * (clip / torch.clamp(norm_1, min=clip))
        rate_1 = torch.where(finite_1, learning_rate_1, torch.zeros_like(learning_rate_1))
        return updated(rule, int(gradient_P.shape[0]), state_S, direction_P, rate_1)

    return update


@dataclasses.dataclass(frozen=True)
class UpdateState(Pass):
    """Move the state as the rule says.

    Args:
        rule: The rule.
        clip: Largest length of a gradient that the program has itself; None for no limit.
    """

    rule: UpdateRule = PLAIN
    clip: float | None = None
    needs = frozenset({facts.DIFFERENCED})
    gives = frozenset({facts.UPDATED})
    inputs = "added"

    def rewrite(self, edit: Editor) -> None:
        """Append the update and mark the state as changed."""
        slopes = edit.outputs["projected_gradient"]
        learning_rate = edit.add_input(LEARNING_RATE_INPUT, [1], torch.float32, before=edit.inputs[EPS_INPUT])
        if "gradient" in edit.values:
            update, direction = updated_by_gradient(self.rule, self.clip), edit.values["gradient"]
        else:
            direction = edit.values["noise"]
            update = updated_state(direction.meta["val"].shape[0], self.rule)
        with edit.graph.inserting_before(edit.graph.output_node()):
            edit.mutate_state(edit.inline(update, edit.state, direction, slopes, learning_rate))
