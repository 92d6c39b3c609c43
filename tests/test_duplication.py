"""Late duplication: the cut is the cheapest one, and nothing but the number of computed rows changes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from mobizo_compiler import CausalLMLoss, LoraConfig, ZOConfig, passes
from mobizo_compiler.analysis.axes import RowAxes, row_axes
from mobizo_compiler.analysis.costs import MULTIPLY_ADDS_PER_BYTE, multiply_adds, tensor_bytes
from mobizo_compiler.analysis.lane_cut import CALL_BYTES, duplication_points, perturbed_by
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.pipeline import Pipeline
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.testing import TinyCausalLM, tiny_batch

ZO = ZOConfig(queries=2)
LANES = ZO.lanes
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def adapted(layers: int, last: int) -> GraphProgram:
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, layers_to_transform=tuple(range(last, layers)))
    return Pipeline(
        [
            passes.AttachLoss(CausalLMLoss(max_labels=1)),
            passes.Canonicalize(),
            passes.HoistPicks(),
            passes.InsertMPLoRA(lora),
        ]
    ).run(passes.capture(TinyCausalLM(layers=layers).eval(), bind_example(None, inputs)))


def products_by_rows(program: GraphProgram) -> dict[bool, int]:
    """Multiply-adds of linear layers on one lane (False) and on all lanes (True)."""
    found = {False: 0, True: 0}
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            first = str(node.meta["val"].shape[0])
            found["*" in first] += multiply_adds(node)
    return found


def test_the_prefix_runs_once() -> None:
    before = adapted(layers=4, last=3)
    single = products_by_rows(before)[False]
    early, late = (products_by_rows(passes.DuplicateLanes(LANES, late=late)(before)) for late in (False, True))
    assert early[False] == 0 and early[True] == LANES * single
    assert late[False] > 0.7 * single, "three of four layers have no adapter before them"
    assert late[False] + late[True] / LANES == pytest.approx(single)


@pytest.mark.parametrize(("layers", "last"), [(1, 0), (2, 1), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_late_and_early_duplication_compute_the_same(layers: int, last: int) -> None:
    before = adapted(layers, last)
    rest = [passes.Perturb(ZO), passes.DifferenceLosses(ZO), passes.UpdateState(), passes.Specialize(3)]
    inputs, labels = tiny_batch()
    state = torch.randn(before.parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    scalars = (torch.tensor([5], dtype=torch.int32), torch.tensor([0.1]), torch.tensor([0.05]))
    results = []
    for late in (False, True):
        program = Pipeline([passes.DuplicateLanes(LANES, late=late), *rest]).run(before)
        results.append(run(program, state, *inputs.values(), labels, *scalars))
    for early_value, late_value in zip(*results, strict=True):
        torch.testing.assert_close(early_value, late_value, rtol=2e-5, atol=2e-6 / 0.05)


def run(program: GraphProgram, state: Tensor, *inputs: Tensor) -> list[Tensor]:
    given, known = iter(inputs), program.tensors()
    arguments = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            path = known.get(node.name)
            arguments.append(next(given) if path is None else state if path[0] == "mobizo_lora_b" else path[1])
    with torch.no_grad():
        return [value.clone() for value in program.exported.graph_module(*arguments)]


class Branches(nn.Module):
    """Layers of given widths, some of which branch off, for small graphs of many shapes."""

    def __init__(self, widths: list[int], skip: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.skip = nn.Linear(widths[0], widths[-1])
        self.head = nn.Linear(widths[-1], 2)
        self.skipped = skip

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        result: Tensor = self.head(hidden + self.skip(x) * self.skipped)
        return result


@settings(max_examples=12, deadline=None)
@given(widths=st.lists(st.integers(1, 40), min_size=2, max_size=3), skip=st.integers(0, 2))
def test_no_cut_is_cheaper(widths: list[int], skip: int) -> None:
    torch.manual_seed(0)
    model = Branches(widths, skip).eval()
    captured = passes.capture(model, bind_example(None, (torch.zeros(3, widths[0]),)))
    program = passes.InsertMPLoRA(LoraConfig(r=2, lora_alpha=2, target_modules=("head",)))(captured)
    perturbed = perturbed_by(next(n for n in program.graph.nodes if n.name == program.values["lanes"]))
    axes = row_axes(program.graph, program.rows, program.fixed_rows, leave_out=perturbed)
    points = duplication_points(axes, perturbed, LANES)
    calls = [n for n, layout in axes.layouts.items() if layout is not None and n.op == "call_function"]
    found = cost(axes, perturbed, frozenset(_before(points)))
    best = min(
        cost(axes, perturbed, frozenset(once))
        for size in range(len(calls) + 1)
        for once in itertools.combinations(calls, size)
        if all(inner in once or inner not in calls for node in once for inner in node.all_input_nodes)
    )
    assert found == best


def _before(points: Any) -> set[fx.Node]:
    """The calls that are computed once: those at the cut, and what they are made of."""
    found: set[fx.Node] = set()
    pending = list(points)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def cost(axes: RowAxes, perturbed: set[fx.Node], once: frozenset[fx.Node]) -> int:
    """Bytes repeated, and the work that is done too often, where `once` is computed on one lane."""
    total = 0
    for node, layout in axes.layouts.items():
        if layout is None:
            continue
        single = node in once or node.op == "placeholder"
        users = [u for u in node.users if u in perturbed or (axes.layouts.get(u) is not None and u not in once)]
        if single and users:
            total += LANES * tensor_bytes(node) + CALL_BYTES
        elif not single:
            rows = [inner for inner in node.all_input_nodes if axes.layouts.get(inner) is not None]
            traffic = tensor_bytes(node) + sum(map(tensor_bytes, rows))
            total += (LANES - 1) * (traffic + multiply_adds(node) // MULTIPLY_ADDS_PER_BYTE + CALL_BYTES)
    return total
