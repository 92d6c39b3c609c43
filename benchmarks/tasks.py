"""What `benchmarks/accuracy.py` trains on: review sentences with two prompts, topics of words, the text of Hamlet."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_compiler as mobizo
from examples.demo import TOKENS
from examples.rotten_tomatoes import (
    PROMPT,
    VERBALISERS,
    Prompter,
    Sentence,
    accuracy_and_auc,
    balanced,
    data_folder,
    in_turns,
    load_sentences,
    padded,
    split_by_movie,
)
from examples.topics import TOPICS, load_topics
from mobizo_compiler.step.losses import Loss

Batch = tuple[dict[str, Tensor], Tensor]
Evaluate = Callable[[dict[str, Tensor]], Any]


class Task(Protocol):
    """Rows to train on, and rows to measure on.

    Attributes:
        loss: Of training.
        rows_are_small: Whether what a step starts from can be kept for every row.
    """

    loss: Loss
    rows_are_small: bool

    def batches(self, rows: int, seed: int) -> Iterator[Batch]:
        """Batches without end."""

    def scores(self, evaluate: Evaluate, rows: int) -> dict[str, float]:
        """Measured on what is held out, `rows` at a time."""


class Choice:
    """One of a few answers to a prompt about a text; batches have as many of each.

    Args:
        tokenizer: Of the model.
        train: Texts with the number of their answer.
        held_out: The same, to measure on.
        prompt: What stands before `{text}`, and the question after it.
        answers: One token each.
        tokens: Length of every row.
    """

    rows_are_small = True

    def __init__(
        self,
        tokenizer: Any,
        train: Sequence[Sentence],
        held_out: Sequence[Sentence],
        prompt: str,
        answers: tuple[str, ...],
        tokens: int,
    ) -> None:
        self.train, self.held_out = train, held_out
        self.prompter = Prompter(tokenizer, tokens, prompt, answers)
        self.loss = mobizo.ChoiceLoss(self.prompter.answers)

    def batches(self, rows: int, seed: int) -> Iterator[Batch]:
        """Every text of a label comes up once before any does again."""
        texts = in_turns(self.train, random.Random(seed))
        while True:
            inputs, labels, _ = self.prompter.encode(list(itertools.islice(texts, rows)))
            yield inputs, labels

    def scores(self, evaluate: Evaluate, rows: int) -> dict[str, float]:
        """Accuracy, and the area under the ROC curve of two answers."""
        logits = []
        for texts in padded(self.held_out, rows):
            inputs, _, last = self.prompter.encode(texts)
            found = evaluate(inputs).logits[torch.arange(rows), last]
            logits.append(found[:, list(self.prompter.answers)].float())
        every = torch.cat(logits)[: len(self.held_out)]
        wanted = torch.tensor([text.label for text in self.held_out])
        if every.shape[1] == 2:
            accuracy, area = accuracy_and_auc(every[:, 1] - every[:, 0], wanted)
            return {"accuracy": accuracy, "auc": area}
        return {"accuracy": float((every.argmax(1) == wanted).double().mean())}


class Text:
    """Every next token of windows of a text.

    Args:
        train: Windows [windows, tokens].
        held_out: The same, to measure on.
    """

    rows_are_small = False  # a step needs every token: a megabyte a row

    def __init__(self, train: Tensor, held_out: Tensor) -> None:
        self.train, self.held_out = train, held_out
        self.loss = mobizo.CausalLMLoss()

    def batches(self, rows: int, seed: int) -> Iterator[Batch]:
        """Every window comes up once before any does again."""
        generator, queue = random.Random(seed), list[int]()
        while True:
            while len(queue) < rows:
                queue += generator.sample(range(len(self.train)), len(self.train))
            ids, queue = self.train[queue[:rows]], queue[rows:]
            yield _of_windows(ids), ids

    def scores(self, evaluate: Evaluate, rows: int) -> dict[str, float]:
        """Nats of a token."""
        total, count = 0.0, 0
        for windows in padded(range(len(self.held_out)), rows):
            new = len(self.held_out) - count if count + rows > len(self.held_out) else rows
            ids = self.held_out[windows]
            logits = evaluate(_of_windows(ids)).logits[:new, :-1].float()
            total += float(F.cross_entropy(logits.reshape(-1, logits.shape[2]), ids[:new, 1:].reshape(-1))) * new
            count += new
        return {"loss": total / count}


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of a task is used.

    Args:
        train_rows: Texts to train on; None for all.
        held_out: Texts to measure on, as many of each answer.
    """

    train_rows: int | None = None
    held_out: int = 400


def reviews(prompt: str, answers: tuple[str, str]) -> Callable[[Any, Options], Task]:
    """Sentences about movies; those that are held out are about other movies."""

    def make(tokenizer: Any, options: Options) -> Task:
        return _choice(tokenizer, split_by_movie(load_sentences()), options, prompt, answers, TOKENS)

    return make


def topics(tokenizer: Any, options: Options) -> Task:
    """Words of a thesaurus under seven of its heads."""
    return _choice(tokenizer, load_topics(), options, "Word: {text}\nTopic:", tuple(TOPICS.values()), 20)


def hamlet(tokenizer: Any, options: Options) -> Task:
    """The last fifth of the play, after training on what is before."""
    text = (data_folder() / "hamlet.txt").read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    end = len(windows) * 4 // 5
    return Text(windows[:end][: options.train_rows], windows[end:][: options.held_out])


TASKS: dict[str, Callable[[Any, Options], Task]] = {
    "A": reviews(PROMPT, VERBALISERS),
    "B": reviews("Review: {text}\nSentiment:", (" negative", " positive")),
    "topics": topics,
    "hamlet": hamlet,
}


def _choice(
    tokenizer: Any,
    parts: dict[str, list[Sentence]],
    options: Options,
    prompt: str,
    answers: tuple[str, ...],
    tokens: int,
) -> Task:
    train: Sequence[Sentence] = parts["train"]
    if options.train_rows is not None:
        train = balanced(train, options.train_rows, seed=5)
    return Choice(tokenizer, train, balanced(parts["test"], options.held_out, seed=0), prompt, answers, tokens)


def _of_windows(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
