"""Write the update into the state, for plain ZO-SGD: B <- B - learning_rate * mean of g_i z_i.

Given:    %noise : f32[q, P]    return projected_gradient = %g : f32[q]
Result:   input %mobizo_learning_rate: f32[1]
          %finite = sum(g * 0) + learning_rate * 0 == 0
          %g1 = where(%finite, g, 0)      %rate = where(%finite, learning_rate, 0)
          update %b_mobizo_lora_b <- state - %rate * sum(g1 / q * noise, 0)
Numbers: exact; with learning rate 0 the state keeps its bits, and so it does where that or a projected gradient is not
finite.

Where the program has a gradient itself, as output `gradient` : f32[P], that is the direction, or, where lanes are
measured too, it is added to theirs: each is zero where the other is not. It is no output any more.

Other rules (`mobizo_compiler.step.rules`) make another step of the mean, and keep what they remember behind B in the
state. `replay.py` builds the same update as a program of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import EPS_INPUT, LEARNING_RATE_INPUT
from mobizo_compiler.passes.differentiate import length
from mobizo_compiler.step.estimators import get_estimator, rates_of
from mobizo_compiler.step.rules import PLAIN, UpdateRule, updated
from mobizo_compiler.step.sites import Site

Update = Callable[..., Tensor]


def updated_state(queries: int, rule: UpdateRule) -> Update:
    """The update as a function of state [S], learning rate [1], projected gradient [q] and noise [q, P]."""

    def update(state_S: Tensor, learning_rate_1: Tensor, slopes_Q: Tensor, noise_QP: Tensor) -> Tensor:
        finite_1 = (slopes_Q * 0.0).sum(dim=0, keepdim=True) + learning_rate_1 * 0.0 == 0.0
        return _moved(rule, state_S, learning_rate_1, finite_1, _measured(finite_1, slopes_Q, noise_QP, queries))

    return update


def updated_by_gradient(rule: UpdateRule, clip: float | None) -> Update:
    """The update as a function of state [S], learning rate [1], the length [1] of a gradient, and that [P].

    A gradient that is longer than `clip` is shortened to that.
    """

    def update(state_S: Tensor, learning_rate_1: Tensor, norm_1: Tensor, gradient_P: Tensor) -> Tensor:
        finite_1 = (norm_1 + learning_rate_1) * 0.0 == 0.0
        return _moved(rule, state_S, learning_rate_1, finite_1, _limited(finite_1, norm_1, gradient_P, clip))

    return update


def updated_by_both(zo: ZOConfig, rule: UpdateRule, sites: Sequence[Site]) -> Update:
    """The update as a function of state, learning rate, projected gradient, noise, and a gradient [P].

    Each of the two says nothing of the numbers that the other speaks of.
    """
    estimator = get_estimator(zo.estimator)

    def update(
        state_S: Tensor, learning_rate_1: Tensor, slopes_Q: Tensor, noise_QP: Tensor, gradient_P: Tensor
    ) -> Tensor:
        norm_1 = length(gradient_P)
        finite_1 = (slopes_Q * 0.0).sum(dim=0, keepdim=True) + (norm_1 + learning_rate_1) * 0.0 == 0.0
        measured_P = _measured(finite_1, slopes_Q, noise_QP, int(slopes_Q.shape[0]))
        direction_P = measured_P + _limited(finite_1, norm_1, gradient_P, zo.clip)
        return _moved(rule, state_S, learning_rate_1, finite_1, direction_P, rates_of(estimator, sites))

    return update


def _measured(finite_1: Tensor, slopes_Q: Tensor, noise_QP: Tensor, queries: int) -> Tensor:
    """The mean of g_i z_i, [P]; nothing where a number is not finite."""
    slopes_Q = torch.where(finite_1, slopes_Q, torch.zeros_like(slopes_Q)) * (1.0 / queries)
    return (noise_QP * slopes_Q.reshape(queries, 1)).sum(dim=0)


def _limited(finite_1: Tensor, norm_1: Tensor, gradient_P: Tensor, clip: float | None) -> Tensor:
    direction_P = torch.where(finite_1, gradient_P, torch.zeros_like(gradient_P))
    return direction_P if clip is None else direction_P * (clip / torch.clamp(norm_1, min=clip))


def _moved(
    rule: UpdateRule,
    state_S: Tensor,
    learning_rate_1: Tensor,
    finite_1: Tensor,
    direction_P: Tensor,
    share_P: Tensor | None = None,
) -> Tensor:
    rate_1 = torch.where(finite_1, learning_rate_1, torch.zeros_like(learning_rate_1))
    return updated(rule, int(direction_P.shape[0]), state_S, direction_P, rate_1, share_P)


@dataclasses.dataclass(frozen=True)
class UpdateState(Pass):
    """Move the state as the rule says.

    Args:
        rule: The rule.
        zo: Limits the length of a gradient that the program has itself, and the rate of what is measured beside it.
    """

    rule: UpdateRule = PLAIN
    zo: ZOConfig = dataclasses.field(default_factory=ZOConfig)
    needs = frozenset({facts.DIFFERENCED})
    gives = frozenset({facts.UPDATED})
    breaks = frozenset({facts.GRADIENT})
    inputs = "added"
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Append the update and mark the state as changed."""
        outputs = dict(edit.outputs)
        gradient, slopes, noise = outputs.pop("gradient", None), outputs["projected_gradient"], edit.values.get("noise")
        learning_rate = edit.add_input(LEARNING_RATE_INPUT, [1], torch.float32, before=edit.inputs[EPS_INPUT])
        queries = slopes.meta["val"].shape[0]
        if gradient is None:
            update = updated_state(queries, self.rule)
        elif noise is None:
            update = updated_by_gradient(self.rule, self.zo.clip)
        else:
            update = updated_by_both(self.zo, self.rule, edit.sites)
        found = [value for value in (noise, gradient) if value is not None]
        with edit.graph.inserting_before(edit.graph.output_node()):
            edit.mutate_state(edit.inline(update, edit.state, learning_rate, slopes, *found))
        edit.set_outputs(outputs)
