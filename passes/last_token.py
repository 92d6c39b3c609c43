"""Return the logits of the last token alone: they say which token comes next.

Given:    return logits = %linear : f32[1, tokens, vocabulary]
Result:   %slice = slice(%linear, 1, -1, end) : f32[1, 1, vocabulary]     return logits = %slice
Numbers: exact.

A prompt of a thousand tokens has hundreds of megabytes of logits. `hoist_picks.py` moves the slice up, so that the head
and what is token by token before it run for one token.
"""

from __future__ import annotations

import dataclasses

import torch

from mobizo_compiler.errors import UnsupportedGraphError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import source_line
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten
_TO_THE_END = torch.iinfo(torch.int64).max


@dataclasses.dataclass(frozen=True)
class LastToken(Pass):
    """Slice the one output along the axis of its tokens."""

    needs = frozenset({facts.CANONICAL})
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Raise `UnsupportedGraphError` for an output that has no tokens and vocabulary."""
        ((name, logits),) = edit.outputs.items()
        if logits.meta["val"].dim() != 3:
            raise UnsupportedGraphError(
                f"the model returns {tuple(logits.meta['val'].shape)} in place of logits of tokens",
                where=source_line(logits),
            )
        with edit.graph.inserting_before(edit.graph.output_node()):
            last = edit.call(aten.slice.Tensor, logits, 1, -1, _TO_THE_END)
        edit.set_outputs({name: last})
