"""Build the update alone: a program without a network that repeats a step from its seed and projected gradient.

Given:    an empty program
Result:   state %b_mobizo_lora_b: f32[P]
          input %mobizo_seed: i32[1]   input %mobizo_projected_gradient: f32[q]   input %mobizo_learning_rate: f32[1]
          update %b_mobizo_lora_b <- state - learning_rate * sum(g / q * noise(seed), 0)
Numbers: exact; bit for bit the update of `train_step`, because both are traced from the same two functions.

Crash recovery, merging of several devices' steps, and training on rewards that no graph can compute need this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from mobizo_compiler.config import ZOConfig
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import LEARNING_RATE_INPUT, PROJECTED_GRADIENT_INPUT, SEED_INPUT
from mobizo_compiler.passes.perturb import normal_constant
from mobizo_compiler.passes.update_state import updated_state
from mobizo_compiler.step.noise import noise_values
from mobizo_compiler.step.rules import PLAIN, UpdateRule, initial_memory
from mobizo_compiler.step.sites import Site, initial_state


@dataclasses.dataclass(frozen=True)
class Replay(Pass):
    """Build the update alone, in an empty program."""

    sites: tuple[Site, ...]
    zo: ZOConfig
    rule: UpdateRule = PLAIN
    lora_a: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    needs = frozenset({facts.FUNCTIONAL})
    gives = frozenset({facts.UPDATED, facts.STATIC})
    inputs = "added"

    def rewrite(self, edit: Editor) -> None:
        """Add state and inputs, then the same two functions that a step is made of."""
        parameters, zo = sum(site.trained for site in self.sites), self.zo
        edit.sites = self.sites
        state = edit.add_state(initial_state(self.sites, self.lora_a, initial_memory(self.rule, parameters)))
        seed = edit.add_input(SEED_INPUT, [1], torch.int32)
        gradient = edit.add_input(PROJECTED_GRADIENT_INPUT, [zo.queries], torch.float32)
        learning_rate = edit.add_input(LEARNING_RATE_INPUT, [1], torch.float32)
        update = updated_state(zo.queries, self.rule)

        def replay(
            state_S: Tensor, seed_1: Tensor, gradient_Q: Tensor, learning_rate_1: Tensor, *table: Tensor
        ) -> Tensor:
            noise_QP = noise_values(seed_1, zo.queries, parameters, zo.noise, *table)
            return update(state_S, learning_rate_1, gradient_Q, noise_QP)

        with edit.graph.inserting_before(edit.graph.output_node()):
            table = normal_constant(edit, zo.noise)
            edit.mutate_state(edit.inline(replay, state, seed, gradient, learning_rate, *table))
