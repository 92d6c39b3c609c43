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
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.options import JsonConfig
from mobizo_compiler.text.rows import Row

IGNORED = -100
MOST_CHOICES = 10  # answers that are found in the data are a closed set up to here


@dataclasses.dataclass(frozen=True)
class PromptConfig(JsonConfig):
    r"""How a row becomes a prompt and an answer.

    Between the two goes a space, unless the prompt ends in white space or the answer begins with it.

    Args:
        template: Text of the prompt, with columns in braces: `"Review: {text}\nSentiment:"`.
        prompt_column: Column of the prompt, where there is no template.
        answer_column: Column of the answer.
        choices: All answers that there are. The choice between them is then what is measured.
        cut: What goes where a prompt is too long: "front", its first tokens, or "longest", the end of the longest of
            its columns, so that the words of the template stay.
        end_answers: Whether the end-of-text token is part of an answer, so that generation learns to stop. If not
            given, it is, unless answers are a closed set or the loss takes few labels.

    Raises:
        ConfigError: A field is not allowed.
    """

    template: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    choices: tuple[str, ...] | None = None
    cut: Literal["front", "longest"] = "front"
    end_answers: bool | None = None

    def __post_init__(self) -> None:
        if self.cut not in ("front", "longest"):
            raise ConfigError(f"cut is {self.cut!r}", hint='use "front" or "longest"')
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
            if len(set(self.choices)) < max(2, len(self.choices)) or not all(c.strip() for c in self.choices):
                raise ConfigError(f"choices are {list(self.choices)}; they must be two or more different texts")
        if not self.columns:
            raise ConfigError(f"the template {self.template!r} names no column", hint='for example "Review: {text}"')

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that make the prompt."""
        if self.template is None:
            return (self.prompt_column,)
        try:
            pieces = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ConfigError(f"the template {self.template!r} cannot be read: {error}") from None
        if odd := [field for _, field, form, conversion in pieces if field is not None and (form or conversion)]:
            raise ConfigError(f"the template has a format for column {odd[0]!r}, which text has not")
        return tuple(field for _, field, _, _ in pieces if field)

    def render(self, cells: Mapping[str, str]) -> str:
        """The prompt of a row.

        >>> PromptConfig(template="{a} and {{{b}}}:").render({"a": "x", "b": "y"})
        'x and {y}:'
        """
        if self.template is None:
            return cells[self.prompt_column]
        pieces = string.Formatter().parse(self.template)
        return "".join(literal + (cells[field] if field else "") for literal, field, _, _ in pieces)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row as it is learnt: the cells of its prompt, its answer, and where it is."""

    cells: Mapping[str, str]
    answer: str
    where: str


def samples(rows: Sequence[Row], config: PromptConfig) -> list[Sample]:
    """The samples of rows.

    Raises:
        DataError: A row lacks a column, or has an empty answer or one that is no choice.
    """
    found = []
    for row in rows:
        for column in (*config.columns, config.answer_column):
            if column not in row.cells:
                raise DataError(
                    f"there is no column {column!r}",
                    where=row.where,
                    hint=f"the columns are {', '.join(row.cells)}; --template, --prompt-column and --answer-column "
                    "choose",
                )
        answer = row.cells[config.answer_column]
        if not answer.strip():
            raise DataError("the answer is empty, so nothing of the row would be labelled", where=row.where)
        if config.choices is not None and answer not in config.choices:
            raise DataError(f"the answer {answer!r} is none of {list(config.choices)}", where=row.where)
        found.append(Sample({column: row.cells[column] for column in config.columns}, answer, row.where))
    return found


def split(texts: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples; samples with equal prompts are on one side.

    Raises:
        DataError: There are too few different prompts.
    """
    groups: dict[tuple[str, ...], list[Sample]] = {}
    for sample in texts:
        groups.setdefault(tuple(sample.cells.values()), []).append(sample)
    names = sorted(groups)
    random.Random(f"split {seed}").shuffle(names)
    wanted, held_out = max(1.0, share * len(texts)), set[tuple[str, ...]]()
    count = 0
    for name in names:
        if count >= wanted:
            break
        held_out.add(name)
        count += len(groups[name])
    training = [sample for sample in texts if tuple(sample.cells.values()) not in held_out]
    if not training:
        raise DataError(f"{len(groups)} different prompts cannot be split: none would be left to train on")
    return training, [sample for sample in texts if tuple(sample.cells.values()) in held_out]


def found_choices(texts: Sequence[Sample]) -> tuple[str, ...] | None:
    """The different answers, sorted, where they look like a closed set: at most ten, each given four times on average.

    >>> found_choices([Sample({}, answer, "") for answer in "yes no yes no no no yes no".split()])
    ('no', 'yes')
    """
    answers = sorted({sample.answer for sample in texts})
    return tuple(answers) if 2 <= len(answers) <= MOST_CHOICES and len(texts) >= 4 * len(answers) else None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The batches that a program takes.

    Args:
        rows: Rows of a batch.
        shortest: Fewest tokens of a row.
        tokens: Most tokens of a row.
        inputs: Names of the inputs.
        vocabulary: How many token ids there are.
        classes: How many classes rows have; None if tokens are labelled.
        max_labels: How many tokens of a row may be labelled; None if all may.
        choices: The only tokens that may be labels, if they are few.
    """

    rows: int
    shortest: int
    tokens: int
    inputs: tuple[str, ...]
    vocabulary: int
    classes: int | None
    max_labels: int | None
    choices: tuple[int, ...] | None

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        """What the manifest says.

        Raises:
            DataError: The program is not a language model with labels at tokens or rows.
        """
        by_name = {spec.name: spec for spec in manifest.inputs}
        ids, labels = by_name.get("input_ids"), manifest.labels
        known = {"input_ids", "attention_mask", "token_type_ids"}
        causal = ids is not None and len(labels.shape) == 2 and manifest.first_label == 1
        classes = ids is not None and len(labels.shape) == 1 and labels.dtype == "int64"
        if ids is None or len(ids.shape) != 2 or ids.high is None or by_name.keys() - known or not (causal or classes):
            raise DataError(
                f"rows of text cannot be made into inputs {list(by_name)} and labels "
                f"[{', '.join(map(str, labels.shape))}] for {manifest.loss}",
                hint="the program must take input_ids [rows, tokens] and a loss of causal language models or of "
                "sequence classification; others train with Session.finetune",
            )
        sizes = {size.name: (size.low, size.high) for size in manifest.sizes}
        (_, rows), (shortest, tokens) = (sizes[s] if isinstance(s, str) else (s, s) for s in ids.shape)
        return cls(
            rows,
            shortest,
            tokens,
            tuple(by_name),
            ids.high + 1,
            labels.high + 1 if classes and labels.high is not None else None,
            manifest.max_labels,
            labels.choices,
        )


class Speller:
    """Texts as token ids, with the special tokens that the tokenizer puts around a text kept apart.

    Args:
        tokenizer: A tokenizer of transformers.

    `front` and `back` are the tokens before and after a text; `padding` is what fills a row.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        around = list(tokenizer("").input_ids)
        starts = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
        self.front = [i for i in around[:1] if i in starts]
        self.back = around[len(self.front) :]
        self.end: int | None = tokenizer.eos_token_id
        padding = tokenizer.pad_token_id
        self.padding = int(padding if padding is not None else self.end or 0)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def answer(self, prompt: str, answer: str) -> list[int]:
        """The tokens of an answer behind a prompt."""
        apart = not prompt or prompt[-1].isspace() or answer[0].isspace()
        return self.ids(answer if apart else f" {answer}")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as tokens.

    Args:
        ids: The whole row without padding.
        labelled: How many of the last tokens are the answer; 0 where the row has a class.
        choice: Number of its choice or class; None if answers are not a closed set.
        cut: How many tokens of the prompt had to go.
    """

    ids: tuple[int, ...]
    labelled: int
    choice: int | None
    cut: int


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
    """

    encoded: tuple[Encoded, ...]
    layout: Layout
    choices: tuple[str, ...] | None
    spelled: tuple[tuple[int, ...], ...]
    padding: int
    config: PromptConfig

    @classmethod
    def encode(cls, texts: Sequence[Sample], manifest: Manifest, tokenizer: Any, config: PromptConfig) -> TextData:
        """Samples as tokens that fit the program.

        Raises:
            DataError: A sample cannot be made to fit; the message names its line.
        """
        layout, speller = Layout.of(manifest), Speller(tokenizer)
        make = _ClassRows if layout.classes is not None else _AnswerRows
        maker = make(layout, speller, config, _closed_set(texts, layout, speller, config))
        encoded = tuple(maker.row(sample) for sample in texts)
        for row, sample in zip(encoded, texts, strict=True):
            if max(row.ids) >= layout.vocabulary:
                raise DataError(
                    f"token {max(row.ids)} is outside of the model's vocabulary of {layout.vocabulary}",
                    where=sample.where,
                    hint="the tokenizer is not that of the model: --tokenizer names another",
                )
        found = dataclasses.replace(config, choices=maker.choices, end_answers=maker.ends)
        return cls(encoded, layout, maker.choices, maker.spelled, speller.padding, found)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def cut(self) -> int:
        """How many prompts were too long."""
        return sum(row.cut > 0 for row in self.encoded)

    @property
    def digest(self) -> str:
        """SHA-256 of what the program gets to see."""
        rows = [[row.ids, row.labelled, row.choice] for row in self.encoded]
        return hashlib.sha256(json.dumps([rows, self.choices]).encode()).hexdigest()

    def batches(self, seed: int, balanced: bool = False) -> Callable[[int], tuple[dict[str, Tensor], Tensor]]:
        """The batch of every step: all rows once, in an order of their own for each epoch, then all of them again.

        Args:
            seed: Of the order.
            balanced: Take the answers in turns, so that each is as often there as the others; rows of rare answers come
                again sooner.

        Raises:
            ConfigError: Balanced, and the answers are no closed set.
        """
        groups: list[list[int]] = [list(range(len(self.encoded)))]
        if balanced:
            if self.choices is None:
                raise ConfigError(
                    "balanced batches need answers that are a closed set", hint="name them with --choices"
                )
            by_choice = [
                [place for place, row in enumerate(self.encoded) if row.choice == choice]
                for choice in range(len(self.choices))
            ]
            groups = [group for group in by_choice if group]

        @functools.lru_cache(maxsize=2 * len(groups))
        def order(group: int, epoch: int) -> list[int]:
            name = f"{seed} {epoch}" if len(groups) == 1 else f"{seed} {epoch} {group}"
            return random.Random(name).sample(groups[group], len(groups[group]))

        def row(place: int) -> Encoded:
            turn, group = divmod(place, len(groups))
            epoch, index = divmod(turn, len(groups[group]))
            return self.encoded[order(group, epoch)[index]]

        def batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
            rows = [row(place) for place in range(step * self.layout.rows, (step + 1) * self.layout.rows)]
            return self.inputs([row.ids for row in rows]), self.labels(rows)

        return batch

    def inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids as inputs: padding on the right, to the longest row where the program takes several lengths."""
        length = max(self.layout.shortest, *map(len, rows))
        ids = torch.full((len(rows), length), self.padding)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {name: made[name] for name in self.layout.inputs}

    def labels(self, rows: Sequence[Encoded]) -> Tensor:
        """Labels of rows: their classes [rows], or the tokens of their answers, [rows, tokens]."""
        if self.layout.classes is not None:
            return torch.tensor([row.choice for row in rows])
        length = max(self.layout.shortest, *(len(row.ids) for row in rows))
        labels = torch.full((len(rows), length), IGNORED)
        for place, row in enumerate(rows):
            labels[place, len(row.ids) - row.labelled : len(row.ids)] = torch.tensor(row.ids[-row.labelled :])
        return labels


def _closed_set(
    texts: Sequence[Sample], layout: Layout, speller: Speller, config: PromptConfig
) -> tuple[str, ...] | None:
    """The answers, where they are a closed set: as given, as the program was compiled for, or as found."""
    if config.choices is not None:
        return config.choices
    if layout.choices is not None:
        return tuple(speller.tokenizer.decode([token]).strip() for token in layout.choices)
    if layout.classes is not None:
        answers = {sample.answer for sample in texts}
        if all(answer.isdecimal() for answer in answers):
            return tuple(map(str, range(layout.classes)))
        return tuple(sorted(answers))
    return found_choices(texts)


class _ClassRows:
    """Rows whose answer is a class."""

    spelled: tuple[tuple[int, ...], ...] = ()
    ends = False

    def __init__(self, layout: Layout, speller: Speller, config: PromptConfig, choices: tuple[str, ...] | None) -> None:
        self.choices = choices or ()
        self._layout, self._speller, self._config = layout, speller, config
        if len(self.choices) != layout.classes:
            raise DataError(
                f"the program has {layout.classes} classes, the answers are {list(self.choices)}",
                hint="--choices names the classes in their order",
            )

    def row(self, sample: Sample) -> Encoded:
        if sample.answer not in self.choices:
            raise DataError(f"the answer {sample.answer!r} is none of {list(self.choices)}", where=sample.where)
        speller = self._speller
        room = self._layout.tokens - len(speller.front) - len(speller.back)
        prompt, cut = _fitting(sample, self._config, speller, room)
        ids = (*speller.front, *prompt, *speller.back)
        if not ids:
            raise DataError("the prompt is empty", where=sample.where)
        return Encoded(ids, 0, self.choices.index(sample.answer), cut)


class _AnswerRows:
    """Rows whose answer is made of tokens behind the prompt."""

    def __init__(self, layout: Layout, speller: Speller, config: PromptConfig, choices: tuple[str, ...] | None) -> None:
        self.choices = choices
        self._layout, self._speller, self._config = layout, speller, config
        few = layout.max_labels is not None or choices is not None
        self.ends = config.end_answers if config.end_answers is not None else not few and speller.end is not None
        if self.ends and speller.end is None:
            raise DataError("the tokenizer has no end-of-text token", hint="--no-end-answers")
        self._ending = [speller.end] if self.ends and speller.end is not None else []
        prompt = config.render(dict.fromkeys(config.columns, "x"))
        self.spelled = tuple(tuple(self._answer(prompt, choice)) for choice in choices or ())
        if layout.choices is not None and set(self.spelled) != {(token,) for token in layout.choices}:
            known = [speller.tokenizer.decode([token]) for token in layout.choices]
            spelled = [speller.tokenizer.convert_ids_to_tokens(list(ids)) for ids in self.spelled]
            raise DataError(
                f"the choices {list(choices or ())} are the tokens {spelled} behind this prompt; the program was "
                f"compiled for {known}",
                hint="compile with --loss choice --loss-choices as the answers follow the prompt",
            )

    def _answer(self, prompt: str, answer: str) -> list[int]:
        return self._speller.answer(prompt, answer) + self._ending

    def row(self, sample: Sample) -> Encoded:
        layout, speller = self._layout, self._speller
        whole = self._config.render(sample.cells)
        answer = self._answer(whole, sample.answer)
        if layout.choices is not None and (len(answer) > 1 or answer[0] not in layout.choices):
            raise DataError(f"the answer {sample.answer!r} is none of {list(self.choices or ())}", where=sample.where)
        if layout.max_labels is not None and len(answer) > layout.max_labels:
            raise DataError(
                f"the answer {sample.answer!r} has {len(answer)} tokens; the program was compiled for at most "
                f"{layout.max_labels} in a row",
                where=sample.where,
                hint="compile with a larger --loss-max-labels",
            )
        room = layout.tokens - len(speller.front) - len(answer)
        if room < 1:
            raise DataError(
                f"the answer has {len(answer)} tokens, and a row of the program {layout.tokens}",
                where=sample.where,
                hint="compile with more --tokens",
            )
        prompt, cut = _fitting(sample, self._config, speller, room)
        if not prompt and not speller.front:
            raise DataError("the prompt is empty", where=sample.where)
        choice = self.choices.index(sample.answer) if self.choices and sample.answer in self.choices else None
        return Encoded((*speller.front, *prompt, *answer), len(answer), choice, cut)


def _fitting(sample: Sample, config: PromptConfig, speller: Speller, room: int) -> tuple[list[int], int]:
    """The tokens of a prompt, cut where they are more than there is room for, and how many were cut."""
    prompt = speller.ids(config.render(sample.cells))
    over = len(prompt) - room
    if over <= 0:
        return prompt, 0
    if config.cut == "front":
        return prompt[over:], over
    cells, before = dict(sample.cells), len(prompt)
    while len(prompt) > room:  # what is decoded and spelled again may have another number of tokens
        lengths = {column: len(speller.ids(text)) for column, text in cells.items()}
        longest = max(lengths, key=lambda column: lengths[column])
        kept = lengths[longest] - (len(prompt) - room)
        if lengths[longest] == 0:
            raise DataError(
                f"the template alone is longer than the {room} tokens that there is room for",
                where=sample.where,
                hint="compile with more --tokens, or shorten the template",
            )
        cells[longest] = speller.tokenizer.decode(speller.ids(cells[longest])[: max(0, kept)])
        prompt = speller.ids(config.render(cells))
    return prompt, before - len(prompt)
