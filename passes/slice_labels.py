"""Pick the labelled positions before the head instead of after it.

Given:    %logits = linear(%h, %head)              : f32[rows, tokens, vocabulary]
          %g = gather(%logits, 1, expand(unsqueeze(%position, -1), [-1, -1, vocabulary]))
Result:   %h1 = gather(%h, 1, expand(unsqueeze(%position, -1), [-1, -1, width]))
          %g = linear(%h1, %head)                  : f32[rows, labels, vocabulary]
Numbers: same up to rounding.

A loss with `max_labels` reads a few positions of a row. All others would go through the widest layer of the network
for nothing: 32 lanes of 128 tokens and 32,000 words are 524 MB of logits.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mobizo_compiler import facts
from mobizo_compiler.editor import Editor
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import operand

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SliceLabels(Pass):
    """Move gathers along tokens above linear layers and scalar operations, as far as they go."""

    needs = frozenset({facts.LOSS, facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """Each move makes a new gather nearer to the inputs, which may move again."""
        pending = edit.calls(aten.gather.default)
        while pending:
            gather = pending.pop()
            source = gather.args[0]
            if _picks_tokens(gather) and isinstance(source, fx.Node) and _is_token_wise(source):
                pending.append(_move_up(edit, gather, source))


def _picks_tokens(gather: fx.Node) -> bool:
    """The index is one position for the whole last axis."""
    index = gather.args[2]
    if gather.args[1] != 1 or not isinstance(index, fx.Node) or index.target is not aten.expand.default:
        return False
    inner = index.args[0]
    return gather.meta["val"].dim() == 3 and isinstance(inner, fx.Node) and inner.meta["val"].shape[2] == 1


def _is_token_wise(node: fx.Node) -> bool:
    """Each position of the result depends on the same position of the first argument alone."""
    if node.target is aten.linear.default:
        return True
    scalar = node.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(node.args[1], fx.Node)
    return scalar or node.target in (aten.tanh.default, aten.to.dtype)


def _move_up(edit: Editor, gather: fx.Node, source: fx.Node) -> fx.Node:
    hidden, position = operand(source), operand(operand(gather, 2))
    with edit.graph.inserting_before(gather):
        narrow = edit.call(aten.expand.default, position, [-1, -1, hidden.meta["val"].shape[2]])
        picked = edit.call(aten.gather.default, hidden, 1, narrow)
        edit.replace(gather, edit.call(source.target, picked, *source.args[1:], **source.kwargs))
    return picked
