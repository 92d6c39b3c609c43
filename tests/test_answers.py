"""Answers that are the row's own, and answers that are written: how they are scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler.errors import DataError
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import measure, score
from mobizo_compiler.text.generation import generate
from mobizo_compiler.text.prompts import PromptConfig, Sample
from mobizo_compiler.text.question_answering import answer_questions, token_f1

pytestmark = pytest.mark.xdist_group("cli")  # one process, so that its programs are made once

STORIES = (
    ("good day", ("lovely food", "a bad day", "work"), 0),
    ("awful rain", ("grim", "happy day"), 0),
    ("the food", ("sad rain", "fine"), 1),
)


def own_answers(session: mobizo.Session, words: Any, stories: Any = STORIES) -> TextData:
    """Rows with answers of their own, of a program whose labels may be any tokens."""
    manifest = session.program.manifest
    free = dataclasses.replace(manifest, max_labels=None, labels=dataclasses.replace(manifest.labels, choices=None))
    prompt = PromptConfig(template="{text} :", end_answers=False)
    texts = [Sample({"text": text}, options[right], "", options=options) for text, options, right in stories]
    return TextData.encode(texts, free, words, prompt)


def test_own_answers_are_scored_as_wholes(tiny_program: Path, words: Any) -> None:
    """Against sums of log-probabilities over whole rows of text; rows have different numbers of answers."""
    session = mobizo.Session(tiny_program)
    data = own_answers(session, words)
    assert data.choices is None and [row.choice for row in data.encoded] == [0, 0, 1]
    found = measure(session, data)
    assert found is not None and found.log_NC is not None and found.log_NC.shape == (3, 3)
    losses, right_summed, right_mean, own_loss, tokens = [], 0, 0, 0.0, 0
    for text, options, right in STORIES:
        summed, mean = [], []
        for option in options:
            start, ids = len(words(f"{text} :").input_ids), words(f"{text} : {option}").input_ids
            logits = session.evaluate(data.inputs([ids] * 2)).logits[0]
            logs = [float(logits[t - 1].double().log_softmax(0)[ids[t]]) for t in range(start, len(ids))]
            summed.append(sum(logs))
            mean.append(sum(logs) / len(logs))
            if option == options[right]:
                own_loss, tokens = own_loss - sum(logs), tokens + len(logs)
        losses.append(-float(torch.tensor(summed).double().log_softmax(0)[right]))
        right_summed += summed.index(max(summed)) == right
        right_mean += mean.index(max(mean)) == right
    assert found.score.choice_loss == pytest.approx(sum(losses) / 3, abs=1e-3)
    assert found.score.loss == pytest.approx(own_loss / tokens, abs=1e-3)
    assert right_summed != right_mean, "the two differ here, or this shows nothing"
    assert found.score.accuracy == pytest.approx(right_summed / 3)
    assert found.score.accuracy_per_token == pytest.approx(right_mean / 3)
    assert found.log_NC[1:, 2].exp().tolist() == [0, 0] and found.score.auc is found.score.chosen is None


def test_own_answers_of_one_token_are_scored_at_once(tiny_program: Path, words: Any) -> None:
    session = mobizo.Session(tiny_program)
    short = (("good day", ("happy", "sad", "fine"), 2), ("bad", ("happy", "sad"), 1))
    longer = tuple((text, (*options, "a a"), right) for text, options, right in short)
    quick, slow = (
        measure(session, own_answers(session, words, short)),
        measure(session, own_answers(session, words, longer)),
    )
    assert quick is not None and slow is not None and quick.log_NC is not None and slow.log_NC is not None
    for row, count in enumerate((3, 2)):
        wanted = slow.log_NC[row, :count].log_softmax(0)
        torch.testing.assert_close(quick.log_NC[row, :count], wanted, rtol=0, atol=1e-4)


def test_all_answers_of_a_row_follow_the_same_prompt(tiny_program: Path, words: Any) -> None:
    session = mobizo.Session(tiny_program)
    data = own_answers(session, words, (("day " * 20, ("a bad day the work", "sad"), 1),))
    (row,) = data.encoded
    assert len(row.ids) - row.labelled + max(map(len, row.options)) == data.layout.tokens and row.cut
    other = own_answers(session, words, (("day " * 20, ("a bad grim day the work", "sad"), 1),))
    assert other.digest != data.digest, "the answers that are not right belong to the data too"
    with pytest.raises(DataError, match="answers of its own"):
        texts = [Sample({"text": "day"}, "sad", "line 1", options=("sad", "happy"))]
        TextData.encode(texts, session.program.manifest, words, PromptConfig(template="{text} :"))


def test_f1_of_words() -> None:
    assert token_f1("The cat, sat!", "cat sat") == 1.0
    assert token_f1("a cat", "the dog") == 0.0
    assert token_f1("the", "a") == 1.0, "nothing but articles is nothing"
    assert token_f1("red red cat", "red dog") == pytest.approx(0.4)


@pytest.fixture(scope="module")
def writer(tiny_model: Path) -> mobizo.Session:
    """A session with a cache to generate with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.config.use_cache = False
    ids = torch.ones(2, 12, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss = mobizo.CausalLMLoss(max_labels=4)
    generate = mobizo.GenerateConfig(context=24)
    return mobizo.Session(mobizo.compile(model, inputs, loss=loss, generate=generate, backend="eager"))


def test_written_answers(writer: mobizo.Session, words: Any) -> None:
    """What is written is what the prompt goes on with, and is compared with every right answer."""
    prompt = PromptConfig(template="{text} :", end_answers=True)
    wanted = generate(writer, words, "good day :", 3).text
    texts = [
        Sample({"text": "good day"}, "sad", "", references=("sad", wanted)),
        Sample({"text": "bad"}, "sad", "", references=("<none>",)),
    ]
    data = TextData.encode(texts, writer.program.manifest, words, prompt)
    found = answer_questions(writer, words, data, texts, 3)
    assert found.answers[0] == wanted.strip() and found.f1 == found.exact_match == 0.5
    assert all(row.ids[-1] == words.eos_token_id for row in data.encoded)
    assert score(writer, data) is not None


def test_writing_ends_at_a_text(writer: mobizo.Session, words: Any) -> None:
    whole = generate(writer, words, "good day :", 6)
    second = words.decode(whole.tokens[1:2])
    some = generate(writer, words, "good day :", 6, until=second)
    first = next(place for place, token in enumerate(whole.tokens) if second in words.decode([token]))
    assert some.tokens == whole.tokens[: first + 1] and some.stopped == "end"
