"""Program text is read as it is printed; what is no program is an error with the line."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mobizo_compiler import CausalLMLoss, LoraConfig, QuantizationConfig, ZOConfig, passes
from mobizo_compiler.backends.vulkan.spell_out import SpellOut
from mobizo_compiler.errors import ProgramTextError
from mobizo_compiler.graph import Pass, Pipeline, facts, parse, program_text
from mobizo_compiler.graph.eager import EagerRunner
from mobizo_compiler.graph.example import bind_example
from mobizo_compiler.testing import TinyCausalLM, tiny_batch

# -- round trips -------------------------------------------------------------------------------------------------------

# Calls on a value of [rows, width], with the width of the result.
ONE = {
    "tanh(%{x})": lambda width: width,
    "gelu(%{x}, approximate=tanh)": lambda width: width,
    "mul.Tensor(%{x}, {number})": lambda width: width,
    "clamp(%{x}, -inf, {number})": lambda width: width,
    "to.dtype(%{x}, bf16)": lambda width: width,
    "slice.Tensor(%{x}, 1, 1, end)": lambda width: width - 1,
    "slice.Tensor(%{x}, -1, 0, 2)": lambda width: min(2, width),
    "sum.dim_IntList(%{x}, [-1], True)": lambda width: 1,
    "cat([%{x}, %{x}], -1)": lambda width: 2 * width,
    "repeat(%{x}, [1, 3])": lambda width: 3 * width,
    "einsum('ij,ij->ij', [%{x}, %{x}])": lambda width: width,
    "full_like(%{x}, {number}, dtype=f32, layout=strided, device=cpu, pin_memory=False)": lambda width: width,
    "empty_like(%{x}, memory_format=contiguous_format)": lambda width: width,
    "linear(%{x}, %p_{width}_weight, None)": lambda width: width + 1,
}
WHOLE = st.integers(-(2**40), 2**40)
NUMBERS = WHOLE | st.floats(allow_nan=False, allow_infinity=True, width=32)


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Text without types: a chain of calls, sizes that are computed, several results, maybe a state."""
    rows = draw(st.sampled_from(["rows", "tokens", "4*rows", "tokens + windows", "3"]))
    first = draw(st.integers(2, 5))
    head, calls, width, x = [f"input %x: f32[{rows}, {first}]"], [], first, "x"
    for index in range(draw(st.integers(1, 7))):
        form = draw(st.sampled_from([form for form, result in ONE.items() if result(width) > 0]))
        if form.startswith("linear"):
            head.append(f"tensor %p_{width}_weight: f32[{width + 1}, {width}]")
            calls.append(f"%float_{index} = to.dtype(%{x}, f32)")
            x = f"float_{index}"
        call = form.format(x=x, number=draw(NUMBERS), width=width)
        calls.append(f"%value_{index} = {call}")
        x, width = f"value_{index}", ONE[form](width)
    if draw(st.booleans()):
        calls += [f"%count = sym_size.int(%{x}, 0)", f"%both = topk(%{x}, 1, 1)", "%where = getitem(%both, 1)"]
        calls += ["%twice = mul(%count, 2)", "%full = full([%twice, 3], True, dtype=bool)"]
        calls += ["return where = %where", "return full = %full"]
    if draw(st.booleans()):
        head.append("state %b_state: f32[6]")
        calls += ["%new = mul.Tensor(%b_state, 0.5)", "update %b_state <- %new"]
    head = list(dict.fromkeys(head))
    returns = [line for line in calls if line.startswith("return")]
    updates = [line for line in calls if line.startswith("update")]
    rest = [line for line in calls if line not in (*returns, *updates)]
    return "\n".join([*draw(st.permutations(head)), *rest, *updates, *returns, f"return last.result = %{x}"])


@settings(deadline=None, max_examples=40)
@given(programs())
def test_what_is_read_prints_as_it_was_written(text: str) -> None:
    printed = program_text(parse(text))
    assert [re.sub(r" : .*", "", line).split() for line in printed.splitlines() if "float" not in line] == [
        line.split() for line in text.splitlines() if "float" not in line
    ]
    assert program_text(parse(printed)) == printed


def test_programs_of_all_stages() -> None:
    """Symbols, masks, noise, the update of the state, fixed sizes, quantized weights."""
    torch.manual_seed(0)
    inputs, _ = tiny_batch()
    program = passes.capture(TinyCausalLM(layers=1).eval(), bind_example(None, inputs))
    zo = ZOConfig(queries=1)
    lora = LoraConfig(r=2, target_modules=("q_proj", "v_proj"))
    parts: list[list[Pass]] = [
        [passes.AttachLoss(CausalLMLoss(max_labels=1)), passes.Canonicalize(), passes.HoistPicks()],
        [passes.InsertMPLoRA(lora), passes.DuplicateLanes(2), passes.Perturb(zo), passes.DifferenceLosses(zo)],
        [passes.UpdateState(), passes.Specialize(3), passes.Quantize(QuantizationConfig("8da8w")), SpellOut()],
    ]
    for part in parts:
        program = Pipeline(part).run(program)
        text = program_text(program)
        assert program_text(parse(text)) == text


# -- what is in a program that was read --------------------------------------------------------------------------------

LINEAR = """
# a layer
tensor %p_up_weight: f32[4, 3]
input  %x: f32[rows, 3]
  %linear = linear(%x, %p_up_weight)
return output_0 = %linear
"""


def test_a_program_that_was_read_can_be_run() -> None:
    program = parse(LINEAR)
    x = torch.randn(5, 3)
    (found,) = EagerRunner({"it": program}).call("it", [x])
    assert torch.equal(found, nn.functional.linear(x, program.exported.state_dict["up.weight"]))
    assert torch.equal(parse(LINEAR).exported.state_dict["up.weight"], program.exported.state_dict["up.weight"])
    assert not torch.equal(parse(LINEAR, seed=1).exported.state_dict["up.weight"], x.new_zeros(4, 3))
    given = torch.ones(4, 3)
    assert torch.equal(parse(LINEAR, tensors={"p_up_weight": given}).exported.state_dict["up.weight"], given)


def test_facts_are_those_that_the_text_shows() -> None:
    assert parse(LINEAR).facts == {facts.FUNCTIONAL, facts.ANY_ROWS, facts.CANONICAL}
    assert parse(LINEAR).rows == {"x": 0}
    fixed = parse(LINEAR.replace("rows", "5"), rows={"x": 0})
    assert fixed.facts == {facts.FUNCTIONAL, facts.CANONICAL, facts.STATIC}
    assert fixed.fixed_rows == 5
    tokens = parse("input %x: f32[2, tokens]\n%y = alias(%x)\nreturn y = %y")
    assert [size.name for size in tokens.dynamic.values()] == ["tokens"]
    assert facts.CANONICAL not in tokens.facts


def test_a_pass_runs_on_a_program_that_was_read() -> None:
    adapted = passes.InsertMPLoRA(LoraConfig(r=2, target_modules=("up",)))(parse(LINEAR))
    assert [site.fqn for site in adapted.sites] == ["up"]
    assert "state" not in program_text(adapted) and "%b_mobizo_lora_b: f32[8]" in program_text(adapted)


# -- errors ------------------------------------------------------------------------------------------------------------

WRONG = {
    "no line": ("input %x: f32[2]\nhello", "line 2: hello"),
    "no dtype": ("input %x: f33[2]", "no dtype 'f33'"),
    "no size": ("input %x: f32[2, rows +]", "'rows \\+' is no size"),
    "a size of another kind": ("input %x: f32[rows / 2]", "'rows / 2' is no size"),
    "a tensor with a symbol": ("tensor %p_w: f32[rows]", "'rows' of a tensor must be a number"),
    "a tensor of no kind": ("tensor %w: f32[2]", "neither p_ .parameter., b_"),
    "a state that is a parameter": ("state %p_w: f32[2]", "only buffers"),
    "a state that stays": ("state %b_w: f32[2]", "no line says what it becomes"),
    "an update of no state": (
        "tensor %b_w: f32[2]\nupdate %b_w <- %b_w",
        "line 2(.|\n)*is no state|is no state(.|\n)*line 2",
    ),
    "an input below a call": ("input %x: f32[2]\n%y = tanh(%x)\ninput %z: f32[2]", "%z must stand above"),
    "a name twice": ("input %x: f32[2]\n%x = tanh(%x)", "%x is there twice"),
    "an output twice": ("input %x: f32[2]\nreturn y = %x\nreturn y = %x", "output 'y' is there twice"),
    "a node from below": ("input %x: f32[2]\n%y = tanh(%z)", "no %z above(.|\n)*line 2"),
    "no operator": ("input %x: f32[2]\n%y = tanhh(%x)", "no operator 'tanhh'"),
    "no overload": ("input %x: f32[2]\n%y = tanh.Tensor(%x)", "no operator 'tanh.Tensor'"),
    "an overload that is missing": ("input %x: f32[2]\n%y = add(%x, 1)", "add does not take these arguments"),
    "no argument": ("input %x: f32[2]\n%y = mul.Tensor(%x, two)", "'two' is no argument"),
    "an open list": ("input %x: f32[2]\n%y = cat([%x, 0)", "has no end"),
    "an argument behind keywords": ("input %x: f32[2]\n%y = mul.Tensor(self=%x, 2)", "'2' without a name"),
    "arguments that do not fit": ("input %x: f32[2, 3]\n%y = mm(%x, %x)", "mm does not take these arguments"),
    "another type": ("input %x: f32[rows]\n%y = tanh(%x) : f32[2]", "%y is f32.rows., not f32.2.(.|\n)*line 2"),
    "a dropped axis": ("input %x: f32[2]\n%y = tanh(%x) : i64[2]", "%y is f32.2., not i64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_program(case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(ProgramTextError, match=message) as caught:
        parse(text)
    assert "line " in str(caught.value)


def test_arguments_beside_the_text() -> None:
    with pytest.raises(ProgramTextError, match=r"given for %p_up_weight is f32.2, 2."):
        parse(LINEAR, tensors={"p_up_weight": torch.ones(2, 2)})
    with pytest.raises(ProgramTextError, match="does not have: p_down_weight"):
        parse(LINEAR, tensors={"p_down_weight": torch.ones(2, 2)})
    with pytest.raises(ProgramTextError, match="rows name %y"):
        parse(LINEAR, rows={"y": 0})
    with pytest.raises(ProgramTextError, match="values name %lanes"):
        parse(LINEAR, values={"lanes": "lanes"})
    with pytest.raises(ProgramTextError, match=r"is not so: static: .*symbolic size"):
        parse(LINEAR, also={facts.STATIC})
