"""The pass contract is enforced: order, facts, values, promises, and that the input never changes."""

from __future__ import annotations

import cProfile
import dataclasses
from pathlib import Path

import pytest
import torch

from mobizo_compiler import CausalLMLoss, LoraConfig, ZOConfig, passes
from mobizo_compiler.errors import PassContractError, PassOrderError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.nodes import operand
from mobizo_compiler.graph.pipeline import Pass, Pipeline, dump_to
from mobizo_compiler.graph.printer import program_text
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.passes.slice_outputs import outputs_read
from mobizo_compiler.testing import TokenWise


@pytest.fixture
def captured() -> GraphProgram:
    torch.manual_seed(0)
    return passes.capture(TokenWise().eval(), bind_example(None, (torch.zeros(3, 5, dtype=torch.int64),)))


def test_every_unmet_need_is_named_before_anything_runs(captured: GraphProgram) -> None:
    ran = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Pass):
        def rewrite(self, edit: Editor) -> None:
            ran.append(self)

    pipeline = Pipeline(
        [Spy(), passes.DifferenceLosses(ZOConfig()), passes.Perturb(ZOConfig()), passes.DuplicateLanes(4)]
    )
    with pytest.raises(PassOrderError) as caught:
        pipeline.run(captured)
    text = str(caught.value)
    assert "difference_losses (#1) needs 'loss', which no pass in the list gives" in text
    assert "difference_losses (#1) needs 'perturbed', which perturb gives: run perturb before it" in text
    assert "perturb (#2) needs 'lanes'" in text
    assert "duplicate_lanes (#3) needs 'sites'" in text
    assert not ran


def test_a_false_claim_is_blamed_on_the_pass(captured: GraphProgram) -> None:
    @dataclasses.dataclass(frozen=True)
    class Boaster(Pass):
        gives = frozenset({facts.STATIC})

        def rewrite(self, edit: Editor) -> None:
            pass

    with pytest.raises(PassContractError, match=r"pass test_pipeline broke(.|\n)*static: %tokens.*symbolic size"):
        Boaster()(captured)


def test_an_unknown_fact_is_refused(captured: GraphProgram) -> None:
    @dataclasses.dataclass(frozen=True)
    class Dreamer(Pass):
        gives = frozenset({"beautiful"})

        def rewrite(self, edit: Editor) -> None:
            pass

    with pytest.raises(PassOrderError, match="unknown fact 'beautiful'"):
        Dreamer()(captured)


def test_a_value_that_is_missing_is_found(captured: GraphProgram) -> None:
    @dataclasses.dataclass(frozen=True)
    class Careless(Pass):
        def rewrite(self, edit: Editor) -> None:
            del edit.calls(torch.ops.aten.tanh.default)[0].meta["val"]

    with pytest.raises(PassContractError, match="tanh is missing val"):
        Careless()(captured)


def test_ensures_sees_before_and_after(captured: GraphProgram) -> None:
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Promise(Pass):
        def rewrite(self, edit: Editor) -> None:
            node = edit.calls(torch.ops.aten.tanh.default)[0]
            node.target = torch.ops.aten.relu.default

        def ensures(self, before: GraphProgram, after: GraphProgram) -> None:
            seen.extend(("tanh(" in program_text(p), "relu(" in program_text(p)) for p in (before, after))

    Promise()(captured)
    assert seen == [(True, False), (False, True)]


def test_passes_leave_their_input_alone(captured: GraphProgram) -> None:
    lora = LoraConfig(r=4, target_modules=("up",))
    program = captured
    for step in (
        passes.Canonicalize(),
        passes.AttachLoss(CausalLMLoss()),
        passes.Canonicalize(),
        passes.HoistPicks(),
        passes.InsertMPLoRA(lora),
        passes.DuplicateLanes(4),
        passes.Perturb(ZOConfig(queries=2)),
        passes.DifferenceLosses(ZOConfig(queries=2)),
        passes.UpdateState(),
        passes.Specialize(3),
    ):
        text, facts_before = program_text(program), program.facts
        after = step(program)
        assert program_text(program) == text
        assert program.facts == facts_before
        assert repr(step) in after.history or after is program
        program = after
    assert program.history[0] == "capture()"


def test_no_change_returns_the_same_program(captured: GraphProgram) -> None:
    canonical = passes.Canonicalize()(captured)
    assert passes.Canonicalize()(canonical) is canonical


def test_weights_are_shared_not_copied(captured: GraphProgram) -> None:
    after = passes.InsertMPLoRA(LoraConfig(r=4, target_modules=("up",)))(captured)
    before, now = (p.exported.state_dict["up.weight"].data_ptr() for p in (captured, after))
    assert before == now


def test_dump(captured: GraphProgram, tmp_path: Path) -> None:
    Pipeline([passes.Canonicalize(), passes.Specialize(2)], dump_to(tmp_path, "evaluate")).run(captured)
    files = sorted((tmp_path / "evaluate").iterdir())
    assert [file.name for file in files] == ["00-canonicalize.txt", "01-specialize.txt"]
    text = files[1].read_text()
    assert text.startswith("# evaluate after Specialize(rows=2)\n# facts: functional, static\n")
    assert "input  %tokens: i64[2, 5]" in text


def test_an_error_in_a_pass_names_the_pass(captured: GraphProgram) -> None:
    @dataclasses.dataclass(frozen=True)
    class Stumbles(Pass):
        def rewrite(self, edit: Editor) -> None:
            ()[0]

    with pytest.raises(PassContractError, match="pass test_pipeline failed: IndexError: tuple index out of range"):
        Stumbles()(captured)


def test_what_a_pass_does_to_inputs_and_outputs_is_what_it_declares(captured: GraphProgram) -> None:
    aten = torch.ops.aten

    @dataclasses.dataclass(frozen=True)
    class LosesRows(Pass):
        def rewrite(self, edit: Editor) -> None:
            (name, node), *_ = edit.outputs.items()
            with edit.graph.inserting_before(edit.graph.output_node()):
                edit.set_outputs({name: edit.call(aten.slice.Tensor, node, 0, 0, 1)})

    @dataclasses.dataclass(frozen=True)
    class Doubles(Pass):
        def rewrite(self, edit: Editor) -> None:
            (name, node), *_ = edit.outputs.items()
            with edit.graph.inserting_before(edit.graph.output_node()):
                edit.set_outputs({name: edit.call(aten.to.dtype, node, torch.float64)})

    @dataclasses.dataclass(frozen=True)
    class Renames(Pass):
        def rewrite(self, edit: Editor) -> None:
            edit.set_outputs({"other": next(iter(edit.outputs.values()))})

    @dataclasses.dataclass(frozen=True)
    class Asks(Pass):
        def rewrite(self, edit: Editor) -> None:
            edit.add_input("more", [1], torch.float32)

    @dataclasses.dataclass(frozen=True)
    class Turns(Pass):
        def rewrite(self, edit: Editor) -> None:
            edit.rows["tokens"] = 1

    for step, message in (
        (LosesRows(), r"output 'output_0' was torch.float32\[s\d+, 5, 11\] and is torch.float32\[1, 5, 11\]"),
        (Doubles(), r"output 'output_0' was torch.float32.* and is torch.float64"),
        (Renames(), r"the outputs were \['output_0'\] and are \['other'\]"),
        (Asks(), r"the inputs were \['tokens'\] and are \['tokens', 'more'\]"),
        (Turns(), r"the rows of input 'tokens' were in axis 0, not 1"),
    ):
        with pytest.raises(PassContractError, match=f"test_pipeline broke what it must keep(.|\n)*{message}"):
            step(captured)

    @dataclasses.dataclass(frozen=True)
    class Says(Asks):
        inputs = "added"

    assert list(Says()(captured).inputs) == ["tokens", "more"]


@pytest.mark.parametrize("what", ["values", "tensor", "lora_a", "nesting"])
def test_a_change_that_the_text_does_not_show_is_kept(what: str, captured: GraphProgram) -> None:
    @dataclasses.dataclass(frozen=True)
    class Quiet(Pass):
        def rewrite(self, edit: Editor) -> None:
            if what == "values":
                edit.values["hidden"] = edit.calls(torch.ops.aten.tanh.default)[0]
            elif what == "tensor":
                edit._tensors["up.bias"] = torch.nn.Parameter(torch.ones(20), requires_grad=False)
            elif what == "lora_a":
                edit.lora_a["up"] = torch.ones(2, 12)
            else:
                edit.nesting = None

    after = Quiet()(captured)
    assert program_text(after) == program_text(captured) and after is not captured
    assert after.history[-1].endswith("Quiet()")
    found = {
        "values": after.values.get("hidden") == "tanh",
        "tensor": torch.equal(after.exported.state_dict["up.bias"], torch.ones(20)),
        "lora_a": "up" in after.lora_a,
        "nesting": after.nesting is None,
    }
    assert found[what]


def test_the_work_on_a_graph_grows_with_its_size(captured: GraphProgram) -> None:
    """Python calls are counted, for time says little on a busy machine; twice the graph may take 2.3 times as many."""

    def calls(size: int) -> int:
        class Wide(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scales = torch.nn.ParameterList(torch.ones(4) for _ in range(size))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for scale in self.scales:
                    x = torch.tanh(x * scale)
                return x

        program = passes.capture(Wide().eval(), bind_example(None, (torch.ones(2, 4),)))

        @dataclasses.dataclass(frozen=True)
        class Constants(Pass):
            def rewrite(self, edit: Editor) -> None:
                for node in edit.calls(torch.ops.aten.tanh.default):
                    with edit.graph.inserting_before(node):
                        extra = edit.shared_constant(f"extra_{node.name}", torch.ones(4))
                        edit.replace(node, edit.call(torch.ops.aten.mul.Tensor, operand(node), extra))

        profile = cProfile.Profile()
        profile.enable()
        Pipeline([Constants(), passes.Canonicalize(), passes.HoistPicks()]).run(program)
        profile.disable()
        return sum(entry.callcount for entry in profile.getstats())

    small, large = calls(100), calls(200)
    assert large < 2.3 * small, (small, large)


@pytest.mark.parametrize("depth", [30, 3000])
def test_outputs_are_found_through_diamonds_and_long_chains(depth: int) -> None:
    """Each diamond doubles the number of paths, and a chain is longer than Python's stack."""
    aten, graph = torch.ops.aten, torch.fx.Graph()
    x = node = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 5, 40)
    for _ in range(depth):
        other = graph.call_function(aten.tanh.default, (node,))
        node = graph.call_function(aten.add.Tensor, (node, other))
        other.meta["val"] = node.meta["val"] = x.meta["val"]
    few = graph.call_function(aten.slice.Tensor, (node, -1, 1, 3))
    few.meta["val"] = torch.empty(3, 5, 2)
    graph.output((few,))
    assert outputs_read(x) == {1, 2}
    graph.output_node().args = ((few, node),)
    assert outputs_read(x) is None
