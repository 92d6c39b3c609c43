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

from torch import Tensor, fx

from mobizo_compiler.errors import LossError, MobizoError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import LABELS_INPUT
from mobizo_compiler.step.losses import Loss


@dataclasses.dataclass(frozen=True)
class AttachLoss(Pass):
    """Trace `loss` on the model's outputs."""

    loss: Loss
    needs = frozenset({facts.FUNCTIONAL})
    gives = frozenset({facts.LOSS})
    breaks = frozenset({facts.CANONICAL})
    inputs = "added"
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Raise `LossError` if the loss does not fit the outputs."""
        leaves, nesting = list(edit.outputs.values()), edit.nesting
        assert nesting is not None
        name, axis = next(iter(edit.rows.items()))
        rows = edit.inputs[name].meta["val"].shape[axis]
        wanted = self.loss.label_spec(nesting.unflatten([leaf.meta["val"] for leaf in leaves]))
        if wanted.shape[0] is not None and str(wanted.shape[0]) != str(rows):
            raise LossError(
                f"{self.loss!r} takes labels of shape {tuple(map(str, wanted.shape))} for these outputs; "
                f"the first axis must be the {rows} rows",
                hint="the outputs have their rows elsewhere: pass a function of outputs and labels as the loss",
            )
        labels = edit.add_input(LABELS_INPUT, (rows, *wanted.shape[1:]), wanted.dtype, row_axis=0)

        def row_losses(labels: Tensor, *leaves: Tensor) -> Any:
            return self.loss(nesting.unflatten(leaves), labels)

        with edit.graph.inserting_before(edit.graph.output_node()):
            results = self._traced(edit, row_losses, labels, *leaves)
        if not isinstance(results, (tuple, list)) or len(results) != 2 or not all(map(_is_node, results)):
            raise LossError(
                f"{self.loss!r} must return two tensors: the loss of each row, and how many values it is the sum of"
            )
        row_loss, row_weight = results
        for name, node in (("loss", row_loss), ("weight", row_weight)):
            if tuple(map(str, node.meta["val"].shape)) != (str(rows),):
                raise LossError(
                    f"the {name} that {self.loss!r} returns has shape {tuple(node.meta['val'].shape)}, not [rows]"
                )
            if not node.meta["val"].dtype.is_floating_point:
                raise LossError(
                    f"the {name} that {self.loss!r} returns is {node.meta['val'].dtype}; it must be float32",
                    hint="convert it: .to(torch.float32)",
                )
        edit.set_outputs({"row_loss": row_loss, "row_weight": row_weight})

    def _traced(self, edit: Editor, function: Any, *nodes: fx.Node) -> Any:
        try:
            return edit.inline(function, *nodes)
        except MobizoError:
            raise
        except Exception as error:
            raise LossError(
                f"{self.loss!r} cannot be traced on the model's outputs: {error}",
                hint="a loss is made of tensor operations on outputs and labels; for rewards that are not, score lanes "
                "with learning rate 0 or `Session.lane`, and pass what the host computes to `Session.replay`",
            ) from error


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)
