"""Compute on tokens as the rows of a matrix, from the embedding to the loss.

Given:    %e = embedding(%w, %ids)                    : f32[N, T, D]
          %a = add(%e, %position)                     : f32[N, T, D]
          %y = linear(%a, %v)                         : f32[N, T, K]
Result:   %e = embedding(%w, reshape(%ids, [N*T]))    : f32[N*T, D]
          %a = add(%e, reshape(expand(%position, [N, T, D]), [N*T, D]))
          %y = linear(%a, %v)                         : f32[N*T, K]
          reshape(%y, [N, T, K]), where something reads all axes, as attention does
Numbers: exact.

Products with 4-bit weights are right for matrices only: given three axes the Vulkan runtime computes garbage, and it
looks through a reshape in front of the product. So the reshape must not be there, but before the first layer.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.backends.vulkan.operators import POINTWISE, REDUCTIONS, name_of
from mobizo_compiler.backends.vulkan.views import reshaped
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.step.noise import NORMAL_TABLE

aten = torch.ops.aten
_ALONG_LAST = frozenset(("softmax", "_softmax", "log_softmax", "_log_softmax"))


@dataclasses.dataclass(frozen=True)
class FlattenTokens(Pass):
    """Merge all axes but the last of what token-wise calls compute."""

    needs = frozenset({facts.STATIC, facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """In order; a value that is used with all its axes gets a reshape, once."""
        if edit.before.dynamic:
            return
        tokens = _Tokens(edit)
        for node in list(edit.graph.nodes):
            if node.op == "call_function":
                with edit.graph.inserting_before(node):
                    tokens.visit(node)


class _Tokens:
    """Values whose matrix of tokens is known.

    A value [*axes, width] has the matrix [prod(axes), width]; what quantizes tokens has one number a token, [*axes],
    and the vector [prod(axes)].
    """

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.matrices: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Make a call on matrices, if it is token-wise and has more than two axes."""
        value = node.meta["val"]
        name = name_of(node)
        if node.target is operator.getitem:
            if (source := self.matrices.get(operand(node))) is not None:
                self.matrices[node] = self.edit.graph.call_function(operator.getitem, (source, node.args[1]))
                self.matrices[node].meta["val"] = source.meta["val"][node.args[1]]
            return
        if name == "choose_qparams_affine":
            if operand(node).meta["val"].dim() > 2 and self._by_token(node):
                self.matrices[node] = self._quantization(node)
            return
        if not isinstance(value, Tensor) or (value.dim() < 3 and name != "embedding"):
            return
        new = self._flat(node, name)
        if new is None:
            return
        if new not in self.matrices.values():
            new.meta |= {key: value for key, value in node.meta.items() if key != "val"}
        self.matrices[node] = new
        whole = self.edit.call(aten.reshape.default, new, list(value.shape))
        self.edit.replace(node, whole)
        self.matrices[whole] = new

    def _flat(self, node: fx.Node, name: str) -> fx.Node | None:
        """The call on matrices, or None."""
        call, value = self.edit.call, node.meta["val"]
        args: tuple[Any, ...] = node.args
        if name == "embedding":
            noise = self.edit.tensor_name(args[0]) == NORMAL_TABLE
            if value.dim() < 3 or value.dtype != torch.float32 or noise:
                return None
            return call(node.target, args[0], reshaped(self.edit, args[1], [args[1].meta["val"].numel()]), *args[2:])
        if name == "linear":
            return call(node.target, self._matrix(args[0]), *args[1:])
        if name in ("quantize_affine", "dequantize_affine"):
            known = all(inner in self.matrices for inner in node.all_input_nodes[1:])
            return self._quantization(node) if self._by_token(node) and known else None
        if not args or (args[0] not in self.matrices and not self._any_known(node)):
            return None
        if name == "reshape":
            same = operand(node).meta["val"].shape[-1] == value.shape[-1]
            return self.matrices[operand(node)] if same and operand(node) in self.matrices else None
        if name in POINTWISE:
            return self._pointwise(node)
        if operand(node) not in self.matrices:
            return None
        rank, matrix = operand(node).meta["val"].dim(), self._matrix(operand(node))
        if name in REDUCTIONS and args[1:] in (([-1], True), ([rank - 1], True)):
            return call(node.target, matrix, [-1], True)
        if name in _ALONG_LAST and args[1] in (-1, rank - 1):
            return call(node.target, matrix, 1, *args[2:], **node.kwargs)
        if name == "layer_norm" and len(args[1]) == 1:
            return call(node.target, matrix, *args[1:], **node.kwargs)
        if name == "slice" and len(args) > 1 and args[1] in (-1, rank - 1):
            return call(node.target, matrix, 1, *args[2:])
        if name == "repeat" and len(args[1]) == rank and all(times == 1 for times in args[1][1:]):
            return call(node.target, matrix, [args[1][0], 1])
        return None

    def _pointwise(self, node: fx.Node) -> fx.Node | None:
        shape = node.meta["val"].shape
        if node.meta["val"].dtype != torch.float32:
            return None
        known = [i for i in node.all_input_nodes if i in self.matrices and i.meta["val"].shape == shape]
        if not known:
            return None
        args = [self._broadcast(arg, shape) if isinstance(arg, fx.Node) else arg for arg in node.args]
        return self.edit.call(node.target, *args, **node.kwargs)

    def _broadcast(self, node: fx.Node, shape: torch.Size) -> fx.Node:
        """An operand of an elementwise call as an operand of the call on matrices."""
        size = node.meta["val"].shape
        if size == shape or size == (*shape[:-1], 1):
            return self._matrix(node)
        if math.prod(size[:-1]) == 1:  # one row for all tokens
            return node if len(size) < 2 else reshaped(self.edit, node, [size[-1]])
        wide = self.edit.call(aten.expand.default, node, [*shape[:-1], size[-1]])
        return self.edit.call(aten.reshape.default, wide, [math.prod(shape[:-1]), size[-1]])

    def _matrix(self, node: fx.Node) -> fx.Node:
        if node not in self.matrices:
            shape = node.meta["val"].shape
            self.matrices[node] = reshaped(self.edit, node, [math.prod(shape[:-1]), shape[-1]])
        return self.matrices[node]

    def _any_known(self, node: fx.Node) -> bool:
        return any(inner in self.matrices for inner in node.all_input_nodes)

    def _by_token(self, node: fx.Node) -> bool:
        """Whether a call of torchao quantizes each token on its own."""
        shape = operand(node).meta["val"].shape
        position = 2 if name_of(node) == "choose_qparams_affine" else 1
        return list(node.args[position]) == [*[1] * (len(shape) - 1), shape[-1]]  # type: ignore[arg-type]

    def _quantization(self, node: fx.Node) -> fx.Node:
        """A call of torchao on matrices."""
        args: list[Any] = [self.matrices.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
        args[0] = self._matrix(operand(node))
        width = operand(node).meta["val"].shape[-1]
        args[2 if name_of(node) == "choose_qparams_affine" else 1] = [1, width]
        return self.edit.call(node.target, *args, **node.kwargs)
