"""Append the loss: labels come in, and the loss of every row goes out instead of the model's outputs.

Given:    return output_0 = %logits                       : f32[rows, tokens, vocabulary]
Result:   input %mobizo_labels: i64[rows, tokens]
          return row_loss = %neg : f32[rows]      return row_weight = %sum : f32[rows]
Numbers: exact.

A row gives the sum of its losses and their number (for a language model, of labelled tokens); the loss of a lane is
the sum of the first over its rows divided by the sum of the second.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from mobizo_compiler import facts
from mobizo_compiler.editor import Editor
from mobizo_compiler.errors import LossError
from mobizo_compiler.losses import Loss
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import LABELS


@dataclasses.dataclass(frozen=True)
class AttachLoss(Pass):
    """Trace `loss` on the model's outputs."""

    loss: Loss
    needs = frozenset({facts.FUNCTIONAL, facts.SYMBOLIC_ROWS})
    gives = frozenset({facts.LOSS})

    def rewrite(self, edit: Editor) -> None:
        """Raise `LossError` if the loss does not fit the outputs."""
        leaves, spec = list(edit.outputs.values()), edit.out_spec
        assert spec is not None
        outputs = pytree.tree_unflatten([leaf.meta["val"] for leaf in leaves], spec)
        wanted = self.loss.label_spec(outputs)
        labels = edit.add_input(LABELS, wanted.shape, wanted.dtype)

        def row_losses(labels: Tensor, *leaves: Tensor) -> Any:
            return self.loss(pytree.tree_unflatten(list(leaves), spec), labels)

        with edit.graph.inserting_before(edit.graph.output_node()):
            row_loss, row_weight = edit.inline(row_losses, labels, *leaves)
        rows = labels.meta["val"].shape[0]
        for name, node in (("loss", row_loss), ("weight", row_weight)):
            if tuple(map(str, node.meta["val"].shape)) != (str(rows),):
                raise LossError(
                    f"the {name} that {self.loss!r} returns has shape {tuple(node.meta['val'].shape)}, not [rows]"
                )
        edit.set_outputs({"row_loss": row_loss, "row_weight": row_weight})
