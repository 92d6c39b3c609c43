"""Write torchao's quantization operators as plain ones, for engines that do not know them.

Given:    %w = dequantize_affine(%q, [1, 32], %scale, %zero, ...)    %q : i8[out, in] with values -8..7
          %d = dequantize_affine(quantize_affine(%x, choose_qparams_affine(%x)))
Result:   tensor %q_nibbles: u8[out, in/2]
          %w = (cat(bitwise_and(%q_nibbles, 15), bitwise_right_shift(%q_nibbles, 4)) - 8) * %scale, by groups
          %d = (clamp(round(%x * (1 / s)) + z, -128, 127) - z) * s    with s, z from amin(%x) and amax(%x)
Numbers: exact; weights of 4 bits take 4 bits.

Rows of an embedding are looked up first and decoded then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import CHOOSE, DEQUANTIZE, operand, operator_name, unrounded
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.quantization.weights import pack_nibbles, unpack_nibbles

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SpellOutQuantization(Pass):
    """Replace the operators of torchao.

    Args:
        keep_dynamic: Leave linear layers whose inputs are rounded, for a delegate that knows the pattern.
    """

    keep_dynamic: bool = False
    needs = frozenset({facts.STATIC})
    breaks = frozenset({facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """Weights and tables first, then what is rounded while the program runs."""
        packed: dict[str, fx.Node] = {}
        for node in list(edit.graph.nodes):
            if operator_name(node) != DEQUANTIZE or edit.tensor(operand(node)) is None:
                continue
            for user in list(node.users):
                if self.keep_dynamic and user.target is aten.linear.default and rounded_input(user) is not None:
                    continue
                if user.target is aten.embedding.default:
                    with edit.graph.inserting_before(user):
                        edit.replace(user, _decoded(edit, node, packed, operand(user, 1)))
                else:
                    with edit.graph.inserting_before(node):
                        user.replace_input_with(node, _decoded(edit, node, packed))
        if not self.keep_dynamic:
            for node in list(edit.graph.nodes):
                if unrounded(node) is not None:
                    with edit.graph.inserting_before(node):
                        edit.replace(node, _rounded(edit, operand(node)))


def scales_as(edit: Editor, dtype: torch.dtype, wanted: Callable[[fx.Node, Tensor], bool]) -> None:
    """Store the scales of quantized weights in another dtype; one new constant for each.

    Args:
        edit: The program.
        dtype: The other dtype.
        wanted: Of a dequantized weight and its scales, whether it has these.
    """
    converted: dict[fx.Node, fx.Node] = {}
    for node in list(edit.graph.nodes):
        if operator_name(node) != DEQUANTIZE:
            continue
        scale = operand(node, 2)
        tensor = edit.tensor(scale)
        if tensor is None or not wanted(node, tensor):
            continue
        if scale not in converted:
            name = f"{edit.tensor_name(scale)}_{str(dtype).removeprefix('torch.')}"
            converted[scale] = edit.add_constant(name, tensor.detach().to(dtype))
        node.args = (*node.args[:2], converted[scale], *node.args[3:])


def rounded_input(linear: fx.Node) -> fx.Node | None:
    """What a linear layer rounds before it multiplies; None if it rounds nothing."""
    return unrounded(operand(linear))


def _decoded(edit: Editor, node: fx.Node, packed: dict[str, fx.Node], ids: fx.Node | None = None) -> fx.Node:
    """The dequantized tensor, or its rows with indices `ids`."""
    codes, block, scale, zero = node.args[:4]
    lowest, highest = cast(tuple[int, int], node.args[5:7])
    codes, scale, zero = cast(tuple[fx.Node, fx.Node, fx.Node], (codes, scale, zero))
    values, offsets = cast(Tensor, edit.tensor(codes)), edit.tensor(zero)
    group = int(cast(list[int], block)[-1])
    small = (lowest, highest) == (-8, 7) and values.shape[-1] % 2 == 0
    if small:
        name = f"{edit.tensor_name(codes)}_nibbles"
        if name not in packed:
            packed[name] = edit.add_constant(name, pack_nibbles(values))
        codes = packed[name]
    shifted = offsets is not None and bool(offsets.any())

    def decode(codes: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        given = list(rest)
        zero = given.pop(0) if shifted else None
        if given:
            codes, scale = F.embedding(given[0], codes), F.embedding(given[0], scale)
            zero = None if zero is None else F.embedding(given[0], zero)
        numbers = unpack_nibbles(codes) if small else codes.to(torch.float32)
        groups = numbers.reshape(*numbers.shape[:-1], -1, group)
        if zero is not None:
            groups = groups - zero.to(torch.float32).unsqueeze(-1)
        return (groups * scale.to(torch.float32).unsqueeze(-1)).reshape(numbers.shape)

    extra = [*([zero] if shifted else []), *([ids] if ids is not None else [])]
    return cast(fx.Node, edit.inline(decode, codes, scale, *extra))


def _rounded(edit: Editor, quantize: fx.Node) -> fx.Node:
    """An input after rounding to integers and back; torchao, quant_primitives.py, asymmetric and per token."""
    x, scale = operand(quantize), operand(quantize, 2)
    chosen: Any = operand(scale)
    lowest, highest = cast(tuple[int, int], quantize.args[5:7])
    tiny = torch.finfo(torch.float32).smallest_normal
    assert chosen.args[1] == "ASYMMETRIC" and operator_name(chosen) == CHOOSE, chosen

    def round_(x: Tensor) -> Tensor:
        low = torch.clamp(torch.amin(x, dim=[-1], keepdim=True), max=0.0)
        high = torch.clamp(torch.amax(x, dim=[-1], keepdim=True), min=0.0)
        step = torch.clamp((high - low) / float(highest - lowest), min=tiny)
        zero = torch.clamp(lowest - torch.round(low / step), lowest, highest)
        return (torch.clamp(torch.round(x * (1.0 / step)) + zero, lowest, highest) - zero) * step

    return cast(fx.Node, edit.inline(round_, x))
