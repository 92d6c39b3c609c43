"""Rows of text: files that are well formed and files that are not, prompts, tokens, labels, splits, batches."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import Limits, LoraConfig, ZOConfig
from mobizo_compiler.errors import ConfigError, DataError, MissingPackageError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.text.answers import Encoded
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.data import IGNORED, TextData
from mobizo_compiler.text.evaluation import score
from mobizo_compiler.text.prompts import PromptConfig, Sample, found_choices, samples, split
from mobizo_compiler.text.rows import read_rows
from mobizo_compiler.text.training import TrainingConfig, train

TOKENS = 8


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(22, 12), nn.Linear(12, 22)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) * attention_mask[:, :, None])  # type: ignore[no-any-return]


class Classes(Words):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask)[:, 0, :3]


def compiled(model: nn.Module, loss: Any) -> mobizo.Program:
    ids = torch.zeros(2, TOKENS, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lora, zo = LoraConfig(r=2, target_modules=("head",)), ZOConfig(queries=1)
    return mobizo.compile(model.eval(), inputs, lora, zo, loss, backend="eager")


@pytest.fixture(scope="module")
def causal() -> Manifest:
    return compiled(Words(), mobizo.CausalLMLoss()).manifest


def changed(manifest: Manifest, labels: Any = None, **fields: Any) -> Manifest:
    """The manifest of another program, without compiling it."""
    return dataclasses.replace(manifest, labels=dataclasses.replace(manifest.labels, **labels or {}), **fields)


def sample(text: str, answer: str) -> Sample:
    return Sample({"text": text}, answer, f"row {text!r}")


WORDS_OF_ROWS = ["great", "good", "fine", "lovely", "awful", "bad", "poor"]
PROMPT = PromptConfig(template="{text} :", answer_column="tone")


def test_formats_say_the_same(tmp_path: Path) -> None:
    values = [{"text": "good, day", "tone": "happy"}, {"text": 'a "bad"\nday', "tone": "sad"}]
    (tmp_path / "a.csv").write_text('text,tone\n"good, day",happy\n\n"a ""bad""\nday",sad\n')
    (tmp_path / "a.tsv").write_text('\ufefftext\ttone\r\ngood, day\thappy\r\n"a ""bad""\nday"\tsad\r\n')
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(values))
    for path in sorted(tmp_path.iterdir()):
        assert [row.cells for row in read_rows(path)] == values, path
    assert read_rows(tmp_path / "a.csv")[1].where.endswith("a.csv, line 5"), "where the row ends"
    (tmp_path / "a.txt").write_text("one line\n\n another \n")
    assert [row.cells["text"] for row in read_rows(tmp_path / "a.txt")] == ["one line", " another "]
    (tmp_path / "b.jsonl").write_text('{"n": 3, "yes": true, "none": null}\n')
    assert read_rows(tmp_path / "b.jsonl")[0].cells == {"n": "3", "yes": "true", "none": ""}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b"", "no rows"),
        ("a.csv", b"text,tone\n", "no rows"),
        ("a.csv", b"text,tone\nx,y\nonly one\n", "line 3"),
        ("a.csv", b"text,tone\nx,y,z\n", "3 cells, the header has 2"),
        ("a.csv", b"text,text\nx,y\n", "need names"),
        ("a.csv", b'text,tone\nx,"y\n', "cannot be read"),
        ("a.csv", "text,tone\nx,y\ncaf\u00e9,z\n".encode("latin-1"), "line 3"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2"),
        ("a.json", b'{"a": 1}', "not a list"),
        ("a.xlsx", b"x", "ends in"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / name)
    assert part in str(error.value), error.value


def test_missing_files_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "no.csv")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingPackageError, match="datasets"):
        read_rows(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is optional")
def test_a_folder_of_datasets(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from datasets.table import InMemoryTable

    table = InMemoryTable(pyarrow.table({"text": ["good", "bad"], "n": [1, 2]}))
    saved = datasets.Dataset(table, fingerprint="one")  # with a name, so that nothing is pickled to find one
    saved.save_to_disk(str(tmp_path / "one"))
    assert [row.cells for row in read_rows(tmp_path / "one")] == [{"text": "good", "n": "1"}, {"text": "bad", "n": "2"}]
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "parts"))
    with pytest.raises(DataError, match="several splits"):
        read_rows(tmp_path / "parts")
    assert len(read_rows(tmp_path / "parts" / "train")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot load"):
        read_rows(tmp_path / "empty")


def test_prompts() -> None:
    assert PROMPT.columns == ("text",)
    with pytest.raises(ConfigError, match="names no column"):
        PromptConfig(template="nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        PromptConfig(template="{text")
    with pytest.raises(ConfigError, match="format"):
        PromptConfig(template="{text:>4}")
    with pytest.raises(ConfigError, match="different texts"):
        PromptConfig(choices=("a", "a"))
    assert PromptConfig.from_json(PROMPT.to_json()) == PROMPT


def test_rows_that_do_not_suit_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,tone\ngood day,happy\nbad day, \n")
    rows = read_rows(tmp_path / "a.csv")
    with pytest.raises(DataError, match="answer is empty") as empty:
        samples(rows, PROMPT)
    assert "line 3" in str(empty.value)
    with pytest.raises(DataError, match="no column 'prompt'") as missing:
        samples(rows, PromptConfig())
    assert "text, tone" in str(missing.value)
    with pytest.raises(DataError, match="none of"):
        samples(rows[:1], PromptConfig(template="{text}", answer_column="tone", choices=("x", "y")))


def test_only_answers_are_labelled(causal: Manifest, words: Any) -> None:
    texts = [sample("good day", "happy"), sample("the bad rain", "sad sad")]
    data = TextData.encode(texts, causal, words, PROMPT)
    inputs, labels = data.batches(seed=0)(0)
    assert inputs["input_ids"].shape == labels.shape == (2, 8) or inputs["input_ids"].shape[1] == TOKENS
    for ids, mask, label in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True):
        text = words.decode(ids[mask.bool()])
        answer = words.decode(label[label != IGNORED])
        assert text.endswith(f": {answer}") and answer in ("happy</s>", "happy </s>", "sad sad </s>", "sad sad</s>")
        assert bool((ids[~mask.bool()] == 0).all())
        assert torch.equal(label[label != IGNORED], ids[label != IGNORED])
    assert data.cut == 0 and data.choices is None


def test_long_prompts_lose_their_front_or_their_longest_column(causal: Manifest, words: Any) -> None:
    long = sample("good good good great fine day", "happy")
    front = TextData.encode([long], causal, words, PROMPT).encoded[0]
    assert words.decode(front.ids[:-2]) == "good good great fine day :" and front.cut == 1
    template = PromptConfig(template="Message {text} :", answer_column="tone", cut="longest", end_answers=False)
    other = TextData.encode([long], causal, words, template).encoded[0]
    assert words.decode(other.ids) == "Message good good good great fine : happy" and len(other.ids) == TOKENS
    with pytest.raises(DataError, match="answer has 9 tokens"):
        TextData.encode([sample("a", "sad " * 8)], causal, words, PROMPT)
    wordy = PromptConfig(template="a " * 9 + "{text}", answer_column="tone", cut="longest")
    with pytest.raises(DataError, match="template alone"):
        TextData.encode([long], causal, words, wordy)


def test_choices(words: Any, causal: Manifest) -> None:
    ids = tuple(words.convert_tokens_to_ids(["happy", "sad"]))
    few = changed(causal, max_labels=1, labels={"choices": ids})
    texts = [sample("good day", "happy"), sample("bad day", "sad")]
    data = TextData.encode(texts, few, words, PROMPT)
    assert data.choices == ("happy", "sad") and [row.choice for row in data.encoded] == [0, 1]
    assert [row.labelled for row in data.encoded] == [1, 1], "an answer does not end where it is a choice"
    with pytest.raises(DataError, match="none of"):
        TextData.encode([*texts, sample("a day", "grim")], few, words, PROMPT)
    with pytest.raises(DataError, match="compiled"):
        TextData.encode(texts, few, words, PromptConfig(template="{text}", choices=("happy", "grim")))
    found = TextData.encode(texts * 4, causal, words, PROMPT)
    assert found.choices == ("happy", "sad") == found_choices(texts * 4)
    assert found_choices(texts) is None, "two answers to two rows are no closed set"
    again = TextData.encode(texts, causal, words, found.config)
    assert again.encoded == found.encoded[:2], "what was found out is in the config"


def test_what_the_program_cannot_take(words: Any, causal: Manifest) -> None:
    one = changed(causal, max_labels=1)
    with pytest.raises(DataError, match="at most 1"):
        TextData.encode([sample("good", "happy sad")], one, words, PROMPT)
    small = dataclasses.replace(causal, inputs=tuple(dataclasses.replace(i, high=9) for i in causal.inputs))
    with pytest.raises(DataError, match="outside of the model's vocabulary of 10"):
        TextData.encode([sample("good the", "happy")], small, words, PROMPT)
    shifted = changed(causal, first_label=0)
    with pytest.raises(DataError, match="cannot be made into"):
        TextData.encode([sample("good", "happy")], shifted, words, PROMPT)


def test_classes(words: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classes()
    program = compiled(model, mobizo.SequenceClassificationLoss())
    texts = [sample("good", "1"), sample("bad", "2"), sample("day", "0")]
    data = TextData.encode(texts, program.manifest, words, PROMPT)
    inputs, labels = data.batches(seed=3)(0)
    answers = {text.cells["text"]: text.answer for text in texts}
    for ids, label in zip(inputs["input_ids"], labels, strict=True):
        assert answers[words.decode(ids[:1])] == str(int(label))
    names = PromptConfig(template="{text}", choices=("low", "mid", "high"))
    assert TextData.encode([sample("good", "high")], program.manifest, words, names).encoded[0].choice == 2
    with pytest.raises(DataError, match="3 classes"):
        TextData.encode([sample("good", "up"), sample("bad", "down")], program.manifest, words, PROMPT)

    session = mobizo.Session(program)
    found = score(session, data)
    rows = data.inputs([row.ids for row in data.encoded])
    expected = float(F.cross_entropy(model(**rows), torch.tensor([1, 2, 0])))
    assert found is not None and found.rows == 3 and found.loss == pytest.approx(expected, abs=1e-5)
    assert found.choice_loss == pytest.approx(expected, abs=1e-5) and found.auc is None
    config = TrainingConfig(epochs=20, learning_rate=0.3, validate_every=10)
    outcome = train(session, data, data, config, tmp_path / "run")
    assert outcome.steps == 30 and [v.step for v in outcome.validations] == [0, 10, 20, 30]
    assert outcome.best is not None and outcome.best.score.loss < expected - 0.2, "the loss comes down"
    assert score(session, data) == outcome.validations[-1].score

    seconds = 0.0

    def later(step: int, result: object) -> None:
        nonlocal seconds
        seconds = 60.0 if step == 29 else 0.0

    watch = Limits(minutes=1).watch(clock=lambda: seconds)
    cut = train(mobizo.Session(program), data, data, config, tmp_path / "cut", on_step=later, until=watch)
    assert (cut.why, cut.summary.steps, cut.summary.limit) == ("limit", 30, "a minute is over"), "it is not measured"
    again = train(mobizo.Session(program), data, data, config, tmp_path / "cut")
    measured = [[(v.step, v.objective) for v in of.validations] for of in (again, outcome)]
    assert again.why == "done" and measured[0] == measured[1]
    over = train(mobizo.Session(program), data, data, config, tmp_path / "over", until=watch)
    assert over.summary.steps == 0 and [v.step for v in over.validations] == [0], "what is due before is measured"


def test_an_epoch_has_every_row_once_and_batches_depend_on_the_step_alone(causal: Manifest, words: Any) -> None:
    texts = [sample(f"{word} day", "happy") for word in WORDS_OF_ROWS]
    data = TextData.encode(texts, causal, words, PROMPT)
    first, second = data.batches(seed=5), data.batches(seed=5)
    seen = [int(i) for step in range(7) for i in first(step)[0]["input_ids"][:, 0]]
    for epoch in (seen[:7], seen[7:]):
        assert set(Counter(epoch).values()) == {1} and len(epoch) == 7
    assert seen[:7] != seen[7:], "each epoch has an order of its own"
    for step in (5, 0, 6, 3):
        assert torch.equal(first(step)[0]["input_ids"], second(step)[0]["input_ids"])
    other = [int(i) for step in range(7) for i in data.batches(seed=6)(step)[0]["input_ids"][:, 0]]
    assert other != seen


def test_equal_prompts_are_on_one_side() -> None:
    texts = [sample(f"text {i % 10}", "happy") for i in range(40)]
    training, validation = split(texts, 0.2, seed=0)
    assert len(training) + len(validation) == 40 and len(validation) == 8
    assert not {s.cells["text"] for s in training} & {s.cells["text"] for s in validation}
    assert split(texts, 0.2, seed=0) == (training, validation) != split(texts, 0.2, seed=1)
    with pytest.raises(DataError, match="cannot be split"):
        split(texts[:1], 0.5, seed=0)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_batches_of_rows_of_similar_length(lengths: list[int], rows: int, seed: int) -> None:
    """An epoch still has every row once, wherever its batches begin; and no order has less padding, within a pool."""
    encoded = tuple(Encoded((1,) * (length - 1) + (9 + place,), 1, None, 0) for place, length in enumerate(lengths))
    layout = BatchShape(
        rows=rows, tokens=9, shortest=1, vocabulary=99, inputs=("input_ids",), max_labels=1, classes=None, choices=None
    )
    batch = TextData(encoded, layout, None, (), 0, PromptConfig()).batches(seed, group_by_length=True)
    seen = [int(label) - 9 for step in range(3 * len(lengths)) for label in batch(step)[1].max(dim=1).values]
    epochs = [
        seen[begin : begin + len(lengths)] for begin in range(0, len(seen) // len(lengths) * len(lengths), len(lengths))
    ]
    assert all(sorted(epoch) == list(range(len(lengths))) for epoch in epochs)
    if len(lengths) % rows == 0:
        padded = sum(batch(step)[0]["input_ids"].numel() for step in range(len(lengths) // rows))
        ordered = sorted(lengths, reverse=True)
        assert padded == sum(rows * ordered[place] for place in range(0, len(lengths), rows))


def test_balanced_batches_take_the_answers_in_turns() -> None:
    encoded = tuple(Encoded((1, 2, 3 + choice), 1, choice, 0) for choice in (0, 0, 0, 0, 0, 1, 2, 1))
    layout = BatchShape(
        rows=2, tokens=4, shortest=4, vocabulary=9, inputs=("input_ids",), max_labels=1, classes=None, choices=None
    )
    data = TextData(encoded, layout, ("a", "b", "c"), (), 0, PromptConfig())
    batch = data.batches(seed=1, balanced=True)
    labels = [int(label) for step in range(30) for label in batch(step)[1].max(dim=1).values]
    assert [labels.count(3 + choice) for choice in range(3)] == [20, 20, 20]
    again = data.batches(seed=1, balanced=True)
    assert torch.equal(again(17)[0]["input_ids"], batch(17)[0]["input_ids"])
    plain = [int(v) for step in range(4) for v in data.batches(1)(step)[1].max(dim=1).values]
    assert sorted(plain) == sorted(row.ids[-1] for row in encoded), "an epoch has every row once"
    with pytest.raises(ConfigError, match="closed set"):
        TextData(encoded, layout, None, (), 0, PromptConfig()).batches(0, balanced=True)
