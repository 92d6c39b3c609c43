"""Conversations with a program: turns, adapters that are switched between, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import GenerateConfig, LoraConfig, Session, ZOConfig, cli
from mobizo_compiler.cli.compiling import _tokenizer
from mobizo_compiler.cli.runs import tokenizer_for
from mobizo_compiler.device.generation import Sampling
from mobizo_compiler.errors import ConfigError, DataError, ModelSourceError
from mobizo_compiler.text.chat_rows import asked
from mobizo_compiler.text.conversations import Message
from mobizo_compiler.text.prompts import PromptConfig
from mobizo_compiler.text.talk import Talk
from tests.test_chat import tokenizer_of

pytestmark = pytest.mark.xdist_group("talk")  # one process, so that its program is made once


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of("smollm2")


@pytest.fixture(scope="module")
def saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, in a file, beside the tokenizer."""
    folder = tmp_path_factory.mktemp("talk")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=192, initializer_range=0.5, **sizes)
    ids = torch.ones(1, 16, dtype=torch.int64)
    padded = tokenizer_of("smollm2")
    padded.add_special_tokens({"pad_token": "[PAD]"})  # which the model has no row for
    program = mobizo.compile(
        LlamaForCausalLM(config).eval(),
        {"input_ids": ids},
        LoraConfig(r=2, target_modules=("down_proj",)),
        ZOConfig(queries=1),
        backend="portable",
        generate=GenerateConfig(160, stop_ids=()),
        base_model=str(folder / "model"),
        tokenizer=padded,
    )
    return program.save(folder / "program.pte")


@pytest.fixture(scope="module")
def session(saved: Path) -> Session:
    return Session(saved)


def run(*arguments: object, said: str | None = None, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=said)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_turns_are_remembered(session: Session, tokenizer: Any) -> None:
    talk = Talk(session, tokenizer, system="Be short.")
    first = talk.say("Hi", 6)
    messages = [Message("system", "Be short."), Message("user", "Hi")]
    assert first.tokens == tuple(session.generate(asked(messages, tokenizer, PromptConfig()), 6))
    second = talk.say("And now?", 6)
    messages += [Message("assistant", first.text), Message("user", "And now?")]
    assert second.tokens == tuple(session.generate(asked(messages, tokenizer, PromptConfig()), 6))
    assert talk.messages == (*messages, Message("assistant", second.text))
    talk.forget()
    assert talk.say("Hi", 6) == first


def test_what_is_too_long_loses_its_oldest_turns(session: Session, tokenizer: Any) -> None:
    talk = Talk(session, tokenizer, system="Be short.")
    for number in range(6):
        talk.say(f"Question {number}", 12)
    kept = [message.content for message in talk.messages]
    assert kept[0] == "Be short." and "Question 0" not in kept and "Question 5" in kept
    with pytest.raises(DataError, match=r"what was said has \d+ tokens, and the cache has room for 160"):
        talk.say("a b c " * 200)


def test_an_interrupted_answer_was_not_said(session: Session, tokenizer: Any) -> None:
    talk = Talk(session, tokenizer)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("Hi", 6, interrupt)
    assert talk.messages == ()


def test_each_turn_draws_anew(session: Session, tokenizer: Any) -> None:
    drawn = [Talk(session, tokenizer, sampling=Sampling(5.0, seed=3)) for _ in range(2)]
    answers = [[talk.say("Hi", 8).tokens for _ in range(2)] for talk in drawn]
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]


def test_a_run_on_conversations_recommends_to_talk(session: Session) -> None:
    from mobizo_compiler.cli.outcome import next_commands

    def recommended(**config: Any) -> list[str]:
        rows: Any = SimpleNamespace(choices=None, config=PromptConfig(**config))
        return next_commands(Path("p.pte"), Path("r"), rows, session.program.manifest)

    assert recommended(chat="messages")[1] == "chat p.pte --run r"
    assert recommended(template="{text}")[1] == "generate p.pte --run r PROMPT"


def test_a_program_without_a_cache_is_refused(tokenizer: Any) -> None:
    from mobizo_compiler.testing import TinyCausalLM, tiny_batch

    program = mobizo.compile(TinyCausalLM().eval(), tiny_batch()[0], backend="eager")
    with pytest.raises(ConfigError, match=r"no cache of keys and values(.|\n)*--generate-context"):
        Talk(Session(program), tokenizer)


def test_the_tokenizer_of_another_model_is_refused(
    saved: Path, session: Session, tokenizer: Any, tmp_path: Path
) -> None:
    """With as many tokens, two of which changed places, and with fewer; words that were added are no matter."""
    tokenizer.save_pretrained(tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    text = json.loads(file.read_text())
    words = text["model"]["vocab"]
    (one, first), (two, second) = list(words.items())[100:102]
    words[one], words[two] = second, first
    file.write_text(json.dumps(text))
    _, error = run("chat", saved, "--tokenizer", tmp_path / "swapped", said="Hi\n", code=1)
    assert "the tokenizer of another model" in error and "the same number, but other ones" in error
    with pytest.raises(ModelSourceError, match=r"has \d+ tokens, not \d+"):
        Talk(session, SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1}))
    more = tokenizer_of("smollm2")
    more.add_tokens(["<thought>"])
    Talk(session, more)
    with pytest.raises(ConfigError, match="no tokenizer with get_vocab"):
        Talk(session, object())


def test_the_tokenizer_that_a_program_was_compiled_with(saved: Path, session: Session, tmp_path: Path) -> None:
    """Its own name goes before that of the model; and of a folder of weights alone, no tokenizer is made up."""
    manifest = dataclasses.replace(
        session.program.manifest, base_model=str(tmp_path), tokenizer=str(saved.parent / "model")
    )
    found, name = tokenizer_for(None, manifest, False)
    assert (len(found), name) == (len(tokenizer_of("smollm2")), str(saved.parent / "model"))
    sizes = {"vocab_size": 300, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "weights")
    assert _tokenizer(str(tmp_path / "weights"), False, False, model) is None
    tokenizer_of("smollm2").save_pretrained(tmp_path / "weights")
    assert _tokenizer(str(tmp_path / "weights"), False, False, model) is not None
    (tmp_path / "weights" / "tokenizer.json").write_text("{}")
    assert _tokenizer(str(tmp_path / "weights"), False, False, model) is None


def test_the_command(saved: Path, session: Session, tmp_path: Path) -> None:
    """Two adapters that answer differently, switched between in one conversation, from the terminal and from a file."""
    before, names = session.state(), []
    for number in (1, 2):
        torch.manual_seed(number)
        session.load_state(torch.randn_like(before))
        names += ["--adapter", f"a{number}={session.export_ptd(tmp_path / f'a{number}.ptd')}"]
    session.load_state(before)
    said = "Hi\n/new\n/adapter a1\nHi\n/new\n/adapter a2\nHi\n/adapter\n/adapter none\n/what\n/new\n/adapter base\nHi\n"
    options = ("--max-new-tokens", 8, *names)
    output, error = run("chat", saved, *options, "--json", said=said + "/quit\nnever said\n")
    answers = [json.loads(line) for line in output.splitlines()]
    assert [answer["adapter"] for answer in answers] == ["base", "a1", "a2", "base"]
    assert answers[0] == answers[3] and len({tuple(answer["tokens"]) for answer in answers}) == 3
    assert "adapters: base, a1, a2; now a2" in error and "/what is no command" in error
    (tmp_path / "prompts.txt").write_text(said)
    assert run("chat", saved, *options, "--json", "--prompts", tmp_path / "prompts.txt")[0] == output
    assert run("chat", saved, *options, said="Hi\n")[0].rstrip("\n") == answers[0]["text"].rstrip("\n")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--adapter", "x"], "--adapter NAME=FOLDER"),
        (["--adapter", "base=x"], "neither base nor run"),
        (["--adapter", "x=nowhere"], "there is no such adapter"),
        (["--prompts", "nowhere"], "no such file of prompts"),
        (["--best"], "--run FOLDER"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_the_command_refuses(options: list[str], text: str, saved: Path) -> None:
    assert text in run("chat", saved, *options, said="", code=1)[1]
