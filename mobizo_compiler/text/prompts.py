"""How a row becomes a prompt and an answer, and rows become samples to learn from and to measure on."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Mapping, Sequence
from typing import Literal

from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.options import JsonConfig
from mobizo_compiler.text.conversations import ASSISTANT, FORMS, Message, chat_form, conversation
from mobizo_compiler.text.rows import Row

_PLAIN = ("template", "pair_template", "choices", "label_words")
MOST_CHOICES = 10  # answers that are found in the data are a closed set up to here


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of a prompt, and whether it is of the template: only there may it spell special tokens."""

    text: str
    of_template: bool


@dataclasses.dataclass(frozen=True)
class PromptConfig(JsonConfig):
    r"""How a row becomes a prompt and an answer.

    Between the two goes a space, unless the prompt ends in white space or the answer begins with it. The cells of a row
    are text, also where they spell a special token; the template may have special tokens.

    Args:
        template: Text of the prompt, with columns in braces: `"Review: {text}\nSentiment:"`.
        pair_template: The second text, for models that classify pairs: `--template "{premise}" --pair-template
            "{hypothesis}"`.
        prompt_column: Column of the prompt, where there is no template.
        answer_column: Column of the answer.
        choices: All answers that there are, in the order of the model's classes if it has some. The choice between them
            is then what is measured.
        label_words: What the model reads and writes in place of answers, `name=word`: "0=bad,1=good".
        cut: What goes where a prompt is too long: "front", its first tokens, or "longest", the end of the longest of
            its columns, so that the words of the template stay.
        end_answers: Whether the end-of-text token is part of an answer, so that generation learns to stop. If not
            given, it is, unless answers are a closed set or the loss takes few labels.
        chat: The form of conversations, which a chat template then writes in place of all of the above: messages,
            conversations, instruction or completion; found out from the columns if no prompt is given.
        chat_template: The template of conversations, as Jinja text (a command also takes a file of it); the tokenizer's
            if not given.

    Raises:
        ConfigError: A field is not allowed.
    """

    template: str | None = None
    pair_template: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    choices: tuple[str, ...] | None = None
    label_words: tuple[str, ...] | None = None
    cut: Literal["front", "longest"] = "front"
    end_answers: bool | None = None
    chat: str | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.chat is not None and self.chat not in FORMS:
            raise ConfigError(f"chat is {self.chat!r}", hint=f"use {', '.join(FORMS)}")
        if self.chat is not None and (plain := [name for name in _PLAIN if getattr(self, name) is not None]):
            raise ConfigError(
                f"{plain[0]} is for plain prompts, and chat for conversations", hint="leave out one of them"
            )
        if self.cut not in ("front", "longest"):
            raise ConfigError(f"cut is {self.cut!r}", hint='use "front" or "longest"')
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
            if len(set(self.choices)) < max(2, len(self.choices)) or not all(c.strip() for c in self.choices):
                raise ConfigError(f"choices are {list(self.choices)}; they must be two or more different texts")
        if self.label_words is not None:
            object.__setattr__(self, "label_words", tuple(self.label_words))
            words = read_label_words(self.label_words)
            if self.choices is not None and set(self.choices) - words.keys():
                raise ConfigError(f"choices are {list(self.choices)}, label words are for {list(words)}")
        for template in (self.template, self.pair_template):
            if template is not None and not template_columns(template):
                raise ConfigError(f"the template {template!r} names no column", hint='for example "Review: {text}"')

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that make the prompt; none where a chat template makes it."""
        if self.chat is not None:
            return ()
        first = (self.prompt_column,) if self.template is None else template_columns(self.template)
        return first if self.pair_template is None else (*first, *template_columns(self.pair_template))

    def for_rows(self, rows: Sequence[Row]) -> PromptConfig:
        """The same, for conversations where the rows hold some and nothing says how else they become prompts.

        >>> row = Row({"prompt": "1 + 1", "completion": "2"}, "here")
        >>> PromptConfig().for_rows([row]).chat, PromptConfig(template="{prompt}").for_rows([row]).chat
        ('completion', None)
        """
        plain = self.template is not None or {self.prompt_column, self.answer_column} <= rows[0].cells.keys()
        form = None if plain or self.chat is not None else chat_form(rows[0])
        return self if form is None else dataclasses.replace(self, chat=form)

    @property
    def words(self) -> dict[str, str]:
        """Word by answer, as `label_words` says."""
        return read_label_words(self.label_words or ())

    def pieces(self, cells: Mapping[str, str]) -> list[Piece]:
        """The prompt of a row, by where its text comes from."""
        return _pieces("{" + self.prompt_column + "}" if self.template is None else self.template, cells)

    def pair_pieces(self, cells: Mapping[str, str]) -> list[Piece]:
        """The second text of a row; empty where there is none."""
        return [] if self.pair_template is None else _pieces(self.pair_template, cells)

    def render(self, cells: Mapping[str, str]) -> str:
        """The prompt of a row.

        >>> PromptConfig(template="{a} and {{{b}}}:").render({"a": "x", "b": "y"})
        'x and {y}:'
        """
        return "".join(piece.text for piece in self.pieces(cells))


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names, in its order.

    Raises:
        ConfigError: It cannot be read, or has a format for a column.

    >>> template_columns("{a} and {b}")
    ('a', 'b')
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"the template {template!r} cannot be read: {error}") from None
    if odd := [field for _, field, form, conversion in pieces if field is not None and (form or conversion)]:
        raise ConfigError(f"the template has a format for column {odd[0]!r}, which text has not")
    return tuple(field for _, field, _, _ in pieces if field)


def _pieces(template: str, cells: Mapping[str, str]) -> list[Piece]:
    found = []
    for literal, field, _, _ in string.Formatter().parse(template):
        found += [Piece(literal, True)] * bool(literal)
        found += [Piece(cells[field], False)] if field else []
    return found


def read_label_words(items: Sequence[str]) -> dict[str, str]:
    """Word by answer.

    Raises:
        ConfigError: An item is not `name=word`, or two are for one answer.

    >>> read_label_words(["0=bad", "1=very good"])
    {'0': 'bad', '1': 'very good'}
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, word = (part.strip() for part in item.partition("="))
        if not (name and equals and word) or name in found or word in found.values():
            raise ConfigError(
                f"label words are {list(items)}; each must be name=word, all different", hint='"0=bad,1=good"'
            )
        found[name] = word
    return found


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row as it is learnt.

    Args:
        cells: Of its prompt, by column.
        answer: What is learnt.
        where: Where it is, for messages.
        messages: The whole of a conversation.
        options: The answers that the choice is between, where they are the row's own.
        references: All texts that answer a question rightly, where the answer is free.
    """

    cells: Mapping[str, str]
    answer: str
    where: str
    messages: tuple[Message, ...] = ()
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


def samples(rows: Sequence[Row], config: PromptConfig) -> list[Sample]:
    """The samples of rows.

    Raises:
        DataError: A row lacks a column, or has an empty answer or one that is no choice.
    """
    found = []
    if config.chat is not None:
        return [_chat_sample(row, config.chat) for row in rows]
    hint = "--template, --prompt-column and --answer-column choose"
    for row in rows:
        cells = {column: row.cell(column, hint) for column in config.columns}
        answer = row.cell(config.answer_column, hint)
        if not answer.strip():
            raise DataError("the answer is empty, so nothing of the row would be labelled", where=row.where)
        if config.choices is not None and answer not in config.choices:
            raise DataError(f"the answer {answer!r} is none of {list(config.choices)}", where=row.where)
        found.append(Sample(cells, answer, row.where))
    return found


def _chat_sample(row: Row, form: str) -> Sample:
    """A conversation; what is said before the first answer is its prompt."""
    messages = conversation(row, form)
    first = next(place for place, message in enumerate(messages) if message.role == ASSISTANT)
    asked = "\n".join(message.content for message in messages[:first])
    return Sample({form: asked}, messages[-1].content, row.where, messages)


def empty_prompts(texts: Sequence[Sample]) -> int:
    """How many samples have nothing in any column of their prompt."""
    return sum(not any(cell.strip() for cell in sample.cells.values()) for sample in texts)


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
