"""Repeat in at most four axes, which is what a Vulkan texture has.

Given:    %u = unsqueeze(%k, 2)                       : f32[N, KV, 1, T, D]
          %e = expand(%u, [-1, -1, rep, -1, -1])      : f32[N, KV, rep, T, D]
          %r = reshape(%e, [N, H, T, D])
Result:   %e = expand(reshape(%k, [N*KV, 1, T*D]), [N*KV, rep, T*D])
          %r = reshape(%e, [N, H, T, D])
Numbers: exact.

Grouped queries repeat keys and values this way. Neighbouring axes that are not repeated are one axis.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

from mobizo_compiler.backends.vulkan.views import base, reshaped
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class AtMostFourAxes(Pass):
    """Replace expansions to more than four axes, and merge chains of reshapes."""

    needs = frozenset({facts.STATIC, facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """Programs with dynamic sizes are left as they are: a reshape cannot have two unknown sizes."""
        if edit.before.dynamic:
            return
        for node in edit.calls(aten.expand.default):
            shape = list(node.meta["val"].shape)
            if len(shape) <= 4:
                continue
            before = [1] * (len(shape) - operand(node).meta["val"].dim()) + list(operand(node).meta["val"].shape)
            axes = zip(before, shape, strict=True)
            groups = [list(group) for _, group in itertools.groupby(axes, key=lambda pair: pair[0] != pair[1])]
            if len(groups) > 4:
                continue
            with edit.graph.inserting_before(node):
                merged = reshaped(edit, operand(node), [math.prod(old for old, _ in group) for group in groups])
                sizes = [math.prod(new for _, new in group) for group in groups]
                repeated = edit.call(aten.expand.default, merged, sizes)
                edit.replace(node, edit.call(aten.reshape.default, repeated, shape))
        for node in edit.calls(aten.reshape.default):
            if node not in edit.values.values() and base(edit, node) is not operand(node):
                with edit.graph.inserting_before(node):
                    edit.replace(node, reshaped(edit, node, node.meta["val"].shape))
