"""Rows of text as batches of a program: prompts and answers, tokens, labels, splitting, order.

    rows = read_rows("messages.csv")                                      CSV, TSV, JSON lines, text, a datasets folder
    texts = samples(rows, PromptConfig(template="Message: {text}\\nIntent:", answer_column="intent"))
    training, validation = split(texts, 0.1, seed=0)
    data = TextData.encode(training, program.manifest, tokenizer, config)
    session.finetune(data.batches(seed=0), steps=100, ...)

A batch is a function of the seed and of the step's number alone, so a run that was interrupted goes on with the batch
that it would have had.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.text.answers import AnswerRows, ClassRows, Encoded
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.chat_rows import ChatRows
from mobizo_compiler.text.prompts import PromptConfig, Sample
from mobizo_compiler.text.speller import Speller

IGNORED = -100
POOL = 50  # batches whose rows are sorted by length together


@dataclasses.dataclass(frozen=True)
class TextData:
    """Samples as batches of one program.

    Args:
        encoded: The samples.
        layout: The batches that the program takes.
        choices: The answers, where they are a closed set; the names of the classes.
        spelled: Tokens of each choice, for programs that label tokens.
        padding: Token that fills a row.
        config: As given, with what was found out: other samples are encoded alike with it.
        left: Whether rows are filled from the left.
        assumed: Whether nobody named the classes, so that they are in the order of the alphabet.
    """

    encoded: tuple[Encoded, ...]
    layout: BatchShape
    choices: tuple[str, ...] | None
    spelled: tuple[tuple[int, ...], ...]
    padding: int
    config: PromptConfig
    left: bool = False
    assumed: bool = False

    @classmethod
    def encode(cls, texts: Sequence[Sample], manifest: Manifest, tokenizer: Any, config: PromptConfig) -> TextData:
        """Samples as tokens that fit the program.

        Raises:
            DataError: A sample cannot be made to fit; the message names its line.
        """
        layout, speller = BatchShape.of(manifest), Speller(tokenizer)
        make = ChatRows if config.chat is not None else ClassRows if layout.classes is not None else AnswerRows
        maker = make(texts, layout, speller, config)
        encoded = tuple(maker.row(sample) for sample in texts)
        for row, sample in zip(encoded, texts, strict=True):
            if max(row.ids) >= layout.vocabulary:
                raise DataError(
                    f"token {max(row.ids)} is outside of the model's vocabulary of {layout.vocabulary}",
                    where=sample.where,
                    hint="the tokenizer is not that of the model: --tokenizer names another",
                )
        nobody = layout.classes is not None and layout.names is None and config.choices is None
        assumed = nobody and not all(name.isdecimal() for name in maker.choices or ())
        found = dataclasses.replace(config, choices=maker.choices, end_answers=maker.ends)
        if isinstance(maker, ChatRows):
            found = dataclasses.replace(found, chat_template=maker.template.text)
        filler, left = filling(layout, speller), _left(layout, speller)
        return cls(encoded, layout, maker.choices, maker.spelled, filler, found, left, assumed)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def cut(self) -> int:
        """How many prompts were too long."""
        return sum(row.cut > 0 for row in self.encoded)

    @property
    def digest(self) -> str:
        """SHA-256 of what the program gets to see."""
        parts = [[*filter(None, (row.types, row.spans, row.options))] for row in self.encoded]
        rows = [[row.ids, row.labelled, row.choice, *more] for row, more in zip(self.encoded, parts, strict=True)]
        return hashlib.sha256(json.dumps([rows, self.choices]).encode()).hexdigest()

    def batches(
        self, seed: int, balanced: bool = False, group_by_length: bool = False
    ) -> Callable[[int], tuple[dict[str, Tensor], Tensor]]:
        """The batch of every step: all rows once, in an order of their own for each epoch, then all of them again.

        Args:
            seed: Of the order.
            balanced: Take the answers in turns, so that each is as often there as the others; rows of rare answers come
                again sooner.
            group_by_length: Let the rows of a batch have similar lengths, for programs that take any length: a batch is
                as long as its longest row.

        Raises:
            ConfigError: Balanced, and the answers are no closed set; or balanced and grouped both.
        """
        if balanced and group_by_length:
            raise ConfigError("balanced and group_by_length are both given", hint="rows have one order: choose one")
        groups: list[list[int]] = [list(range(len(self.encoded)))]
        if balanced:
            if self.choices is None:
                raise ConfigError(
                    "balanced batches need answers that are a closed set", hint="name them with --choices"
                )
            by_choice: list[list[int]] = [[] for _ in self.choices]
            for place, row in enumerate(self.encoded):
                if row.choice is not None:
                    by_choice[row.choice].append(place)
            groups = [group for group in by_choice if group]

        @functools.lru_cache(maxsize=2 * len(groups))
        def order(group: int, epoch: int) -> list[int]:
            name = f"{seed} {epoch}" if len(groups) == 1 else f"{seed} {epoch} {group}"
            generator = random.Random(name)
            drawn = generator.sample(groups[group], len(groups[group]))
            if not group_by_length:
                return drawn
            lengths = [len(row.ids) for row in self.encoded]
            return _grouped(drawn, lengths, self.layout.rows, -epoch * len(drawn) % self.layout.rows, generator)

        def row_at(place: int) -> Encoded:
            turn, group = divmod(place, len(groups))
            epoch, index = divmod(turn, len(groups[group]))
            return self.encoded[order(group, epoch)[index]]

        def batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
            return self._batch([row_at(n) for n in range(step * self.layout.rows, (step + 1) * self.layout.rows)])

        return batch

    def batch_of(self, numbers: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and labels of the rows with these numbers, as long as the longest of all rows.

        So a row is as it is whatever rows are beside it.
        """
        return self._batch([self.encoded[number] for number in numbers], self._longest)

    @functools.cached_property
    def _longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.encoded)

    def _batch(self, rows: Sequence[Encoded], longest: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        ids, types = [row.ids for row in rows], [row.types for row in rows]
        return self.inputs(ids, types, longest), self.labels(rows, longest)

    def inputs(
        self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None, longest: int = 0
    ) -> dict[str, Tensor]:
        """Token ids, and their types where not all are 0, as inputs: filled to the longest row, or the fixed length."""
        length = max(self.layout.shortest, longest, *map(len, rows))
        ids = torch.full((len(rows), length), self.padding)
        mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
        for place, row in enumerate(rows):
            span = slice(length - len(row), length) if self.left else slice(0, len(row))
            ids[place, span] = torch.tensor(row)
            mask[place, span] = 1
            if types is not None and types[place]:
                kinds[place, span] = torch.tensor(types[place])
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        return {name: made[name] for name in self.layout.inputs}

    def labels(self, rows: Sequence[Encoded], longest: int = 0) -> Tensor:
        """Labels of rows: their classes [rows], or the tokens of their answers, [rows, tokens]."""
        if self.layout.classes is not None:
            return torch.tensor([row.choice for row in rows])
        length = max(self.layout.shortest, longest, *(len(row.ids) for row in rows))
        labels = torch.full((len(rows), length), IGNORED)
        for place, row in enumerate(rows):
            labels[place, row.places] = torch.tensor(row.ids)[row.places]
        return labels


def _grouped(order: list[int], lengths: Sequence[int], rows: int, first: int, generator: random.Random) -> list[int]:
    """An order in which the rows of a batch have similar lengths.

    Args:
        order: Rows in a random order.
        lengths: Tokens of every row.
        rows: Rows of a batch.
        first: Rows that end a batch of the epoch before.
        generator: Of the order of batches.

    >>> _grouped([3, 0, 2, 1], [1, 9, 2, 8], 2, 0, random.Random(0)) in ([1, 3, 2, 0], [2, 0, 1, 3])
    True
    """
    batches = []
    for begin in range(first, len(order), rows * POOL):  # of a pool, so that an epoch is no walk from short to long
        pool = sorted(order[begin : begin + rows * POOL], key=lambda row: -lengths[row])
        batches += [pool[place : place + rows] for place in range(0, len(pool), rows)]
    whole = [batch for batch in batches if len(batch) == rows]
    generator.shuffle(whole)
    rest = [row for batch in batches if len(batch) < rows for row in batch]
    return [*order[:first], *(row for batch in whole for row in batch), *rest]


def filling(layout: BatchShape, speller: Speller) -> int:
    """The token that fills rows: what the model takes for padding, else the tokenizer's, if the model has such a token.

    Where neither is, any will do, because padding is masked.
    """
    candidates = [layout.padding, speller.padding, speller.end]
    return next((token for token in candidates if token is not None and token < layout.vocabulary), 0)


def _left(layout: BatchShape, speller: Speller) -> bool:
    """Whether padding goes to the left: where the model classifies rows by a token that the tokenizer puts last."""
    tokenizer = speller.tokenizer
    last = getattr(tokenizer, "cls_token_id", None) in speller.back and tokenizer.cls_token_id is not None
    return layout.classes is not None and last and getattr(tokenizer, "padding_side", "right") == "left"
