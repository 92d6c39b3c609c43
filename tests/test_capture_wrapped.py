"""Models as people hold them: wrapped, with adapters of peft in them, without weights, exported in another mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, MSELoss, ZOConfig
from mobizo_compiler.errors import CaptureError, LossError, UnsupportedGraphError
from mobizo_compiler.testing import TokenWise, zoo

IDS = torch.zeros(2, 5, dtype=torch.int64)
TOKENS = (torch.zeros(2, 5, dtype=torch.int64),)
X = (torch.ones(2, 4),)


def sites(model: Any, inputs: Any = TOKENS, target: str = "up", **options: Any) -> list[str]:
    lora = LoraConfig(r=2, target_modules=(target,))
    program = mobizo.compile(model, inputs, lora, ZOConfig(queries=1), backend="eager", **options)
    return [site.fqn for site in program.sites]


def quantized_by_pt2e() -> torch.export.ExportedProgram:
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(nn.Sequential(nn.Linear(4, 5)).eval(), X).module(), quantizer)
    prepared(*X)
    return torch.export.export(convert_pt2e(prepared), X)


def test_what_wraps_a_model_is_taken_off() -> None:
    model = TokenWise().eval()
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        assert sites(wrapped) == ["up"]


def test_models_that_cannot_be_taken_say_why() -> None:
    with pytest.raises(CaptureError, match=r"adapters of peft in it: base_model is a LoraModel(.|\n)*merge_and_unload"):
        sites(get_peft_model(TokenWise(), PeftConfig(target_modules=["up"])).eval())
    with pytest.raises(CaptureError, match=r"'embedding.weight' is on the meta device(.|\n)*from_pretrained"):
        sites(TokenWise().to("meta").eval())
    exported = torch.export.export(TokenWise().eval(), TOKENS)
    with pytest.raises(CaptureError, match=r"as modules of exported programs are(.|\n)*pass an ExportedProgram"):
        sites(exported.module())
    with pytest.raises(CaptureError, match=r"quantized by PT2E(.|\n)*as it was before, with quantization="):
        sites(quantized_by_pt2e(), X, "0", loss=MSELoss())
    dropping = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    with pytest.raises(CaptureError, match=r"exported in training mode(.|\n)*before torch.export"):
        sites(torch.export.export(dropping.train(), X), X, "0", loss=MSELoss())
    assert sites(torch.export.export(dropping.eval(), X), X, "0", loss=MSELoss()) == ["0"]


class Within(nn.Module):
    """A model within another one, which returns all that it returns or says what."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, **self.options)


def test_a_cache_is_not_asked_for_or_refused_by_its_name() -> None:
    model = zoo()["llama"].model()
    model.config.use_cache = True
    layers = ["model.model.layers.0.self_attn.v_proj", "model.model.layers.1.self_attn.v_proj"]
    assert sites(Within(model).eval(), target="v_proj") == layers
    assert model.config.use_cache is True
    for inner, inputs, name in (
        (model, {"input_ids": IDS, "use_cache": True}, "past_key_values"),
        (Within(model, use_cache=True), TOKENS, "past_key_values"),
        (Within(model, use_cache=True, return_dict=False), TOKENS, "1"),
    ):
        with pytest.raises(CaptureError, match=rf"\] the model returns a DynamicCache as output '{name}'") as refused:
            sites(inner.eval(), inputs, "v_proj")
        assert "leave use_cache=True out" in str(refused.value) and str(refused.value).count("try:") == 1


def test_logits_of_one_position_are_none_to_learn_from() -> None:
    model = zoo()["llama"].model()
    for kept in (1, torch.tensor([4])):
        with pytest.raises(LossError, match=r"CausalLMLoss predicts(.|\n)*1 position in all(.|\n)*no logits_to_keep=1"):
            sites(model, {"input_ids": IDS, "logits_to_keep": kept}, "v_proj")
    assert sites(model, {"input_ids": IDS, "logits_to_keep": 2}, "v_proj")


def test_a_graph_with_graphs_of_its_own_is_refused_by_its_operator() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen: torch.Tensor = torch.cond(x.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (self.up(x),))
            return chosen

    with pytest.raises(UnsupportedGraphError, match="graphs of its own, which cond runs") as raised:
        mobizo.compile(Chooses().eval(), (torch.ones(2, 4),), loss=mobizo.MSELoss(), backend="eager")
    assert "torch.cond" in str(raised.value.hint)
