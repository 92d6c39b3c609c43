"""Adapters for llama.cpp: names, order and scale of what is added to the weights that its converter writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, cli
from mobizo_compiler.device.run import begin
from mobizo_compiler.errors import AdapterError, ConfigError
from mobizo_compiler.format.gguf_adapter import read_gguf, write_gguf
from mobizo_compiler.format.peft import PeftAdapter
from mobizo_compiler.quantization.weights import store_table, store_weight
from mobizo_compiler.text.hub import load_model

pytestmark = pytest.mark.xdist_group("cli")  # one process, so that its programs are made once

SIZES: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": False, "vocab_size": 50}
OUTPUTS = {"self_attn.q_proj": 24, "self_attn.k_proj": 12, "self_attn.v_proj": 12, "mlp.down_proj": 24}
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"mlp.down_proj": "ffn_down"}


def adapter_of(*layers: str, r: int = 3) -> PeftAdapter:
    """Random A and B of layers."""
    torch.manual_seed(0)
    ends = {layer: next((n for end, n in OUTPUTS.items() if layer.endswith(end)), 50) for layer in layers}
    a = {layer: torch.randn(r, 40 if layer.endswith("down_proj") else 24) for layer in layers}
    b = {layer: torch.randn(r, size) for layer, size in ends.items()}
    return PeftAdapter(LoraConfig(r=r, lora_alpha=5, target_modules=tuple(layers)), a, b)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields and the tensors of a file, as gguf reads them."""
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors},
    )


@pytest.mark.parametrize("make", [LlamaConfig, Qwen2Config, Gemma2Config])
def test_what_is_added_is_what_peft_adds(make: Any, tmp_path: Path) -> None:
    """In the order that the weights of a GGUF file have, from which transformers reads them back."""
    layers = [f"model.layers.{block}.{name}" for block in (0, 1) for name in OUTPUTS]
    adapter, config = adapter_of(*layers), make(**SIZES)
    write_gguf(adapter, config, tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 5.0)
    assert fields["general.architecture"] == config.model_type and len(tensors) == 2 * len(layers)
    back = LlamaTensorProcessor(config=config.to_dict())
    for layer in layers:
        block, _, end = layer.removeprefix("model.layers.").partition(".")
        name = f"blk.{block}.{NAMES[end]}.weight"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        added = (5 / a.shape[0] * b @ a).numpy()
        if make is LlamaConfig:
            added = back.process(added, name).weights
        expected = adapter.lora.scaling * adapter.b[layer].t() @ adapter.a[layer]
        torch.testing.assert_close(torch.from_numpy(added), expected, atol=1e-5, rtol=1e-5)
        assert a.shape == adapter.a[layer].shape and b.shape == adapter.b[layer].t().shape
    again = read_gguf(tmp_path / "a.gguf", config, [*layers, "lm_head", "model.layers.0.mlp.up_proj"])
    assert again.lora == dataclasses.replace(adapter.lora, target_modules=tuple(sorted(layers)))
    for side, other in ((again.a, adapter.a), (again.b, adapter.b)):
        assert side.keys() == other.keys() and all(torch.equal(side[layer], other[layer]) for layer in layers)


def test_files_that_are_no_adapter_of_the_model(tmp_path: Path) -> None:
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    path = tmp_path / "a.gguf"
    with pytest.raises(AdapterError, match="no such file"):
        read_gguf(path, LlamaConfig(**SIZES), layers)
    write_gguf(adapter_of(*layers), LlamaConfig(**SIZES), path)
    with pytest.raises(AdapterError, match="for the architecture 'llama', the model is 'qwen2'"):
        read_gguf(path, Qwen2Config(**SIZES), layers)
    with pytest.raises(AdapterError, match=r"for no layer of the model: blk.1.attn_v.weight.lora_a"):
        read_gguf(path, LlamaConfig(**SIZES), layers[:1])
    with pytest.raises(AdapterError, match="type 'gpt2' is not known"):
        read_gguf(path, GPT2Config(), layers)
    whole = path.read_bytes()
    for damaged in (whole[:40], b"GGUF" + b"\0" * 60, b"no file of that kind", b""):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"cannot be read as GGUF|no LoRA in it"):
            read_gguf(path, LlamaConfig(**SIZES), layers)


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    write_gguf(adapter_of("lm_head"), LlamaConfig(**SIZES), tmp_path / "a.gguf")
    assert set(read(tmp_path / "a.gguf")[1]) == {"output.weight.lora_a", "output.weight.lora_b"}


@pytest.mark.parametrize(
    ("layer", "config", "match"),
    [
        ("lm_head", LlamaConfig(**SIZES | {"tie_word_embeddings": True}), "reads and writes words with the same one"),
        ("model.embed_tokens", LlamaConfig(**SIZES), "no weight of its own"),
        ("model.layers.7.mlp.down_proj", LlamaConfig(**SIZES), "no weight of its own"),
        ("model.classifier", LlamaConfig(**SIZES), "no weight of its own"),
        ("transformer.h.0.attn.c_attn", GPT2Config(), "type 'gpt2' is not known"),
    ],
)
def test_layers_that_llama_cpp_has_not(layer: str, config: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=match):
        write_gguf(adapter_of(layer), config, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_the_command(tiny_program: Path, tmp_path: Path) -> None:
    session = mobizo.Session(tiny_program)
    session.load_state(torch.randn(len(session.state())))
    begin(session, tmp_path / "run")
    line = ["export-gguf", str(tiny_program), str(tmp_path / "run"), str(tmp_path / "a.gguf"), "--json"]
    result = CliRunner().invoke(cli.app, line, catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.stdout)["layers"] == 2, result.output
    _, tensors = read(tmp_path / "a.gguf")
    for site in session.program.sites:
        name = {"v_proj": "attn_v", "down_proj": "ffn_down"}[site.fqn.rpartition(".")[2]]
        b = tensors[f"blk.0.{name}.weight.lora_b"]
        torch.testing.assert_close(b, site.lora_b(session.state()).t())
    line = ["import-gguf", str(tiny_program), str(tmp_path / "a.gguf"), str(tmp_path / "again"), "--json"]
    result = CliRunner().invoke(cli.app, line, catch_exceptions=False)
    assert result.exit_code == 0 and "moves the model's answer" in result.stderr, result.output
    again = mobizo.Session(tiny_program)
    again.restore(tmp_path / "again")
    assert torch.equal(again.state(), session.state())


def test_a_program_of_its_layers(tmp_path: Path) -> None:
    """`compile(..., adapter=)` takes rank, alpha and A from the file."""
    config = LlamaConfig(**SIZES)
    model = LlamaForCausalLM(config).eval()
    adapter = adapter_of("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj")
    write_gguf(adapter, config, tmp_path / "a.gguf")
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    program = mobizo.compile(model, inputs, adapter=tmp_path / "a.gguf", backend="eager")
    assert {site.fqn for site in program.sites} == set(adapter.a)
    assert all(torch.equal(program.lora_a_by_fqn[name], adapter.a[name]) for name in adapter.a)
    with pytest.raises(ConfigError, match="a model of transformers"):
        mobizo.compile(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), adapter=tmp_path / "a.gguf")


def checkpoint(path: Path, model: LlamaForCausalLM, kind: Any) -> None:
    """A Llama as llama.cpp's converter writes it: names, and the order of rows that its rotation wants."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in whole:
            written = whole[layer]
        else:
            _, _, block, inner = layer.split(".", 3)
            written = f"blk.{block}.{parts[inner]}"
        values = weight.numpy()
        if (count := heads.get(written.rpartition(".")[2])) is not None:
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = gguf.quantize(values, kind) if weight.dim() > 1 else values
        writer.add_tensor(f"{written}.weight", stored, raw_dtype=kind if weight.dim() > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_1", "F32", "Q8_0", "Q4_0"])
def test_a_checkpoint_is_compiled(kind: str, tmp_path: Path) -> None:
    """With the numbers that are in it; `transformers` turns the rows of queries and keys back."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    checkpoint(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[kind])
    loaded = load_model(str(tmp_path / "model.gguf"))
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        wanted, found = model(ids).logits, loaded(ids).logits
    allowed = {"F32": 1e-6, "Q8_0": 0.02}.get(kind, 0.2)
    assert float((found - wanted).norm() / wanted.norm()) < allowed
    compiled = CliRunner().invoke(
        cli.app,
        ["compile", str(tmp_path / "model.gguf"), "-o", str(tmp_path / "program.pte"), "--tokens", "6", "--quiet"],
    )
    assert compiled.exit_code == 0, compiled.output
    program = mobizo.load(tmp_path / "program.pte")
    assert program.manifest.base_model == str(tmp_path / "model.gguf")
    with torch.no_grad():
        wanted = loaded(ids, attention_mask=torch.ones_like(ids)).logits
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(mobizo.Session(program).evaluate(inputs)["logits"], wanted, rtol=1e-4, atol=1e-4)


BLOCKS = [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")]


def decoded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight as it comes out of a checkpoint of that type."""
    stored = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), stored), stored).copy())


@pytest.mark.parametrize(("kind", "recipe"), BLOCKS)
def test_blocks_keep_their_codes_and_scales(kind: str, recipe: str) -> None:
    drawn = torch.randn(12, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    drawn[3, 32:64] = 0.0
    drawn[4, :32] = drawn[4, :32].abs()
    weight = decoded(drawn, kind)
    stored = store_weight(weight, recipe, 32, "layer", asymmetric=True)
    assert stored.decoded is not None and torch.equal(stored.decoded(*stored.parts.values()), weight)
    assert stored.parts["scale"].shape == (12, 3) and stored.parts["scale"].dtype == torch.float16
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        stored.linear(x, None, *stored.parts.values()), F.linear(x, weight), atol=1e-5, rtol=1e-5
    )
    others = [weight / 3, weight.clone()]  # scales that float16 does not hold, and one number that is no code's
    others[1][7, 5] *= 1.01
    for other in others:
        again = store_weight(other, recipe, 32, "layer", asymmetric=True)
        assert again.parts["scale"].dtype != torch.float16


@pytest.mark.parametrize(
    ("kind", "recipe", "bits"),
    [("Q8_0", "int8", 8), ("Q4_0", "int8", 4), ("Q4_1", "int8", 4), ("Q4_0", "int4", 4), ("Q4_1", "int4", 4)],
)
def test_tables_keep_their_codes_and_scales(kind: str, recipe: str, bits: int) -> None:
    drawn = torch.randn(12, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    table, ids = decoded(drawn, kind), torch.tensor([[3, 0], [11, 3]])
    stored = store_table(table, recipe, 32, "table")
    assert stored.rows is not None and torch.equal(stored.rows(ids, *stored.parts.values()), table[ids])
    assert stored.parts["codes"].numel() == table.numel() * bits // 8
    assert stored.parts["scale"].shape == (12, 3) and stored.parts["scale"].dtype == torch.float16
    elsewhere = table.clone()
    elsewhere[7, 5] *= 1.01
    again = store_table(elsewhere, recipe, 32, "table")
    assert again.rows is not None and again.parts["scale"].dtype != torch.float16
    assert 0 < float((again.rows(ids, *again.parts.values()) - table[ids]).norm() / table[ids].norm()) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
@pytest.mark.parametrize(("kind", "recipe"), BLOCKS)
def test_a_checkpoint_is_compiled_as_it_is_stored(kind: str, recipe: Any, backend: str, tmp_path: Path) -> None:
    """Nothing is rounded a second time, also no embedding and output layer: logits are the decoded checkpoint's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 96})).eval()
    checkpoint(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[kind])
    loaded, ids = load_model(str(tmp_path / "model.gguf")), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        wanted = loaded(ids).logits
    program = mobizo.compile(loaded, {"input_ids": ids}, quantization=recipe, backend=backend)
    torch.testing.assert_close(Session(program).evaluate({"input_ids": ids})["logits"], wanted, rtol=1e-4, atol=1e-5)


def test_no_such_checkpoint(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["compile", str(tmp_path / "model.gguf"), "--dry-run"])
    assert done.exit_code == 1 and "there is no such file" in done.stderr
    (tmp_path / "model.gguf").write_bytes(b"not one")
    done = CliRunner().invoke(cli.app, ["compile", str(tmp_path / "model.gguf"), "--dry-run"])
    assert done.exit_code == 1 and "transformers cannot load this model" in done.stderr
