"""`Options`: checked once, as JSON and back, the same from keywords; and pipelines as data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import ChoiceLoss, LoraConfig, MSELoss, Options, QuantizationConfig, ZOConfig
from mobizo_compiler.cli import app
from mobizo_compiler.compiling import pipelines
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.graph import Editor, Insertion, Pass, operand
from mobizo_compiler.step.rules import Momentum
from mobizo_compiler.testing import TokenWise

TOKENS = (torch.arange(10).reshape(2, 5),)
LORA = LoraConfig(r=2, target_modules=("up",))


@settings(max_examples=25, deadline=None)
@given(
    lora=st.builds(LoraConfig, r=st.integers(1, 64), target_modules=st.sampled_from([None, ("up",), "all-linear"])),
    zo=st.builds(ZOConfig, queries=st.integers(2, 9), estimator=st.sampled_from(["two-sided", "one-sided"])),
    loss=st.sampled_from(["causal-lm", "mse", ChoiceLoss((3, 5)), MSELoss("x")]),
    rule=st.sampled_from(["sgd", Momentum(beta=0.5), "scalar-adam"]),
    quantization=st.sampled_from([None, "8da4w", QuantizationConfig("int8", skip=("up",))]),
    state=st.sampled_from(["shared", "data", "io"]),
    split_prefix=st.booleans(),
)
def test_json_and_back(**fields: Any) -> None:
    options = Options(**fields)
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_a_configuration_of_torchao_comes_back() -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig

    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8)
    found = Options.from_json(json.loads(json.dumps(Options(quantization=config).to_json()))).quantization
    assert type(found) is type(config) and found.weight_dtype == torch.int8


def test_what_has_no_name_has_no_json() -> None:
    loss = mobizo.step.losses.CallableLoss(lambda outputs, labels: outputs.mean((1, 2)), (), torch.float32)
    with pytest.raises(ConfigError, match="no name that another process"):
        Options(loss=loss).to_json()
    with pytest.raises(ConfigError, match="cannot be written down: it has no name"):
        Options(passes=(Insertion(SpellOutTanh(), after="attach_loss"),)).to_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": 3}, "lora must be a LoraConfig, not 3"),
        ({"zo": ZOConfig}, "the class ZOConfig"),
        ({"loss": MSELoss}, r"the class MSELoss.*\n.*MSELoss\(\)"),
        ({"loss": "squared"}, "causal-lm, choice"),
        ({"loss": len}, "must be a Loss"),
        ({"rule": 5}, "rule is 5"),
        ({"quantization": 7}, "quantization is 7"),
        ({"state": "cloud"}, 'state="io"'),
        ({"split_prefix": "yes"}, "True or False"),
        ({"passes": [3]}, "no place among the others"),
    ],
)
def test_a_field_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**fields)
    with pytest.raises(ConfigError):
        mobizo.compile(TokenWise().eval(), TOKENS, backend="eager", **fields)


def test_unknown_field() -> None:
    with pytest.raises(ConfigError, match="no field 'lorra'"):
        Options.from_json({"lorra": {}})


def test_options_and_keywords_make_the_same_program() -> None:
    zo = ZOConfig(queries=2)
    model = TokenWise().eval()
    one = mobizo.compile(model, TOKENS, LORA, zo, loss="causal-lm", rule="momentum", backend="eager")
    two = mobizo.compile(model, TOKENS, options=Options(LORA, zo, rule="momentum"), backend="eager")
    assert one.manifest.rule["name"] == "momentum" and one.manifest.zo == zo
    assert one.manifest == two.manifest


@pytest.mark.parametrize("keywords", [{"rule": "adam"}, {"lora": LORA}, {"split_prefix": True}])
def test_both_are_refused(keywords: dict[str, Any]) -> None:
    (name,) = keywords
    with pytest.raises(ConfigError, match=f"options and {name} are both given"):
        mobizo.compile(TokenWise().eval(), TOKENS, options=Options(), backend="eager", **keywords)


@dataclasses.dataclass(frozen=True)
class SpellOutTanh(Pass):
    """A pass of one's own: tanh(x) = 2 sigmoid(2 x) - 1."""

    def rewrite(self, edit: Editor) -> None:
        for node in edit.calls(torch.ops.aten.tanh.default):
            with edit.graph.inserting_before(node):
                edit.replace(node, edit.inline(lambda x: torch.sigmoid(x * 2.0) * 2.0 - 1.0, operand(node)))


def test_a_pass_of_ones_own() -> None:
    model = TokenWise().eval()
    own = Insertion(SpellOutTanh(), before="specialize")
    plain = mobizo.compile(model, TOKENS, LORA, backend="eager")
    program = mobizo.compile(model, TOKENS, LORA, backend="eager", passes=[own])
    for method in ("train_step", "evaluate"):
        calls = [{node.target for node in p.methods[method].graph.nodes} for p in (plain, program)]
        assert [torch.ops.aten.tanh.default in found for found in calls] == [True, False]
        assert "SpellOutTanh()" in program.manifest.history[method]
    assert "SpellOutTanh()" not in program.manifest.history["replay"]
    found, expected = (mobizo.Session(p).evaluate(TOKENS) for p in (program, plain))
    torch.testing.assert_close(found, expected)


def names(method: str, options: Options) -> list[str]:
    return [step.name for step in pipelines.METHODS[method](options, pipelines.Parts())]


def test_places_of_a_pass() -> None:
    alone = names("train_step", Options())
    assert alone.count("canonicalize") == 2
    before = names("train_step", Options(passes=(Insertion(SpellOutTanh(), before="canonicalize"),)))
    after = names("train_step", Options(passes=(Insertion(SpellOutTanh(), after="canonicalize"),)))
    assert before.index("test_options") == alone.index("canonicalize")
    assert after.index("test_options") == len(alone) - alone[::-1].index("canonicalize")
    everywhere = Options(passes=(Insertion(SpellOutTanh(), after="canonicalize"),), split_prefix=True)
    having = [method for method in pipelines.METHODS if "test_options" in names(method, everywhere)]
    assert having == ["train_step", "evaluate", "prefix", "row_losses", "forward"]
    with pytest.raises(ConfigError, match=r"no pass of replay.*\n.*replay"):
        names("replay", Options(passes=(Insertion(SpellOutTanh(), after="canonicalize", methods=("replay",)),)))


@pytest.mark.parametrize("place", [{}, {"before": "perturb", "after": "perturb"}])
def test_a_pass_has_one_place(place: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="one place"):
        Insertion(SpellOutTanh(), **place)
    with pytest.raises(ConfigError, match="not a Pass"):
        Insertion("doubled", before="perturb")  # type: ignore[arg-type]


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_")).replace("MpLora", "MPLoRA")


def test_the_list_of_passes_is_what_compile_runs() -> None:
    listed = json.loads(CliRunner().invoke(app, ["passes", "--backend", "eager", "--json"]).stdout)
    assert set(listed) == {"train_step", "evaluate", "replay"}
    program = mobizo.compile(TokenWise().eval(), TOKENS, LORA, backend="eager")
    for method, steps in listed.items():
        ran = [line.partition("(")[0] for line in program.manifest.history[method]]
        assert len(ran) <= len(steps) + 1
        kinds = [_class_name(step["name"]) for step in steps]
        assert [kind for kind in kinds if kind in ran] == [line for line in ran if line in kinds]
    shown = CliRunner().invoke(app, ["passes", "--split-prefix", "--quantization", "8da4w"]).stdout
    assert "prefix" in shown and "quantize" in shown and "decompose_attention" in shown
