"""The pass contract is enforced: order, facts, values, promises, and that the input never changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mobizo_compiler import CausalLMLoss, LoraConfig, ZOConfig, passes
from mobizo_compiler.errors import PassContractError, PassOrderError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.graph.pipeline import Pass, Pipeline, dump_to
from mobizo_compiler.graph.printer import program_text
from mobizo_compiler.graph.program import GraphProgram
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
        passes.SliceLabels(),
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
