"""Pass the state in and out, for hosts whose bindings cannot share a buffer between methods.

Given:    state %b_mobizo_lora_b: f32[P]        update %b_mobizo_lora_b <- %new
Result:   input %mobizo_state: f32[P], the last     output mobizo_state = %new, the last (where the method changes it)
Numbers: exact.

Android's and iOS's `Module` of ExecuTorch 1.5 give every method memory of its own; there the host carries the state.
"""

from __future__ import annotations

import dataclasses

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass


@dataclasses.dataclass(frozen=True)
class PassState(Pass):
    """Make the state an input and an output."""

    needs = frozenset({facts.STATIC})
    gives = frozenset({facts.STATE_PASSED})
    breaks = frozenset({facts.SITES, facts.DIFFERENCED, facts.UPDATED})
    inputs = "added"
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Move it from the buffers to the user inputs."""
        edit.pass_state()
