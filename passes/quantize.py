"""Store the frozen base weights in fewer bits, with torchao.

Given:    %y = linear(%x, %p_w, %p_bias)     %e = embedding(%p_table, %ids)
Result:   %s = mul(%x, %smoothing)
          %d = dequantize_affine(quantize_affine(%s, choose_qparams_affine(%s)))
          %y = linear(%d, dequantize_affine(%p_w_qdata, %p_w_scale, ...), %p_bias)
          %e = embedding(%p_table_codes, %ids) * embedding(%p_table_scale, %ids)
          %g = bmm(%gy, unsqueeze(dequantize_affine(%p_w_qdata, %p_w_scale, ...), 0))
Numbers: changes, because weights, and with 8da* the inputs of layers, are rounded.

It runs after the rewriting, so adapters read the inputs before they are rounded, and A, noise, loss and state stay
float32. A gradient passes through the rounding of inputs as it stands (straight through; Bengio et al. 2013), and
through a layer with the weights that the layer has then. Inputs that several layers share are rounded once. Rows of an
embedding are decoded after they were looked up.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.analysis.targets import LayerCall, find_targets, linear_weight
from mobizo_compiler.errors import QuantizationError
from mobizo_compiler.format.files import raw_bytes
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.paging import give_back, lay_down
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import ROWS
from mobizo_compiler.passes.tidy import share_equal_calls
from mobizo_compiler.quantization.weights import (
    GROUP_SUMS,
    ROUND_ACTIVATIONS,
    QuantizationConfig,
    StoredWeight,
    store_table,
    store_weight,
)
from mobizo_compiler.step.noise import NORMAL_TABLE

aten = torch.ops.aten
SMOOTHING = "smoothing_"


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Quantize the products with a parameter, and embeddings.

    Args:
        config: A `QuantizationConfig`, or a configuration of torchao for all linear layers.
        output_layers: Paths of the output layers.
        smoothing: What the inputs of a layer are multiplied by before they are rounded, by the path of its weight.
        stored: Weights that another method quantized already, by what they were made from; more are added.
    """

    config: Any
    output_layers: tuple[str, ...] = ()
    smoothing: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    stored: dict[tuple[str, str, str], StoredWeight] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )
    needs = frozenset({facts.STATIC})
    breaks = frozenset({facts.CANONICAL})
    numbers = "changed"

    @property
    def by_row(self) -> bool:
        """Whether some rows of a weight alone are stored as they are in the whole; not known of torchao's own."""
        return isinstance(self.config, QuantizationConfig) and self.config.by_row

    def rewrite(self, edit: Editor) -> None:
        """Replace each layer and table; what has no parameter of its own stays."""
        used: dict[fx.Node, _Used] = {}
        for fqn, calls in find_targets(edit).items():
            for target in calls:
                self._linear(edit, fqn, target, used)
        for weight, layer in used.items():
            _decode_for_gradients(edit, weight, layer)
        for node in edit.calls(aten.embedding.default):
            self._embedding(edit, node)
        if not self.stored:
            raise QuantizationError(
                "there is nothing to quantize: no linear layer has a float32 weight of its own",
                hint="leave quantization out; weights that are quantized already stay as they are",
            )
        # Smooth and round an input once for all layers that read it.
        share_equal_calls(edit, _of_inputs)

    def _linear(self, edit: Editor, fqn: str, target: LayerCall, used: dict[fx.Node, _Used]) -> None:
        node = target.call
        found = linear_weight(edit, target)
        if found is None:
            return
        name = str(edit.tensor_name(found.node))
        recipe = self.config
        if isinstance(self.config, QuantizationConfig):
            recipe = self.config.recipe_of(fqn, fqn in self.output_layers)
        if recipe == "none":
            return
        group_size = getattr(self.config, "group_size", 0)
        key = (name, str(recipe), fqn if recipe is self.config else "")
        factor = self.smoothing.get(name.partition(ROWS)[0]) if recipe in ROUND_ACTIVATIONS else None
        if key not in self.stored:
            give_back()
            weight = found.read(edit)
            straight = weight.contiguous() if factor is None else weight / factor
            asymmetric = getattr(self.config, "asymmetric", False)
            self.stored[key] = _laid_down(store_weight(straight, recipe, group_size, fqn, asymmetric))
        stored = self.stored[key]
        if not stored.parts:
            return
        bias = _bias(node)
        with edit.graph.inserting_before(node):
            parts = _placeholders(edit, key, stored)
            x = operand(node, target.position)
            if factor is not None:
                x = edit.call(aten.mul.Tensor, x, edit.shared_constant(_name_of(factor), factor))
            if bias is None:
                new = edit.inline(lambda x, *tensors: stored.linear(x, None, *tensors), x, *parts, alike=stored.alike)
            else:
                new = edit.inline(stored.linear, x, bias, *parts, alike=stored.alike)
        edit.replace(node, new)
        used[found.node] = _Used(stored, parts, factor, found.turned)

    def _embedding(self, edit: Editor, node: fx.Node) -> None:
        config, name = self.config, edit.tensor_name(operand(node))
        if not isinstance(config, QuantizationConfig) or config.table_recipe == "none" or name in (None, NORMAL_TABLE):
            return
        full = operand(node).meta["val"].dtype == torch.float32
        if not full or config.recipe_of(name.removesuffix(".weight"), False) == "none":
            return
        key = (name, "rows", config.table_recipe)
        if key not in self.stored:
            table = edit.tensor(operand(node))
            assert table is not None
            self.stored[key] = _laid_down(store_table(table, config.table_recipe, config.group_size, name))
        stored = self.stored[key]
        assert stored.rows is not None
        with edit.graph.inserting_before(node):
            new = edit.inline(stored.rows, operand(node, 1), *_placeholders(edit, key, stored))
        edit.replace(node, new)


@dataclasses.dataclass(frozen=True)
class _Used:
    """A stored weight with its placeholders, what the layer's input is multiplied by, and whether the parameter is
    [in_features, out_features]."""

    stored: StoredWeight
    parts: list[fx.Node]
    factor: Tensor | None
    turned: bool


def _decode_for_gradients(edit: Editor, weight: fx.Node, layer: _Used) -> None:
    """Let those that read the parameter itself read what the layer multiplies its input by."""
    readers = [user for user in weight.users if user.target is not aten.embedding.default]
    if not readers:
        return
    assert layer.stored.decoded is not None
    with edit.graph.inserting_before(min(readers)):
        alike = layer.stored.alike and ("decoded", layer.stored.alike)
        decoded = edit.inline(layer.stored.decoded, *layer.parts, alike=alike)
        if layer.factor is not None:
            decoded = edit.call(aten.mul.Tensor, decoded, edit.shared_constant(_name_of(layer.factor), layer.factor))
        if layer.turned:
            decoded = edit.call(aten.t.default, decoded)
    for reader in readers:
        reader.replace_input_with(weight, decoded)


def _of_inputs(node: fx.Node) -> bool:
    """Whether a call prepares the input of layers: smooths it, rounds it, or sums it in groups."""
    name = str(node.target)
    if "_affine" in name or "getitem" in name:
        return True
    factor = node.args[1] if node.target in (aten.mul.Tensor, aten.linear.default) else None
    return isinstance(factor, fx.Node) and factor.name.startswith(("b_" + SMOOTHING, "b_" + GROUP_SUMS))


def _bias(node: fx.Node) -> fx.Node | None:
    if node.target is aten.addmm.default:
        return operand(node)
    return operand(node, 2) if len(node.args) > 2 and isinstance(node.args[2], fx.Node) else None


def _laid_down(stored: StoredWeight) -> StoredWeight:
    """The same with large tensors in files, but for what layers of a width share."""
    parts = {name: part if name == GROUP_SUMS else lay_down(part) for name, part in stored.parts.items()}
    return dataclasses.replace(stored, parts=parts)


def _placeholders(edit: Editor, key: tuple[str, str, str], stored: StoredWeight) -> list[fx.Node]:
    """The tensors of a stored weight; equal ones of several layers are there once."""
    label = hashlib.sha256("|".join(key).encode()).hexdigest()[:8]
    nodes = []
    for part, tensor in stored.parts.items():
        name = f"{key[0]}.{part}.{label}".replace(".", "_")
        if part == GROUP_SUMS:
            name = "_".join([GROUP_SUMS, *map(str, tensor.shape)])
        nodes.append(edit.shared_constant(name, tensor))
    return nodes


def _name_of(factor: Tensor) -> str:
    """One name for one factor, so that layers that share it share the product."""
    return SMOOTHING + hashlib.sha256(raw_bytes(factor)).hexdigest()[:16]
