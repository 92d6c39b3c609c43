"""Conversations: forms of rows, chat templates of model families, and which tokens are answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, ZOConfig, cli
from mobizo_compiler.cli import runs as run_commands
from mobizo_compiler.cli import text as text_commands
from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.text.chat_rows import asked, stretches
from mobizo_compiler.text.chat_template import ChatTemplate
from mobizo_compiler.text.conversations import ASSISTANT, Message, chat_form, conversation, without_oldest
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import measure
from mobizo_compiler.text.generation import Generated, generate
from mobizo_compiler.text.prompts import PromptConfig, samples
from mobizo_compiler.text.rows import Row, read_rows

TEMPLATES = Path(__file__).parent / "chat_templates"
CORPUS = ["You are a helpful assistant. Hello there! How are you? Fine, thanks. And you? Very well.\n\nuser model"] * 4
TURNS = [("user", "Hello there!"), ("assistant", "How are you?"), ("user", "Fine, thanks.\nAnd you?")]
TURNS += [("assistant", "Very well.")]
SYSTEM = ("system", "Be helpful.")

# Of each family: tokens that begin and end texts, others that are special, whether it spells as SentencePiece does,
# whether the system may speak, and what its template makes of the conversation above, answers in brackets.
FAMILIES: dict[str, dict[str, Any]] = json.loads((TEMPLATES / "families.json").read_text())


def tokenizer_of(family: str) -> Any:
    """A small tokenizer that spells as those of the family do, with its template."""
    begin, end, special = (FAMILIES[family][name] for name in ("begin", "end", "special"))
    tokens = [token for token in (begin, end, *special) if token]
    if FAMILIES[family]["sentencepiece"]:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tail = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(tail)
        alphabet, first = [], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet, first = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=first, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in tokens if t not in (begin, end)]})
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return tokenizer


def messages(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


@pytest.mark.parametrize("family", [name for name, of in FAMILIES.items() if "written" in of])
def test_answers_are_found_token_by_token(family: str) -> None:
    tokenizer, written = tokenizer_of(family), FAMILIES[family]["written"]
    turns = [*([SYSTEM] if FAMILIES[family]["system"] else []), *TURNS]
    template = ChatTemplate(tokenizer)
    plain = written.replace("⟦", "").replace("⟧", "")
    assert template.render(messages(*turns), "here") == plain
    ids, spans = template.encode(messages(*turns), "here")
    dicts = [{"role": role, "content": content} for role, content in turns]
    assert ids == tokenizer.apply_chat_template(dicts, tokenize=True, return_dict=True)["input_ids"]
    offsets = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    wanted, place, inside = set[int](), 0, False
    for letter in written:
        if letter in "⟦⟧":
            inside = letter == "⟦"
        else:
            wanted |= {place} if inside else set()
            place += 1
    expected = [k for k, (first, last) in enumerate(offsets) if set(range(first, last)) & wanted]
    assert [k for a, b in spans for k in range(a, b)] == expected and len(spans) == 2
    for place in expected:
        assert set(range(*offsets[place])) <= wanted, "no token is half of an answer"
    last = {"gemma": "<end_of_turn>", "phi3": "<|end|>", "qwen2": "<|im_end|>"}.get(family, tokenizer.eos_token)
    assert [ids[b - 1] for _, b in spans] == [tokenizer.convert_tokens_to_ids(last)] * 2, "answers learn to end"


@pytest.mark.parametrize("family", [name for name, of in FAMILIES.items() if "written" in of])
def test_what_is_said_ends_no_turn(family: str) -> None:
    """A user, or an answer, that spells special tokens says text; all else is as without them."""
    tokenizer = tokenizer_of(family)
    template, special = ChatTemplate(tokenizer), set(tokenizer.all_special_ids)
    end = FAMILIES[family]["end"]
    tricks = [(role, f"{words[:5]}{end}{end[:-1]}{end}{words[5:]}") for role, words in TURNS]
    if family == "marked":
        with pytest.raises(DataError, match="is a special token, and the chat template marks answers itself"):
            template.encode(messages(*tricks), "here")
        return
    found, expected = (template.encode(messages(*turns), "here") for turns in (tricks, TURNS))
    kept = [[token for token in ids if token in special] for ids, _ in (found, expected)]
    assert kept[0] == kept[1] and len(found[0]) > len(expected[0])
    text = template.render(messages(*tricks), "here")
    assert tokenizer.decode(found[0]).replace(" ", "") == text.replace(" ", "")  # SentencePiece adds some
    assert len(found[1]) == 2
    for answer, (first, last) in enumerate(found[1]):
        asking = messages(*tricks[: 2 * answer + 1])
        assert asked(asking, tokenizer, PromptConfig(chat="messages")) == found[0][:first]
        assert TURNS[2 * answer + 1][1][5:] in tokenizer.decode(found[0][first:last])


@pytest.mark.parametrize("family", ["phi3", "zephyr", "llama2"])
def test_what_is_said_in_one_turn_changes_no_other(family: str) -> None:
    """Also where special tokens take the white space behind them, as those of Phi-3 do."""
    tokenizer = tokenizer_of(family)
    specials = [AddedToken(token, rstrip=True, special=True) for token in tokenizer.all_special_tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tricks = [("user", f"{tokenizer.eos_token} Hello there!"), *TURNS[1:]]
    ids, plain = (ChatTemplate(tokenizer).encode(messages(*turns), "here")[0] for turns in (tricks, TURNS))
    answer = ChatTemplate(tokenizer).encode(messages(*TURNS), "here")[1][0][0]
    assert ids[-(len(plain) - answer) :] == plain[answer:]


def test_a_role_spells_no_special_token() -> None:
    row = Row({}, "row 1", {"messages": [{"role": "user<|im_end|>", "content": "Hi"}]})
    with pytest.raises(DataError, match=r"'role' is 'user<\|im_end\|>'"):
        conversation(row, "messages")


def test_a_template_that_asks_otherwise_is_refused() -> None:
    tokenizer = tokenizer_of("deepseek_r1")
    with pytest.raises(DataError, match=r"asks for an answer by(.|\n)*here, message 2(.|\n)*--chat-template") as error:
        ChatTemplate(tokenizer).encode(messages(*TURNS), "here")
    assert "<think>" in str(error.value)


def test_templates_that_cannot_be_used() -> None:
    tokenizer = tokenizer_of("gemma")
    with pytest.raises(DataError, match="System role not supported"):
        ChatTemplate(tokenizer).encode(messages(SYSTEM, *TURNS), "row 3")
    with pytest.raises(DataError, match=r"must alternate(.|\n)*row 3"):
        ChatTemplate(tokenizer).encode(messages(TURNS[0], *TURNS), "row 3")
    with pytest.raises(DataError, match="the chat template refuses"):
        ChatTemplate(tokenizer, "{{ messages[9].content }}{{ nothing.at.all }}").encode(messages(*TURNS), "row 3")
    for text in (
        "{% for m in messages %}{{ m.role }}:{{ m.content | upper }};{% endfor %}{% if add_generation_prompt %}"
        "assistant:{% endif %}",
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.content }};{% endfor %}{% if add_generation_prompt %}"
        "assistant:{% endif %}",
        "only this",
    ):
        with pytest.raises(DataError, match="changes what the assistant says"):
            ChatTemplate(tokenizer, text).encode(messages(*TURNS), "row 3")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template(.|\n)*--chat-template"):
        ChatTemplate(tokenizer)


def test_answers_with_spaces_around_them_and_words_of_the_template() -> None:
    tokenizer = tokenizer_of("llama3")
    template = ChatTemplate(tokenizer)
    found = messages(("user", "assistant"), ("assistant", " user \n"), ("user", "user"), ("assistant", "ANSWER-0-OF-2"))
    ids, spans = template.encode(found, "here")
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == ["user<|eot_id|>", "ANSWER-0-OF-2<|eot_id|>"]


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": role, "content": content} for role, content in [SYSTEM, *TURNS]]},
    "conversations": {"conversations": [
        {"from": "system", "value": SYSTEM[1]}, {"from": "human", "value": TURNS[0][1]},
        {"from": "gpt", "value": TURNS[1][1]}, {"from": "human", "value": TURNS[2][1]},
        {"from": "gpt", "value": TURNS[3][1]}], "id": 4},
    "instruction": {"instruction": "Add.", "input": "1 and 1", "output": "2", "text": "all of it"},
    "completion": {"prompt": "Add 1 and 1.", "completion": "2"},
}  # fmt: skip


def test_forms_of_rows(tmp_path: Path) -> None:
    found = {}
    for form, row in ROWS.items():
        (tmp_path / f"{form}.jsonl").write_text(json.dumps(row) + "\n")
        (only,) = read_rows(tmp_path / f"{form}.jsonl")
        assert chat_form(only) == form
        found[form] = conversation(only, form)
    assert found["messages"] == found["conversations"] == tuple(messages(SYSTEM, *TURNS))
    assert found["instruction"] == (Message("user", "Add.\n\n1 and 1"), Message(ASSISTANT, "2"))
    assert found["completion"] == (Message("user", "Add 1 and 1."), Message(ASSISTANT, "2"))


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer of the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begins with an answer"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "message 2"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'content' is a list"),
        ({"messages": [{"from": "user", "value": "a"}]}, "needs 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]}, "calls tools"),
        ({"messages": "a"}, "no list of messages"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "'from' is 'narrator'"),
        ({"instruction": "a"}, "no column 'output'"),
    ],
)
def test_rows_that_are_no_conversations(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=match) as error:
        conversation(read_rows(tmp_path / "a.jsonl")[0], next(iter(row)))
    assert "line 1" in str(error.value)


def test_the_oldest_exchange_goes_and_the_system_stays() -> None:
    whole = messages(SYSTEM, *TURNS)
    assert without_oldest(whole) == tuple(messages(SYSTEM, *TURNS[2:]))
    assert without_oldest(messages(*TURNS)) == tuple(messages(*TURNS[2:])) and without_oldest(whole[3:]) == ()


# -- from rows to a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of("smollm2")


@pytest.fixture(scope="module")
def program(tokenizer: Any) -> mobizo.Program:
    """A model with the words of the tokenizer, for two rows of 160 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), use_cache=False, **sizes)).eval()
    ids = torch.ones(2, 160, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return mobizo.compile(model, inputs, LoraConfig(r=2), ZOConfig(queries=2), backend="eager", base_model="here")


def encoded(program: mobizo.Program, tokenizer: Any, *turns: tuple[str, str], **options: Any) -> TextData:
    config = PromptConfig(chat="messages", **options)
    row = Row({}, "here", {"messages": [{"role": role, "content": content} for role, content in turns]})
    return TextData.encode(samples([row], config), program.manifest, tokenizer, config)


def test_labels_are_those_of_all_answers(program: mobizo.Program, tokenizer: Any) -> None:
    data = encoded(program, tokenizer, *TURNS)
    inputs, labels = data.batches(seed=0)(0)
    row, mask = inputs["input_ids"][0], labels[0] != -100
    assert torch.equal(labels[0][mask], row[mask])
    learnt = [text for text, labelled in stretches(data.encoded[0], tokenizer) if labelled]
    assert learnt == ["How are you?<|im_end|>", "Very well.<|im_end|>"]
    assert int(mask.sum()) == data.encoded[0].labelled == sum(len(tokenizer(text).input_ids) for text in learnt)
    found, session = measure(mobizo.Session(program), data), mobizo.Session(program)
    logits = session.evaluate(inputs)["logits"][0].double()
    expected = F.cross_entropy(logits[:-1], labels[0][1:], ignore_index=-100)
    assert found is not None and found.score.loss == pytest.approx(float(expected), abs=1e-5)


def test_long_conversations_lose_old_turns_then_the_end(program: mobizo.Program, tokenizer: Any) -> None:
    kept = [(SYSTEM, *TURNS[:2] * older, *TURNS[2:]) for older in range(9)]
    lengths = [len(ChatTemplate(tokenizer).encode(messages(*turns), "here")[0]) for turns in kept]
    fits = sum(length <= 160 for length in lengths) - 1
    assert 0 < fits < 8
    whole, long = (encoded(program, tokenizer, *kept[older]).encoded[0] for older in (fits, 8))
    assert whole.cut == 0 and long.ids == whole.ids and long.spans == whole.spans, "the system and what was said last"
    assert long.cut == lengths[8] - lengths[fits]
    wordy = encoded(program, tokenizer, TURNS[0], ("assistant", "Very well. " * 60)).encoded[0]
    assert len(wordy.ids) == 160 == wordy.spans[-1][1] and wordy.cut > 0
    with pytest.raises(DataError, match=r"none of its answer is among the 160(.|\n)*--tokens"):
        encoded(program, tokenizer, ("user", "Very well. " * 60), TURNS[1])
    few = dataclasses.replace(program, manifest=dataclasses.replace(program.manifest, max_labels=3))
    with pytest.raises(DataError, match="at most 3"):
        encoded(few, tokenizer, *TURNS)


def test_only_programs_that_write_take_conversations(program: mobizo.Program, tokenizer: Any) -> None:
    labels = dataclasses.replace(program.manifest.labels, choices=(5, 6))
    chooses = dataclasses.replace(program, manifest=dataclasses.replace(program.manifest, labels=labels))
    with pytest.raises(DataError, match=r"compiled to choose(.|\n)*causal-lm"):
        encoded(chooses, tokenizer, *TURNS)
    with pytest.raises(ConfigError, match="template is for plain prompts"):
        PromptConfig(chat="messages", template="{a}")
    with pytest.raises(ConfigError, match="use messages, conversations"):
        PromptConfig(chat="emails")


@pytest.mark.parametrize("family", [name for name, of in FAMILIES.items() if of["begin"] and "written" in of])
def test_what_is_asked_are_the_tokens_before_the_answer(family: str) -> None:
    """Also where the tokenizer puts a token in front of texts, which the template may do or not."""
    tokenizer = tokenizer_of(family)
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    ids, spans = ChatTemplate(tokenizer).encode(messages(*TURNS), "here")
    for answer, (first, _) in enumerate(spans):
        asking = messages(*TURNS[: 2 * answer + 1])
        assert asked(asking, tokenizer, PromptConfig(chat="messages")) == ids[:first]


def test_a_run_on_conversations(
    program: mobizo.Program, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows what is learnt, keeps the template, and later commands use it."""
    for module in (text_commands, run_commands):
        monkeypatch.setattr(module, "load", lambda *a, **b: program)
    monkeypatch.setattr(run_commands, "load_tokenizer", lambda *a, **b: tokenizer)
    (tmp_path / "a.pte").write_text("")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(ROWS["conversations"]) + "\n" for _ in range(3)))

    def run(*arguments: Any, code: int = 0) -> tuple[str, str]:
        result = CliRunner().invoke(
            cli.app, [str(a) for a in arguments], env={"COLUMNS": "400"}, catch_exceptions=False
        )
        assert result.exit_code == code, result.output
        return result.stdout, result.stderr

    line = ("finetune", tmp_path / "a.pte", "--data", tmp_path / "rows.jsonl", "--run", tmp_path / "run", "--steps", 2)
    out, remarks = run(*line, "--validation-share", 0, "--no-plot")
    assert "user\nHello there!<|im_end|>\n<|im_start|>assistant\n⟦How are you?<|im_end|>⟧\n" in remarks
    assert "mobizo generate" in out and "predict" not in out
    prompt = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["prompt"]
    assert prompt["chat"] == "conversations" and prompt["chat_template"] == tokenizer.chat_template
    seen: list[list[int]] = []

    def generated(session: Any, tokenizer: Any, prompt: list[int], *rest: Any) -> Generated:
        seen.append(prompt)
        return generate(session, tokenizer, prompt, 1)

    monkeypatch.setattr(text_commands, "generate", generated)
    tokenizer.chat_template, kept = "other {{ messages }}", tokenizer.chat_template
    try:
        found = json.loads(run("evaluate", *line[1:6], "--json")[0])
        run("generate", tmp_path / "a.pte", "Hello there!", "--run", tmp_path / "run")
    finally:
        tokenizer.chat_template = kept
    assert found["rows"] == 3 and found["steps"] == 2, "with the template of the run, not that of now"
    assert seen == [asked(messages(TURNS[0]), tokenizer, PromptConfig(chat="messages"))]
    (tmp_path / "other.jinja").write_text("only this {{ messages[0].content }}")
    line = (*line, "--validation-share", 0, "--chat-template", tmp_path / "other.jinja")
    assert "changes what the assistant says" in run(*line, code=1)[1]
