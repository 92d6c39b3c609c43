"""Options: validation, JSON, and that target selection means what peft means by it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobizo_compiler import CausalLMLoss, ChoiceLoss, LoraConfig, ZOConfig
from mobizo_compiler.errors import ConfigError

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.11.mlp.up_proj",
    "transformer.h.1.attn.q_proj",
    "lm_head",
    "q_proj",
]


@pytest.mark.parametrize(
    ("options", "matched"),
    [
        ({"target_modules": ("q_proj",)}, [0, 3, 5]),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": ("self_attn.q_proj",)}, [0]),
        ({"target_modules": ("q_proj", "v_proj"), "layers_to_transform": 1}, [1, 3]),
        ({"target_modules": ("q_proj", "up_proj"), "layers_to_transform": [0, 11]}, [0, 2]),
        ({"target_modules": ("q_proj", "v_proj"), "layers_to_transform": 1, "layers_pattern": "layers"}, [1]),
        ({"target_modules": r".*\.(q|v)_proj"}, [0, 1, 3]),
        ({"target_modules": "lm_head"}, [4]),
        ({"target_modules": r"self_attn\.q_proj"}, []),
    ],
)
def test_targets(options: dict, matched: list[int]) -> None:
    config = LoraConfig(**options)
    assert [i for i, path in enumerate(PATHS) if config.matches(path)] == matched


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"r": -1},
        {"r": 2.0},
        {"r": True},
        {"lora_alpha": 0},
        {"lora_alpha": "16"},
        {"target_modules": ()},
        {"target_modules": 3},
        {"target_modules": ("",)},
        {"target_modules": "("},
        {"layers_to_transform": ()},
        {"layers_to_transform": -1},
        {"init_seed": -1},
    ],
)
def test_bad_lora_options(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"MBZ101.*LoraConfig"):
        LoraConfig(**options)


@pytest.mark.parametrize("options", [{"queries": 0}, {"estimator": "three-sided"}, {"noise": "uniform"}])
def test_bad_zo_options(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"MBZ10[16]"):
        ZOConfig(**options)


@given(
    r=st.integers(1, 64),
    alpha=st.floats(0.1, 100),
    targets=st.one_of(st.just(".*proj"), st.lists(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), min_size=1)),
    layers=st.one_of(st.none(), st.lists(st.integers(0, 99), min_size=1)),
)
def test_json_round_trip(r: int, alpha: float, targets: object, layers: object) -> None:
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, layers_to_transform=layers)  # type: ignore[arg-type]
    assert LoraConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_unknown_json_field() -> None:
    with pytest.raises(ConfigError, match="'rank'"):
        LoraConfig.from_json({"rank": 3})


def test_loss_options() -> None:
    assert CausalLMLoss.from_json(CausalLMLoss(max_labels=2).to_json()) == CausalLMLoss(max_labels=2)
    with pytest.raises(ConfigError):
        CausalLMLoss(max_labels=0)
    with pytest.raises(ConfigError):
        CausalLMLoss(ignore_index=5)
    assert ChoiceLoss.from_json(ChoiceLoss((1, 2)).to_json()) == ChoiceLoss((1, 2))
    for choices in ((), (1,), (1, 1), (1, -1), (1, 2.0)):
        with pytest.raises(ConfigError, match="choices"):
            ChoiceLoss(choices)
