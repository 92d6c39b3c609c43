"""Store the frozen base weights in fewer bits, with torchao.

Given:    %y = linear(%x, %p_w, %p_bias)     %e = embedding(%p_table, %ids)
Result:   %d = dequantize_affine(quantize_affine(%x, choose_qparams_affine(%x)))
          %y = linear(%d, dequantize_affine(%p_w_qdata, %p_w_scale, ...), %p_bias)
          %e = embedding(%p_table_codes, %ids) * embedding(%p_table_scale, %ids)
Numbers: changes, because weights, and with 8da* the inputs of layers, are rounded.

It runs after the rewriting, so adapters read the inputs before they are rounded, and A, noise, loss and state stay
float32. Inputs that several layers share are rounded once. Rows of an embedding are decoded after they were looked up.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import fx

from mobizo_compiler import facts
from mobizo_compiler.editor import Editor
from mobizo_compiler.errors import QuantizationError
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import operand
from mobizo_compiler.quantization import QuantizationConfig, StoredWeight, store_table, store_weight
from mobizo_compiler.targets import Target, find_targets

aten = torch.ops.aten
_PRODUCTS = {aten.linear.default: None, aten.addmm.default: 0, aten.mm.default: None, aten.matmul.default: None}


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Quantize the products with a parameter, and embeddings.

    Args:
        config: A `QuantizationConfig`, or a configuration of torchao for all linear layers.
        heads: Paths of the output layers.
        stored: Weights that another method quantized already, by what they were made from; more are added.
    """

    config: Any
    heads: tuple[str, ...] = ()
    stored: dict[tuple[str, str, str], StoredWeight] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )
    needs = frozenset({facts.STATIC})
    breaks = frozenset({facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """Replace each layer and table; what has no parameter of its own stays."""
        for fqn, calls in find_targets(edit).items():
            for target in calls:
                self._linear(edit, fqn, target)
        for node in edit.calls(aten.embedding.default):
            self._embedding(edit, node)
        if not self.stored:
            raise QuantizationError(
                "there is nothing to quantize: no linear layer has a float32 weight of its own",
                hint="leave quantization out; weights that are quantized already stay as they are",
            )
        _share_rounded_inputs(edit)

    def _linear(self, edit: Editor, fqn: str, target: Target) -> None:
        node = target.call
        if node.target not in _PRODUCTS:
            return
        placeholder = operand(node, target.position + 1)
        turned = node.target is not aten.linear.default
        if placeholder.target is aten.t.default or placeholder.target is aten.transpose.int:
            placeholder, turned = operand(placeholder), not turned
        weight = edit.tensor(placeholder)
        if weight is None or weight.dtype != torch.float32 or weight.dim() != 2:
            return
        recipe = self.config
        if isinstance(self.config, QuantizationConfig):
            recipe = self.config.recipe_of(fqn, fqn in self.heads)
        if recipe == "none":
            return
        group_size = getattr(self.config, "group_size", 0)
        key = (str(edit.tensor_name(placeholder)), str(recipe), fqn if recipe is self.config else "")
        if key not in self.stored:
            straight = weight.t().contiguous() if turned else weight
            self.stored[key] = store_weight(straight, recipe, group_size, fqn)
        stored = self.stored[key]
        if not stored.parts:
            return
        bias = _bias(node)
        with edit.graph.inserting_before(node):
            parts = _placeholders(edit, key, stored)
            x = operand(node, target.position)
            if bias is None:
                new = edit.inline(lambda x, *tensors: stored.linear(x, None, *tensors), x, *parts)
            else:
                new = edit.inline(stored.linear, x, bias, *parts)
        edit.replace(node, new)

    def _embedding(self, edit: Editor, node: fx.Node) -> None:
        table = edit.tensor(operand(node))
        if not isinstance(self.config, QuantizationConfig) or self.config.rows == "none" or table is None:
            return
        name = str(edit.tensor_name(operand(node)))
        if table.dtype != torch.float32 or self.config.recipe_of(name.removesuffix(".weight"), False) == "none":
            return
        key = (name, "rows", self.config.rows)
        if key not in self.stored:
            self.stored[key] = store_table(table, self.config.rows, self.config.group_size, name)
        stored = self.stored[key]
        assert stored.rows is not None
        with edit.graph.inserting_before(node):
            new = edit.inline(stored.rows, operand(node, 1), *_placeholders(edit, key, stored))
        edit.replace(node, new)


def _bias(node: fx.Node) -> fx.Node | None:
    if node.target is aten.addmm.default:
        return operand(node)
    return operand(node, 2) if len(node.args) > 2 and isinstance(node.args[2], fx.Node) else None


def _placeholders(edit: Editor, key: tuple[str, str, str], stored: StoredWeight) -> list[fx.Node]:
    """The tensors of a stored weight; equal ones of several layers are there once."""
    known: dict[str | None, fx.Node] = {edit.tensor_name(node): node for node in edit.tensors}
    label = hashlib.sha256("|".join(key).encode()).hexdigest()[:8]
    nodes = []
    for part, tensor in stored.parts.items():
        name = f"{key[0]}.{part}.{label}".replace(".", "_")
        nodes.append(known[name] if name in known else edit.add_constant(name, tensor))
    return nodes


def _share_rounded_inputs(edit: Editor) -> None:
    """Round an input once for all layers that read it: equal calls of torchao's operators become one."""
    first: dict[Any, fx.Node] = {}
    for node in list(edit.graph.nodes):
        name = str(node.target)
        if node.op == "call_function" and ("_affine" in name or "getitem" in name):
            key = (name, str(node.args), str(node.kwargs))
            if key in first:
                edit.replace(node, first[key])
            else:
                first[key] = node
