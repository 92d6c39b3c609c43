"""Adapters go to peft and come from it, and into the base model, with equal outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.errors import AdapterError, ConfigError
from mobizo_compiler.format.peft import CONFIG, WEIGHTS, read_peft


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.convolution(x)).mean((2, 3)))
        return result


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return Convolutional().eval()


def words() -> dict[str, Tensor]:
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits(output: Any) -> Tensor:
    result: Tensor = getattr(output, "logits", output)
    return result


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return logits(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def close(found: Tensor, wanted: Tensor) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-4, error


CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[str, ...], dict[str, Any]]] = {
    "llama": (llama, words(), ("q_proj", "v_proj", "down_proj"), {}),
    "gpt2": (gpt2, words(), ("c_attn", "c_proj"), {}),
    "convolution": (
        convolutional,
        (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),),
        ("convolution", "head"),
        {"loss": mobizo.SequenceClassificationLoss()},
    ),
}


@pytest.mark.parametrize("backend", ["eager", pytest.param("xnnpack", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, backend: str, tmp_path: Path) -> None:
    """20 steps, to peft, and back."""
    make, inputs, targets, options = CASES[name]
    model = make()
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    program = mobizo.compile(model, inputs, lora, ZOConfig(queries=2), backend=backend, **options)
    session = Session(program)
    labels = torch.tensor([1, 3]) if name == "convolution" else inputs["input_ids"]
    for step in range(20):
        session.train_step(inputs, labels, seed=step, learning_rate=0.05)
    assert float(session.state().abs().max()) > 1e-3
    outputs = logits(session.evaluate(inputs))
    plain = run(model, inputs)
    assert float((outputs - plain).abs().max()) > 1e-3 * float(plain.abs().max()), "training must show"

    session.export_adapter(tmp_path, base_model="someone/model")
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "someone/model"
    close(run(PeftModel.from_pretrained(make(), str(tmp_path)).eval(), inputs), outputs)

    again = Session(program)
    assert again.probe().effect == 0
    again.import_adapter(tmp_path)
    assert torch.equal(again.state(), session.state())
    assert again.probe() == session.probe() and again.probe().effect > 1e-4
    assert again.probe().base == Session(program).probe().base

    merged = make()
    session.merge_into(merged)
    close(run(merged, inputs), outputs)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "convolution"])
def test_starting_from_an_adapter_of_peft(name: str, tmp_path: Path) -> None:
    make, inputs, targets, options = CASES[name]
    options_of_peft: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": list(targets)}
    adapted = get_peft_model(make(), PeftLoraConfig(**options_of_peft)).eval()
    generator = torch.Generator().manual_seed(2)
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(tmp_path))
    program = mobizo.compile(make(), inputs, zo=ZOConfig(queries=1), backend="eager", adapter=tmp_path, **options)
    session = Session(program)
    close(logits(session.evaluate(inputs)), run(make(), inputs))
    session.import_adapter(tmp_path)
    close(logits(session.evaluate(inputs)), run(adapted, inputs))
    session.export_adapter(tmp_path / "again")
    old, new = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert set(old) == set(new) and all(torch.equal(old[name], new[name]) for name in old)


PLAIN: dict[str, dict[str, Any]] = {
    "as peft has it": {},
    "rank-stabilized": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "with B from the start": {"init_lora_weights": False},
    "dropout in training": {"lora_dropout": 0.3},
    "some layers": {"layers_to_transform": [1], "exclude_modules": ["v_proj"]},
}
NOT_PLAIN: dict[str, dict[str, Any]] = {
    "init_lora_weights = 'pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights = 'pissa_niter_2'": {"init_lora_weights": "pissa_niter_2"},
    "init_lora_weights = 'olora'": {"init_lora_weights": "olora"},
    "init_lora_weights = 'mica'": {"init_lora_weights": "mica"},
    "use_dora": {"use_dora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 4]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "bias = 'lora_only'": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "target_parameters": {"target_parameters": ["o_proj.weight"]},
}
# What peft makes from data, or for other engines: only the option is written into a file.
WRITTEN: dict[str, Any] = {
    "init_lora_weights": "corda",
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArBr"},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"samples": 2},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "ensure_weight_tying": True,
    "an_option_of_tomorrow": True,
}


def of_peft(folder: Path, **options: Any) -> Path:
    """An adapter that peft made, with a B that shows, as peft saves it."""
    torch.manual_seed(3)
    config = PeftLoraConfig(**{"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], **options})
    adapted = get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(2)
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(folder))
    return folder


def from_peft(folder: Path) -> Session:
    program = mobizo.compile(llama(), words(), zo=ZOConfig(queries=1), backend="eager", adapter=folder)
    session = Session(program)
    session.import_adapter(folder)
    return session


# One of those that differ in how A is drawn, or in nothing that a step sees, is quick.
DRAWN = ("as peft has it", "gaussian", "orthogonal", "dropout in training")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in DRAWN[1:] else ()) for name in PLAIN]
)
def test_what_is_a_plain_lora_computes_what_it_does_in_peft(name: str, tmp_path: Path) -> None:
    folder = of_peft(tmp_path / "peft", **PLAIN[name])
    session = from_peft(folder)
    wanted = run(PeftModel.from_pretrained(llama(), str(folder)).eval(), words())
    assert float((wanted - run(llama(), words())).abs().max()) > 1e-3, "it must show"
    close(logits(session.evaluate(words())), wanted)
    session.export_adapter(tmp_path / "ours")
    close(run(PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval(), words()), wanted)


@pytest.mark.parametrize("said", NOT_PLAIN)
def test_what_passes_for_a_plain_lora_is_refused_by_name(said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"the adapter has {said}"):
        from_peft(of_peft(tmp_path, **NOT_PLAIN[said]))


@pytest.mark.parametrize("option", WRITTEN)
def test_what_is_not_known_is_refused_unless_it_is_off(option: str, tmp_path: Path) -> None:
    folder = of_peft(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {option: WRITTEN[option]}))
    with pytest.raises(AdapterError, match=f"the adapter has {option} = "):
        read_peft(folder)
    (folder / CONFIG).write_text(json.dumps(config | {option: type(WRITTEN[option])()} | {"init_lora_weights": True}))
    assert read_peft(folder).lora.r == 4


def test_what_changed_the_base_may_be_converted(tmp_path: Path) -> None:
    """peft turns it into a plain one of twice the rank, as the error says."""
    adapted = get_peft_model(llama(), PeftLoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(str(tmp_path / "first"))
    adapted.peft_config["default"].init_lora_weights = "pissa"
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    wanted = run(adapted.eval(), words())
    adapted.save_pretrained(str(tmp_path / "pissa"))
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        from_peft(tmp_path / "pissa")
    first = str(tmp_path / "first")
    adapted.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=first)
    close(logits(from_peft(tmp_path / "plain").evaluate(words())), wanted)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Path]:
    lora = LoraConfig(r=4, target_modules=("q_proj",))
    session = Session(mobizo.compile(llama(), words(), lora, ZOConfig(queries=1), backend="eager"))
    session.load_state(torch.randn(session.program.parameters, generator=torch.Generator().manual_seed(0)))
    return session, session.export_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("form", ["peft", "ptd"])
@pytest.mark.parametrize("share", [0.0, 2.0])
def test_an_adapter_that_does_something_else_is_refused(
    share: float, form: str, trained: tuple[Session, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an engine leaves the adapter out, or adds it twice."""
    session, folder = trained
    file = session.export_ptd(tmp_path / "adapter.ptd")

    def load() -> None:
        fresh.import_adapter(folder) if form == "peft" else fresh.import_ptd(file)

    fresh = Session(session.program)
    runner = fresh._runner
    call = runner.call

    def other(method: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        alias = runner.state()
        before = alias.clone()
        alias *= share
        try:
            return call(method, inputs)
        finally:
            runner.state().copy_(before)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "call", other)
        with pytest.raises(AdapterError, match="moves the model's answer to the probe"):
            load()
    assert not fresh.state().any(), "the state is what it was"
    load()
    assert fresh.probe() == session.probe()


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_adapter_of_the_head_brings_the_models_weights(tied: bool, tmp_path: Path) -> None:
    """peft stores the weight of an adapted head too, which is taken where it is the model's; and names as in memory."""
    base, inputs = llama(), words()
    if tied:
        base.lm_head.weight = base.model.embed_tokens.weight
    adapted = get_peft_model(copy.deepcopy(base), PeftLoraConfig(r=3, target_modules=["v_proj", "lm_head"])).eval()
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    adapted.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / WEIGHTS)
    assert "base_model.model.lm_head.base_layer.weight" in stored
    in_memory = {name: value.contiguous() for name, value in adapted.state_dict().items() if "lora_" in name}
    assert all(".default.weight" in name for name in in_memory)
    program = mobizo.compile(base, inputs, zo=ZOConfig(queries=1), backend="eager", adapter=tmp_path)
    session = Session(program)
    for tensors in (stored, in_memory):
        save_file(tensors, tmp_path / WEIGHTS)
        session.load_state(torch.zeros_like(session.state()))
        session.import_adapter(tmp_path)
        close(logits(session.evaluate(inputs)), run(adapted, inputs))
    save_file({name: value + ("base_layer" in name) for name, value in stored.items()}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"brings lm_head.weight, and it is not the model's"):
        mobizo.compile(base, inputs, zo=ZOConfig(queries=1), backend="eager", adapter=tmp_path)


def edited(source: Path, folder: Path, *, tensors: Any = None, **config: Any) -> Path:
    values = json.loads((source / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(values))
    save_file((tensors or (lambda t: t))(load_file(source / WEIGHTS)), folder / WEIGHTS)
    return folder


def without_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def without_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 5}, "has no A and B of rank 5"),
        ({"lora_alpha": 5}, "lora_alpha=5"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"tensors": without_first}, "has no A and B of rank 4"),
        ({"tensors": without_layer}, "lacks layers"),
        ({"tensors": lambda t: {**t, "other": torch.zeros(2)}}, "other is not A or B of a LoRA"),
        (
            {"tensors": renamed(lambda name: name.removeprefix("base_model.model."))},
            r"names begin with base_model.model.(.|\n)*save_pretrained",
        ),
        (
            {"tensors": renamed(lambda name: name.replace("_A.", "_A.first." if "layers.0" in name else "_A.second."))},
            r"several adapters: first, one without a name, second(.|\n)*save_pretrained",
        ),
        (
            {"tensors": lambda t: {**t, "base_model.model.emb.lora_embedding_A": torch.ones(4, 3)}},
            r"lora_embedding_A is not A or B(.|\n)*embeddings are not adapted",
        ),
        (
            {"tensors": lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(23, 20)}},
            r"brings lm_head.weight, and it is not the model's(.|\n)*save_embedding_layers=False",
        ),
        ({"tensors": lambda t: {name: v * torch.nan for name, v in t.items()}}, "is not a finite A or B"),
        ({"tensors": lambda t: {name: v + 1 for name, v in t.items()}}, r"is not the program's(.|\n)*adapter=folder"),
    ],
)
def test_other_adapters_are_refused(
    change: dict[str, Any], match: str, trained: tuple[Session, Path], tmp_path: Path
) -> None:
    session, folder = trained
    before = session.state()
    with pytest.raises(AdapterError, match=match):
        session.import_adapter(edited(folder, tmp_path, **change))
    assert torch.equal(session.state(), before)


def test_a_pickle_is_not_loaded(trained: tuple[Session, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"no {WEIGHTS} in this folder\n"):
        trained[0].import_adapter(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="only a pickle, which is never loaded"):
        trained[0].import_adapter(tmp_path)


def test_an_adapter_may_be_renamed_and_saved_again_but_not_changed(
    trained: tuple[Session, Path], tmp_path: Path
) -> None:
    """Exported files have a checksum over both; files of peft have none, and are taken as they are."""
    session, folder = trained
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "another/name"}))
    session.import_adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_dropout": 0.5}))
    with pytest.raises(AdapterError, match="its checksum is not that of its two files"):
        session.import_adapter(tmp_path)
    PeftModel.from_pretrained(llama(), str(folder)).save_pretrained(str(tmp_path))
    session.import_adapter(tmp_path)


def test_every_bit_of_what_an_adapter_says_counts(trained: tuple[Session, Path], tmp_path: Path) -> None:
    session, folder = trained
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    whole = (folder / WEIGHTS).read_bytes()
    start = whole.index(b'"__metadata__"')
    for bit in range(8 * start, 8 * (whole.index(b"}", start) + 1)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / WEIGHTS).write_bytes(data)
        with pytest.raises(AdapterError):
            session.import_adapter(tmp_path)


def test_merging_into_another_model_changes_nothing(trained: tuple[Session, Path]) -> None:
    session, _ = trained
    model = llama()
    before = copy.deepcopy(model.state_dict())
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 31, bias=False)
    with pytest.raises(AdapterError, match="cannot take the adapter"):
        session.merge_into(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(AdapterError, match="no layer model"):
        session.merge_into(gpt2())


def other_weights(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj.weight.data[3, 4] += 1e-3


def other_weights_that_are_not_adapted(model: nn.Module) -> None:
    model.model.embed_tokens.weight.data[1, 2] += 1e-3


def one_more_time(model: nn.Module) -> None:
    """Merged already."""


@pytest.mark.parametrize("change", [other_weights, other_weights_that_are_not_adapted, one_more_time])
def test_merging_into_a_model_of_the_same_shapes(change: Callable[[nn.Module], None], trained: Any) -> None:
    session, _ = trained
    model = llama()
    if change is one_more_time:
        session.merge_into(model)
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=r"another one than was compiled: model\.(layers|embed)\S* has other values"):
        session.merge_into(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_into_a_wider_copy_of_the_weights(trained: Any) -> None:
    """The values are compared, not their type."""
    session, _ = trained
    plain, wide = llama(), llama().double()
    session.merge_into(plain)
    session.merge_into(wide)
    close(run(wide, words()), run(plain, words()).double())


def test_an_adapter_knows_the_model_that_it_was_trained_on(trained: Any, tmp_path: Path) -> None:
    """A program of a model with other weights has the same A, which is drawn from a seed."""
    session, folder = trained
    model = llama()
    other_weights_that_are_not_adapted(model)
    lora = LoraConfig(r=4, target_modules=("q_proj",))
    other = Session(mobizo.compile(model, words(), lora, ZOConfig(queries=1), backend="eager"))
    with pytest.raises(AdapterError, match=r"trained on another model(.|\n)*adapter=folder"):
        other.import_adapter(folder)
    assert not other.state().any()
    taken = Session(mobizo.compile(model, words(), zo=ZOConfig(queries=1), backend="eager", adapter=folder))
    assert taken.program.manifest.model == other.program.manifest.model != session.program.manifest.model


def test_adapter_and_lora_are_not_both_given(trained: tuple[Session, Path]) -> None:
    with pytest.raises(ConfigError, match="both given"):
        mobizo.compile(llama(), words(), LoraConfig(), backend="eager", adapter=trained[1])
    with pytest.raises(AdapterError, match=r"A of layer .* is \[4, 32\] in the adapter, \[4, 48\] in the model"):
        torch.manual_seed(0)
        wide = LlamaConfig(
            vocab_size=50, num_hidden_layers=2, hidden_size=48, intermediate_size=48, num_attention_heads=4
        )
        mobizo.compile(LlamaForCausalLM(wide).eval(), words(), backend="eager", adapter=trained[1])
