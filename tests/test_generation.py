"""A decoder that generates with a cache of keys and values: as transformers does, in a session and in the stock runner.

The stock runner is `executorch.extension.llm.runner` of the wheel, with none of our code: it has the adapter from a
data file.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import (
    GenerateConfig,
    LoraConfig,
    Options,
    Program,
    Session,
    ZOConfig,
    cli,
)
from mobizo_compiler.compiling import pipelines
from mobizo_compiler.compiling.captured_forward import CapturedForward
from mobizo_compiler.device.generation import Sampling
from mobizo_compiler.errors import (
    BackendRefusedError,
    CaptureError,
    ConfigError,
    InputError,
    LoweringError,
    SessionBusyError,
    TokenRangeError,
)
from mobizo_compiler.format.program import Runner
from mobizo_compiler.step import agreement
from mobizo_compiler.testing import TokenWise

pytestmark = pytest.mark.xdist_group("generation")  # one process, so that its programs are made once

VOCABULARY, CONTEXT, NEW = 97, 96, 64
TEXT = "hello you"


def llama(layers: int = 1, tied: bool = False, **sizes: Any) -> LlamaForCausalLM:
    """Random weights so large that no token goes on for ever."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": layers,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
            "initializer_range": 0.4,
            **sizes,
        }
    )
    return LlamaForCausalLM(config).eval()


def compiled(model: nn.Module, backend: str, **options: Any) -> Program:
    ids = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    given = {"lora": LoraConfig(r=2), "zo": ZOConfig(queries=1), "generate": GenerateConfig(CONTEXT, stop_ids=())}
    return mobizo.compile(model, {"input_ids": ids}, backend=backend, **{**given, **options})


def of_transformers(model: Any, prompt: list[int], most: int = NEW) -> list[int]:
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return list(found[0, len(prompt) :].tolist())


def letters(folder: Path) -> Any:
    """A tokenizer whose file the stock runner reads: every printable character is a token, in two ways to write it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if ord(c) < 127] + ["\u0120"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(found)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([f"<{number}>" for number in range(len(found), VOCABULARY)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def by_stock_runner(program: Path, tokenizer: Path, data: Path) -> str:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    pieces: list[str] = []
    config = GenerationConfig(max_new_tokens=NEW, temperature=0.0, echo=False)
    TextLLMRunner(str(program), str(tokenizer), str(data)).generate(TEXT, config, pieces.append)
    return "".join(pieces)


def trained(session: Session, seed: int) -> Tensor:
    """Some steps, and then a state far enough from the start to generate other tokens."""
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    labels = inputs["input_ids"]
    for step in range(2):
        session.train_step(inputs, labels, seed=seed + step, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(seed)
    session.load_state(session.state() + torch.randn(session.state().shape, generator=generator) * 0.3)
    return session.state()


def same_everywhere(program: Program, model: LlamaForCausalLM, folder: Path, whole: bool = True) -> None:
    """Greedy tokens of transformers (`whole`: weights as they are), a session, and the stock runner: before training,
    after it in the same process, and after a restart from a data file; one program, several adapters."""
    tokenizer, path = letters(folder), program.save(folder / "program.pte")
    prompt, session = tokenizer.encode(TEXT).ids, Session(path)
    texts, states = [], [session.state(), trained(session, 5), trained(session, 9)]
    for number, state in enumerate(states):
        session.load_state(state)
        data = session.export_ptd(folder / f"{number}.ptd")
        found = list(session.generate(prompt, NEW))
        assert len(found) == NEW and len(set(found)) > 10, found
        if whole:
            merged = copy.deepcopy(model)
            session.merge_into(merged)
            assert found == of_transformers(merged, prompt)
        texts.append(tokenizer.decode(found))
        again = Session(path)
        again.import_ptd(data)
        assert list(again.generate(prompt, NEW)) == found
    assert len(set(texts)) == len(texts), "adapters have an effect"
    for number in (1, 0, 2):
        assert by_stock_runner(path, folder / "tokenizer.json", folder / f"{number}.ptd") == texts[number]


def test_the_same_tokens_everywhere(tmp_path: Path) -> None:
    model = llama()
    same_everywhere(compiled(model, "xnnpack", state="data"), model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "quantization", "tied"),
    [("xnnpack", None, True), ("xnnpack", "8da4w", True), ("xnnpack", "8da8w", False), ("portable", None, True)],
)
def test_the_same_tokens_everywhere_in_two_layers(
    backend: str, quantization: str | None, tied: bool, tmp_path: Path
) -> None:
    model = llama(layers=2, tied=tied)
    program = compiled(model, backend, quantization=quantization, state="data")
    same_everywhere(program, model, tmp_path, whole=quantization is None)


class Eager(NamedTuple):
    model: LlamaForCausalLM
    program: Program
    check: CapturedForward


@pytest.fixture(scope="module")
def eager() -> Eager:
    """A model, its program, and what the program was compared with."""
    model, checks = llama(tied=True), []

    class Kept(CapturedForward):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            checks.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mobizo_compiler.api.CapturedForward", Kept)
        return Eager(model, compiled(model, "eager"), checks[0])


def test_a_session_generates(eager: Eager) -> None:
    model, program, _ = eager
    session, prompt = Session(program), [5, 17, 33]
    found = list(session.generate(prompt, 20))
    assert found == of_transformers(model, prompt, 20)
    assert found == list(session.generate(torch.tensor([prompt]), 20)), "the cache begins anew"

    tokens = session.generate(prompt, 20)
    assert [next(tokens) for _ in range(3)] == found[:3]
    evaluated = session.evaluate({"input_ids": torch.ones(2, 6, dtype=torch.int64)})
    assert next(tokens) == found[3] and evaluated is not None, "other methods leave the cache alone"
    tokens.close()
    assert list(session.generate(prompt, 5)) == found[:5]

    first, second = session.generate(prompt, 5), session.generate([9, 9], 5)
    next(second)
    with pytest.raises(SessionBusyError, match="another prompt was begun"):
        next(first)
    assert next(second) is not None
    state = session.state()
    with session.lane(0, seed=3, eps=2.0):
        assert list(session.generate(prompt, 20)) != found, "a lane generates with its own B"
    assert torch.equal(session.state(), state) and list(session.generate(prompt, 20)) == found


def reason(tokens: Iterator[int]) -> tuple[list[int], str]:
    found: list[int] = []
    while True:
        try:
            found.append(next(tokens))
        except StopIteration as end:
            return found, end.value


def test_why_it_ends(eager: Eager) -> None:
    session, prompt = Session(eager.program), [5, 17, 33]
    found, why = reason(session.generate(prompt, 20))
    assert why == "limit" and len(found) == 20
    stop = found[7]
    assert reason(session.generate(prompt, 20, stop_ids=[stop])) == (found[: found.index(stop)], "end")
    long = [1] * (CONTEXT - 2)
    found, why = reason(session.generate(long, 20))
    assert why == "length" and len(found) == 3 and found == of_transformers(eager.model, long, 3)


def test_draws_are_those_of_the_seed(eager: Eager) -> None:
    session, prompt = Session(eager.program), [5, 17, 33]
    greedy = list(session.generate(prompt, 12))

    def drawn(**options: Any) -> list[int]:
        return list(session.generate(prompt, 12, **{"temperature": 8.0, **options}))

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1, top_k=1) == drawn(seed=2, top_p=1e-6) == drawn(temperature=1e-3) == greedy
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    for options, allowed in (({"top_k": 2}, {1, 3}), ({"top_p": 0.8}, {1, 3}), ({}, {0, 1, 2, 3})):
        sampling = Sampling(temperature=1.0, **options)
        generator = sampling.generator()
        assert {sampling.choose(logits, generator) for _ in range(300)} == allowed
    shares = torch.bincount(
        torch.tensor([Sampling(1.0).choose(logits, g) for g in [Sampling(seed=4).generator()] for _ in range(2000)])
    )
    torch.testing.assert_close(shares / 2000, logits.softmax(0), rtol=0, atol=0.04)


@pytest.mark.parametrize(
    ("tokens", "options", "error", "text"),
    [
        ([], {}, InputError, "token ids"),
        ([0.5], {}, InputError, "token ids"),
        ([[1], [2]], {}, InputError, "one row"),
        ([1] * CONTEXT, {}, InputError, r"room for 96(.|\n)*larger GenerateConfig"),
        ([VOCABULARY], {}, TokenRangeError, "token 97, outside 0..96"),
        ([-1], {}, TokenRangeError, "token -1"),
        ([1], {"temperature": -1}, InputError, "temperature"),
        ([1], {"top_p": 0.0}, InputError, "top_p"),
        ([1], {"top_k": -1}, InputError, "top_k"),
        ([1], {"seed": -1}, InputError, "seed"),
        ([1], {"max_new_tokens": 0}, InputError, "max_new_tokens"),
    ],
)
def test_wrong_prompts(tokens: Any, options: dict[str, Any], error: type[Exception], text: str, eager: Eager) -> None:
    with pytest.raises(error, match=text):
        Session(eager.program).generate(tokens, **options)


def test_a_second_thread_is_refused(eager: Eager) -> None:
    session = Session(eager.program)
    tokens, errors = session.generate([1, 2], 3), []

    def other() -> None:
        try:
            next(tokens)
        except SessionBusyError as error:
            errors.append(error)

    with session.lane(0, seed=1, eps=0.1):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_who_cannot_generate() -> None:
    from transformers import LlamaForSequenceClassification

    from mobizo_compiler.passes import capture_cache, empty_program

    classifier = LlamaForSequenceClassification(llama().config)
    for model, context, text in (
        (TokenWise(), 16, r"TokenWise cannot generate(.|\n)*no model of transformers"),
        (classifier, 16, "predicts the next token"),
        (llama(), 256, "128 positions, and the context is 256"),
        (None, 16, "captured already"),
    ):
        with pytest.raises(CaptureError, match=text):
            capture_cache(model, empty_program(), context)
    with pytest.raises(BackendRefusedError, match="'vulkan' cannot keep a cache"):
        compiled(llama(), "vulkan")
    with pytest.raises(ConfigError, match="state='io' exclude each other"):
        compiled(llama(), "eager", state="io")
    with pytest.raises(ConfigError, match="generate must be a GenerateConfig"):
        Options(generate=512)  # type: ignore[arg-type]


def test_a_program_without_it_says_so() -> None:
    lora, ids = LoraConfig(r=2, target_modules=("up",)), torch.zeros(2, 5, dtype=torch.int64)
    program = mobizo.compile(TokenWise().eval(), (ids,), lora, ZOConfig(queries=1), backend="eager")
    with pytest.raises(ConfigError, match=r"no method that generates(.|\n)*generate=GenerateConfig"):
        Session(program).generate([1])


def test_options_and_manifest(eager: Eager) -> None:
    options = Options(generate=GenerateConfig(64, stop_ids=2))  # type: ignore[arg-type]
    assert options.generate == GenerateConfig(64, stop_ids=(2,))
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options
    for wrong in ({"context": 2}, {"stop_ids": (-1,)}, {"all_logits": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GenerateConfig(**wrong)  # type: ignore[arg-type]
    manifest = eager.program.manifest
    assert manifest.generate is not None and manifest.generate.vocabulary == VOCABULARY
    assert (manifest.generate.context, manifest.generate.stop_ids) == (CONTEXT, ())
    assert type(manifest).from_json(manifest.to_json(), "here").generate == manifest.generate
    assert "forward" in manifest.methods and "forward" not in pipelines.methods_of(Options())


@pytest.mark.slow
def test_the_model_says_where_texts_end() -> None:
    model = llama()
    model.generation_config.eos_token_id = [7, 8]
    before = (model.generation_config, model.config.use_cache, [p.requires_grad for p in model.parameters()])
    program = compiled(model, "eager", generate=GenerateConfig(CONTEXT, all_logits=True))
    assert program.manifest.generate is not None and program.manifest.generate.stop_ids == (7, 8)
    after = (model.generation_config, model.config.use_cache, [p.requires_grad for p in model.parameters()])
    assert before == after, "the model is left as it was"
    tokens = torch.tensor([[5, 17, 33]])
    (logits,) = program.artifact.runner().call("forward", [tokens, torch.arange(3)])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


class Broken:
    """A runner whose method `forward` is wrong."""

    def __init__(self, runner: Runner, how: str) -> None:
        self.runner, self.how, self.seen = runner, how, 0

    def state(self) -> Tensor:
        return self.runner.state()

    def call(self, method: str, inputs: Any) -> list[Tensor]:
        tokens, positions = inputs
        if self.how == "forgets" and len(positions) == 1:
            positions = positions * 0
        before = self.state().clone()
        if self.how == "leaves the adapter out":
            self.state().zero_()
        found = self.runner.call(method, [tokens, positions])
        self.state().copy_(before + 1e-7 if self.how == "changes the state" else before)
        return found


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("works", None),
        ("forgets", "logits of tokens 9 to 9 without adapters of forward differ"),
        ("leaves the adapter out", "logits of tokens 11 to 11 with adapters of forward differ"),
        ("changes the state", "state of forward differ"),
    ],
)
def test_the_check_looks_at_the_cache(how: str, text: str | None, eager: Eager) -> None:
    program, check = eager.program, eager.check
    start = program.initial_state()
    start += torch.randn(start.shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    compare = functools.partial(agreement.compare, "eager", "wrong")
    runner = Broken(program.artifact.runner(), how)
    with contextlib.nullcontext() if text is None else pytest.raises(LoweringError, match=text):
        check.check(runner, compare, program.initial_state(), start)


def test_one_copy_of_weights_and_state(eager: Eager) -> None:
    """What the two captures call by one name is one tensor."""
    methods = eager.program.methods
    by_path = dict(methods["evaluate"].tensors().values())
    for path, tensor in methods["forward"].tensors().values():
        if not path.startswith(("key_cache", "value_cache", "mobizo_lora")):
            assert by_path[path].data_ptr() == tensor.data_ptr(), path
    kept = set(methods["forward"].exported.graph_signature.buffers_to_mutate.values())
    assert kept == {f"{kind}_cache_{layer}" for kind in ("key", "value") for layer in range(1)}


ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "olmo2": {},
    "smollm3": {},
    "mistral": {"sliding_window": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoders_of_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name != "gpt2":
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"max_position_embeddings": 128}
    if name not in ("gpt2", "gpt_neox", "opt"):
        sizes |= {"num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **ARCHITECTURES[name]})).eval()
    session, merged = Session(compiled(model, "eager")), copy.deepcopy(model)
    trained(session, 5)
    session.merge_into(merged)
    assert list(session.generate([5, 17, 33], 24)) == of_transformers(merged, [5, 17, 33], 24)


@pytest.mark.slow
def test_text_with_the_cache_is_text_without_it(tiny_model: Path, words: Any) -> None:
    from mobizo_compiler.errors import DataError
    from mobizo_compiler.text.generation import generate

    texts = []
    for cache in (GenerateConfig(CONTEXT), None):
        model = LlamaForCausalLM.from_pretrained(tiny_model).eval()
        ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
        lora = LoraConfig(r=2, target_modules=("v_proj",))
        program = mobizo.compile(model, {"input_ids": ids}, lora, ZOConfig(queries=1), backend="eager", generate=cache)
        session, pieces = Session(program), []
        session.load_state(torch.randn(session.state().shape, generator=torch.Generator().manual_seed(3)))
        texts.append(generate(session, words, "good day", 6, pieces.append))
        drawn = [generate(session, words, "good day", 6, sampling=Sampling(2.0, seed=seed)) for seed in (1, 1)]
        assert drawn[0] == drawn[1] and "".join(pieces) == texts[-1].text
        with pytest.raises(DataError, match="100 tokens"):
            generate(session, words, "day " * 100)
    assert texts[0] == texts[1] and texts[0].tokens


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_passes_of_forward_are_listed() -> None:
    listed = json.loads(run("passes", "--backend", "eager", "--generate", "--json"))
    assert [step["name"] for step in listed["forward"]][:3] == ["canonicalize", "last_token", "hoist_picks"]


@pytest.mark.slow
def test_the_command_generates(tiny_model: Path, compile_options: tuple[str, ...], tmp_path: Path) -> None:
    plain, cached = tmp_path / "plain.pte", tmp_path / "cached.pte"
    run("compile", tiny_model, "-o", plain, *compile_options)
    run("compile", tiny_model, "-o", cached, *compile_options, "--generate-context", 32)
    found = [run("generate", file, "good day", "--max-new-tokens", 6) for file in (plain, cached)]
    assert found[0] == found[1] and found[0].strip()
    drawn = ("generate", cached, "good day", "--temperature", 3.0, "--seed", 5, "--json")
    assert json.loads(run(*drawn)) == json.loads(run(*drawn))
    assert cached.stat().st_size > plain.stat().st_size
    methods = json.loads(run("inspect", cached, "--json"))["methods"]
    assert set(methods) == {"train_step", "evaluate", "replay", "forward"}
