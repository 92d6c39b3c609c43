"""The blocks of models that are built in other ways than layers in a list."""

from __future__ import annotations

import pytest

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, ZOConfig
from mobizo_compiler.backends import get_backend
from mobizo_compiler.compiling.dry_run import DryRun, estimate
from mobizo_compiler.testing import zoo

CASES = zoo()


@pytest.mark.parametrize(
    "name",
    [
        *("tiny_causal_lm", "rnn", "parameters", "tied_twice"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gru_batch_second", "fixed_rows")),
    ],
)
def test_every_adapter_and_every_weight_is_in_one_block(name: str) -> None:
    case = CASES[name]
    lora, zo = LoraConfig(r=2, target_modules=case.target_modules), ZOConfig(queries=1)
    model = case.model()
    backend = DryRun(get_backend("portable"))
    program = mobizo.compile(model, case.inputs(), lora, zo, case.loss, backend=backend, **case.options)
    blocks = program.manifest.outline
    assert sum(sum(block.adapters.values()) for block in blocks) == len(program.sites)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(block.parameter_bytes for block in blocks) >= parameters, "buffers count too"
    assert any(block.lanes != "none" for block in blocks)
    assert estimate(program).weight_bytes >= parameters


def test_layers_that_are_alike_are_one_block() -> None:
    case = CASES["tiny_causal_lm"]
    backend = DryRun(get_backend("portable"))
    program = mobizo.compile(case.model(), case.inputs(), zo=ZOConfig(queries=2), loss=case.loss, backend=backend)
    blocks = {block.name: block for block in program.manifest.outline}
    layers = blocks["layers.*"]
    assert (layers.count, layers.lanes, layers.alike) == (2, "some", True)
    assert layers.adapter_names == ("q_proj", "v_proj")
    assert (blocks["embedding"].lanes, blocks["norm"].lanes, blocks["lm_head"].lanes) == ("none", "all", "all")
    with pytest.raises(mobizo.MobizoError, match="dry run"):
        mobizo.Session(program)
    with pytest.raises(mobizo.MobizoError, match="dry run"):
        program.save("nowhere.pte")
