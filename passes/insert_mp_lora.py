"""Add an adapter branch to every targeted layer (MP-LoRA on LoRA-FA; MobiZO, section 3.3).

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

With `train_a`, A is in the state as well, behind every B and as [in, r]; then `%h` is a product of every lane's rows
with its own A, scaled after it. Behind what is trained, the state has what the update rule remembers.

Where the loss reads a few outputs of a layer, as a choice between words reads those of a head, these alone are
adapted: the state has their columns of B, and a product with zeros and ones puts `%d1` in its place among all outputs.
Others would move with the noise alone, since no loss depends on them.

Where the rows are not the outermost axis, or are flattened together with others, the axis analysis says how lanes are
brought to the front for the product with B, and back. A convolution gets a convolution to r channels as A, and B as a
1x1 convolution on top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_compiler.analysis.axes import Layout, row_axes
from mobizo_compiler.analysis.targets import LayerCall, find_targets, resolve_targets
from mobizo_compiler.config import LoraConfig
from mobizo_compiler.errors import AdapterError, NoMatchingTargetError, NotSupportedYetError, UnsupportedGraphError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.nodes import source_line
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.passes.slice_outputs import outputs_read
from mobizo_compiler.step.rules import PLAIN, UpdateRule, initial_memory
from mobizo_compiler.step.sites import Site, initial_state

aten = torch.ops.aten
LORA_A = "mobizo_lora_a_"
OUTPUTS = "mobizo_lora_outputs_"


@dataclasses.dataclass(frozen=True)
class InsertMPLoRA(Pass):
    """Adapt the layers that `lora` selects, or those of `sites`.

    Args:
        lora: Which layers, and how.
        sites: Sites of another method of the program. With them there is one lane, and rows may meet.
        given: A and B of every site by path, where A is not drawn.
        rule: The update rule, whose memory is in the state too.
    """

    lora: LoraConfig
    sites: tuple[Site, ...] = ()
    given: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    rule: UpdateRule = PLAIN
    needs = frozenset({facts.FUNCTIONAL})
    gives = frozenset({facts.SITES})

    def rewrite(self, edit: Editor) -> None:
        """Raise `NoMatchingTargetError`, or `UnsupportedGraphError` where rows meet or a layer cannot be adapted."""
        every = find_targets(edit)
        if self.sites:
            calls = {site.fqn: every.get(site.fqn, []) for site in self.sites}
            edit.sites = self.sites
        else:
            calls = self._targets(every, resolve_targets(edit.before, self.lora))
            edit.sites = self._layout(calls)
        edit.lora_a = self._given(edit.sites) if self.given else initial_lora_a(edit.sites, self.lora.init_seed)
        layouts = None if self.sites else row_axes(edit.graph, edit.rows, edit.before.fixed_rows, edit.tensors)
        parameters = sum(site.trained for site in edit.sites)
        memory = initial_memory(self.rule, parameters)
        state = edit.add_state(initial_state(edit.sites, edit.lora_a, memory))
        scaled = [
            edit.add_constant(f"{LORA_A}{index}", edit.lora_a[site.fqn] * site.scaling)
            if site.a_offset is None
            else None
            for index, site in enumerate(edit.sites)
        ]
        places = {
            site.fqn: edit.add_constant(f"{OUTPUTS}{index}", _places(site))
            for index, site in enumerate(edit.sites)
            if site.outputs
        }
        with edit.graph.inserting_before(min(t.call for targets in calls.values() for t in targets)):
            trained = edit.call(aten.slice.Tensor, state, 0, 0, parameters) if memory.numel() else state
            lanes = edit.call(aten.reshape.default, trained, [1, parameters])
            count = edit.call(aten.sym_size.int, lanes, 0)
        edit.values |= {"trained": trained, "lanes": lanes}
        for site, lora_a in zip(edit.sites, scaled, strict=True):
            for target in calls[site.fqn]:
                layout = layouts.layout(target.call) if layouts else Layout(0)
                if layout is None:
                    raise UnsupportedGraphError(
                        f"layer {site.fqn} works on a value that has no rows, so that lanes cannot differ there",
                        where=source_line(target.call),
                        hint="leave this layer out of target_modules",
                    )
                _branch(edit, target, lora_a, _Lanes(lanes, count, layout, site, places.get(site.fqn)))

    def _given(self, sites: tuple[Site, ...]) -> dict[str, Tensor]:
        for site in sites:
            if tuple(self.given[site.fqn][0].shape) != site.a_shape:
                found = list(self.given[site.fqn][0].shape)
                raise AdapterError(
                    f"A of layer {site.fqn} is {found} in the adapter, {list(site.a_shape)} in the model"
                )
        return {site.fqn: self.given[site.fqn][0] for site in sites}

    def _targets(self, every: dict[str, list[LayerCall]], lora: LoraConfig) -> dict[str, list[LayerCall]]:
        """Calls of targeted layers by path, in order of first call."""
        found = {fqn: targets for fqn, targets in every.items() if lora.matches(fqn)}
        if not found:
            names = sorted({fqn.rpartition(".")[2] for fqn in every})
            layers = "" if lora.layers_to_transform is None else f" in layers {lora.layers_to_transform}"
            raise NoMatchingTargetError(
                f"no linear layer or convolution matches target_modules={lora.target_modules!r}{layers}",
                hint=f"the layers of this model that can be adapted are named {', '.join(names) or '(there is none)'}; "
                f"a whole path is for example {next(iter(every), '-')!r}",
            )
        return found

    def _layout(self, calls: dict[str, list[LayerCall]]) -> tuple[Site, ...]:
        sites, offset = [], 0
        for fqn, targets in calls.items():
            first = targets[0]
            for target in targets:
                dtype = target.call.meta["val"].dtype
                if dtype != torch.float32:
                    raise UnsupportedGraphError(
                        f"layer {fqn} computes in {dtype}; adapters need float32",
                        where=source_line(target.call),
                        hint="pass the module itself, which is captured in float32; or export model.float()",
                    )
                if (target.in_features, target.out_features) != (first.in_features, first.out_features):
                    raise UnsupportedGraphError(
                        f"parameter {fqn} is used in two orientations", where=source_line(target.call)
                    )
            if self.lora.train_a and first.kernel:
                raise NotSupportedYetError(
                    f"layer {fqn} is a convolution, whose A cannot be trained", hint="train_a=False, or leave it out"
                )
            shape = (first.in_features, first.out_features)
            outputs = self._outputs(fqn, targets)
            sites.append(Site(fqn, offset, self.lora.r, *shape, self.lora.scaling, first.kernel, outputs=outputs))
            offset += sites[-1].size
        if self.lora.train_a:
            for index, site in enumerate(sites):
                sites[index] = dataclasses.replace(site, a_offset=offset)
                offset += sites[index].trained - site.size
        return tuple(sites)

    def _outputs(self, fqn: str, targets: list[LayerCall]) -> tuple[int, ...]:
        """The outputs of a layer that are adapted, where the loss reads a few of them; empty for all."""
        wanted: set[int] = set()
        for target in targets:
            read = None if target.kernel else outputs_read(target.result)
            if read is None:
                return ()
            wanted |= read
        others = [index for index in range(targets[0].out_features) if index not in wanted]
        if len(others) < len(wanted):
            return ()
        given = self.given[fqn][1] if fqn in self.given else torch.zeros(1, targets[0].out_features)
        elsewhere = given.shape[-1] != targets[0].out_features or bool(given[:, others].any())
        return () if elsewhere else tuple(sorted(wanted))


def initial_lora_a(sites: tuple[Site, ...], seed: int) -> dict[str, Tensor]:
    """A of every site, float32 [r, in_features, *kernel], Kaiming-uniform with a = sqrt 5, from one CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for site in sites:
        matrix = torch.empty(site.a_shape)
        matrices[site.fqn] = torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    return matrices


@dataclasses.dataclass(frozen=True)
class _Lanes:
    """The lanes' copies of B, their number, where the rows of a layer's result are, and which outputs are adapted."""

    lanes: fx.Node
    count: fx.Node
    layout: Layout
    site: Site
    places: fx.Node | None


def _places(site: Site) -> Tensor:
    """What puts adapted outputs in their places among all, float32 [out_features, width], of zeros and ones."""
    return torch.zeros(site.out_features, site.width).index_put_(
        (torch.tensor(site.outputs), torch.arange(site.width)), torch.tensor(1.0)
    )


def _branch(edit: Editor, target: LayerCall, lora_a: fx.Node | None, lanes: _Lanes) -> None:
    layer, result = target.call, target.result
    with edit.graph.inserting_before(result.next):
        if target.kernel:
            options = (None, *layer.args[3:]) if len(layer.args) > 3 else (None,)
            hidden = edit.call(layer.target, target.source, lora_a, *options, **layer.kwargs)
            rank = layer.meta["val"].dim()
            hidden = edit.call(aten.permute.default, hidden, [0, *range(2, rank), 1])
            delta = _times_own(edit, hidden, lanes, lanes.site.offset, lanes.site.out_features)
            delta = edit.call(aten.permute.default, delta, [0, rank - 1, *range(1, rank - 1)])
        else:
            delta = _delta(edit, target.source, lora_a, lanes)
        total = edit.call(aten.add.Tensor, result, delta)
    edit.replace(result, total, keep=total)


def _delta(edit: Editor, source: fx.Node, lora_a: fx.Node | None, lanes: _Lanes) -> fx.Node:
    """What the adapter adds to a linear layer's result, from the layer's input."""
    site = lanes.site
    if lora_a is not None:
        hidden = edit.call(aten.linear.default, source, lora_a)
    else:
        assert site.a_offset is not None
        hidden = _times_own(edit, source, lanes, site.a_offset, site.r)
        hidden = edit.call(aten.mul.Tensor, hidden, site.scaling)
    delta = _times_own(edit, hidden, lanes, site.offset, site.width)
    return delta if lanes.places is None else edit.call(aten.linear.default, delta, lanes.places)


def _times_own(edit: Editor, left: fx.Node, lanes: _Lanes, offset: int, columns: int) -> fx.Node:
    """The product of every lane's entries of `left` [..., n] with its own matrix [n, columns] in the state.

    Args:
        edit: The program.
        left: The left factor.
        lanes: Where its rows are.
        offset: First element of the matrix in a lane of the state.
        columns: Width of the result.
    """
    site, count, axis = lanes.site, lanes.count, lanes.layout.axis
    sizes: list[Any] = edit.sizes(left)
    inner = int(left.meta["val"].shape[-1])
    if lanes.layout.outer == 0:
        raise UnsupportedGraphError("rows and another axis are flattened together", where=source_line(left))
    above = [size for size in (*sizes[:axis], lanes.layout.outer) if size != 1]
    if any(isinstance(size, fx.Node) for size in above):
        raise UnsupportedGraphError(
            f"layer {site.fqn} has its rows behind an axis of dynamic size",
            where=source_line(left),
            hint="leave dynamic_shapes out, or make the model batch-first",
        )
    blocks = math.prod(above)
    if blocks > 1:
        left = edit.call(aten.reshape.default, left, [blocks, count, -1, inner])
        left = edit.call(aten.permute.default, left, [1, 0, 2, 3])
    left = edit.call(aten.reshape.default, left, [count, -1, inner])
    right = edit.call(aten.slice.Tensor, lanes.lanes, 1, offset, offset + inner * columns)
    right = edit.call(aten.reshape.default, right, [count, inner, columns])
    product = edit.call(aten.bmm.default, left, right)
    if blocks > 1:
        product = edit.call(aten.reshape.default, product, [count, blocks, -1, columns])
        product = edit.call(aten.permute.default, product, [1, 0, 2, 3])
    sizes[axis], sizes[-1] = -1, columns
    return edit.call(aten.reshape.default, product, sizes)
