"""Add an adapter branch to every targeted linear layer (MP-LoRA on LoRA-FA; MobiZO, section 3.3).

Given:    %y = linear(%x, %p_w)                                                : f32[rows, 5, 20]
Result:   tensor %b_mobizo_lora_b: f32[P]
          %lanes = reshape(%b_mobizo_lora_b, [1, P])      %count = sym_size(%lanes, 0)
          %h = linear(%x, %b_mobizo_lora_a_0)          %h1 = reshape(%h, [%count, -1, r])
          %b = slice(%lanes, 1, offset, offset + r*20) %b1 = reshape(%b, [%count, r, 20])
          %d = bmm(%h1, %b1)                           %d1 = reshape(%d, [-1, 5, 20])
          %z = add(%y, %d1)
Numbers: exact while B is zero, which it is at the start.

`lanes` holds one copy of B per lane, here a single one. The number of lanes is read from its shape, so a later pass
multiplies lanes by replacing this one value. A is frozen and shared by all lanes; `lora_alpha / r` is folded into it.
All B lie in one flat buffer, so noise and update are one operation each however many sites there are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler import facts
from mobizo_compiler.config import LoraConfig
from mobizo_compiler.editor import Editor
from mobizo_compiler.errors import NoMatchingTargetError, UnsupportedGraphError
from mobizo_compiler.pipeline import Pass
from mobizo_compiler.program import Site, operand, source_line

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class InsertMPLoRA(Pass):
    """Adapt the linear layers that `lora` selects."""

    lora: LoraConfig
    needs = frozenset({facts.FUNCTIONAL, facts.SYMBOLIC_ROWS})
    gives = frozenset({facts.SITES})

    def rewrite(self, edit: Editor) -> None:
        """Raise `NoMatchingTargetError` or `UnsupportedGraphError`."""
        calls = self._targets(edit)
        edit.sites = self._layout(edit, calls)
        edit.lora_a = initial_lora_a(edit.sites, self.lora.init_seed)
        rows = next(iter(edit.inputs.values())).meta["val"].shape[0]
        parameters = sum(site.size for site in edit.sites)
        state = edit.add_state(parameters)
        scaled = [
            edit.add_constant(f"mobizo_lora_a_{index}", edit.lora_a[site.fqn] * site.scaling)
            for index, site in enumerate(edit.sites)
        ]
        with edit.graph.inserting_before(min(n for nodes in calls.values() for n in nodes)):
            lanes = edit.call(aten.reshape.default, state, [1, parameters])
            count = edit.call(aten.sym_size.int, lanes, 0)
        edit.values["lanes"] = lanes
        for site, lora_a in zip(edit.sites, scaled, strict=True):
            for linear in calls[site.fqn]:
                _check_rows(linear, rows)
                _branch(edit, linear, lora_a, lanes, count, site)

    def _targets(self, edit: Editor) -> dict[str, list[fx.Node]]:
        """Calls of targeted linear layers by module path, in order of first call."""
        every: dict[str, list[fx.Node]] = {}
        for node in edit.calls(aten.linear.default):
            path = edit.tensor_name(operand(node, 1))
            if path is not None:
                every.setdefault(_module_path(node, path), []).append(node)
        found = {fqn: nodes for fqn, nodes in every.items() if self.lora.matches(fqn)}
        if not found:
            names = sorted({fqn.rpartition(".")[2] for fqn in every})
            layers = "" if self.lora.layers_to_transform is None else f" in layers {self.lora.layers_to_transform}"
            raise NoMatchingTargetError(
                f"no linear layer matches target_modules={self.lora.target_modules!r}{layers}",
                hint=f"the linear layers of this model are named {', '.join(names) or '(there is none)'}; "
                f"a whole path is for example {next(iter(every), '-')!r}",
            )
        return found

    def _layout(self, edit: Editor, calls: dict[str, list[fx.Node]]) -> tuple[Site, ...]:
        sites, offset = [], 0
        for fqn, nodes in calls.items():
            weight = operand(nodes[0], 1).meta["val"]
            if weight.dtype != torch.float32:
                raise UnsupportedGraphError(
                    f"layer {fqn} has {weight.dtype} weights; adapters need float32",
                    where=source_line(nodes[0]),
                    hint="call model.float() first",
                )
            out_features, in_features = weight.shape
            sites.append(Site(fqn, offset, self.lora.r, in_features, out_features, self.lora.scaling))
            offset += sites[-1].size
        return tuple(sites)


def initial_lora_a(sites: tuple[Site, ...], seed: int) -> dict[str, Tensor]:
    """A of every site, float32 [r, in_features], Kaiming-uniform with a = sqrt 5, from one CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for site in sites:
        matrix = torch.empty(site.r, site.in_features)
        matrices[site.fqn] = torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    return matrices


def _module_path(node: fx.Node, weight: str) -> str:
    """Path of the module that calls: where weights are tied, the weight's own path may name another module."""
    stack = node.meta.get("nn_module_stack") or {}
    if stack:
        fqn = str(list(stack.values())[-1][0])
        if fqn and "Linear" in str(list(stack.values())[-1][1]):
            return fqn.removeprefix("L['self'].")
    return weight.rpartition(".")[0]


def _check_rows(linear: fx.Node, rows: Any) -> None:
    """Lanes are told apart by the outermost axis, so it must carry the rows, and no other axis may."""
    shape = operand(linear).meta["val"].shape
    symbols = rows.node.expr.free_symbols
    ratio = shape[0].node.expr / rows.node.expr if isinstance(shape[0], torch.SymInt) else None
    others = [s for s in shape[1:] if isinstance(s, torch.SymInt) and s.node.expr.free_symbols & symbols]
    if ratio is None or ratio.free_symbols & symbols or others or len(shape) < 2:
        raise UnsupportedGraphError(
            f"the input of this layer has shape {tuple(map(str, shape))}; its first axis must be the rows ({rows})",
            where=source_line(linear),
            hint="leave this layer out of target_modules, or make the model batch-first",
        )


def _branch(edit: Editor, linear: fx.Node, lora_a: fx.Node, lanes: fx.Node, count: fx.Node, site: Site) -> None:
    sizes = linear.meta["val"].shape
    with edit.graph.inserting_before(linear.next):
        hidden = edit.call(aten.linear.default, operand(linear), lora_a)
        hidden = edit.call(aten.reshape.default, hidden, [count, -1, site.r])
        lora_b = edit.call(aten.slice.Tensor, lanes, 1, site.offset, site.offset + site.size)
        lora_b = edit.call(aten.reshape.default, lora_b, [count, site.r, site.out_features])
        delta = edit.call(aten.bmm.default, hidden, lora_b)
        delta = edit.call(aten.reshape.default, delta, [-1, *sizes[1:]])
        total = edit.call(aten.add.Tensor, linear, delta)
    edit.replace(linear, total, keep=total)
