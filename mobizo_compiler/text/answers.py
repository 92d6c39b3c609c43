"""Samples as rows of tokens: those whose answer is a class, and those whose answer follows the prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mobizo_compiler.errors import DataError
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.prompts import Piece, PromptConfig, Sample, found_choices
from mobizo_compiler.text.speller import Frame, Speller, shortened


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as tokens.

    Args:
        ids: The whole row without padding.
        labelled: How many tokens are labelled; 0 where the row has a class.
        choice: Number of its choice or class; None if answers are not a closed set.
        cut: How many tokens of the prompt had to go.
        types: Token types of the row; empty if all are 0.
        spans: First and last of each run of labelled tokens, the last one not included; empty if the last tokens are.
        options: Tokens of the answers that are the row's own to choose from; `choice` is then the number of one.
    """

    ids: tuple[int, ...]
    labelled: int
    choice: int | None
    cut: int
    types: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    options: tuple[tuple[int, ...], ...] = ()

    @property
    def places(self) -> list[int]:
        """Where the labelled tokens are.

        >>> Encoded((5, 6, 7, 8), 2, None, 0).places, Encoded((5, 6, 7, 8), 2, None, 0, (), ((1, 2), (3, 4))).places
        ([2, 3], [1, 3])
        """
        spans = self.spans or ((len(self.ids) - self.labelled, len(self.ids)),)
        return [place for first, end in spans for place in range(first, end)]


def class_names(texts: Sequence[Sample], layout: BatchShape, config: PromptConfig) -> tuple[str, ...]:
    """The classes in the order of the model: as given, as the model names them, or as the answers look.

    Raises:
        DataError: The answers are not those of the model, or do not say which class they are.
    """
    classes = layout.classes or 0
    answers = {sample.answer: sample.where for sample in reversed(texts)}
    hint = "--choices names the classes in the order of the model"
    if config.choices is not None:
        names = config.choices
    elif layout.names is not None:
        names = layout.names
        if others := sorted(set(answers) - set(names)):
            raise DataError(
                f"the answer {others[0]!r} is none of the model's classes {list(names)}",
                where=answers[others[0]],
                hint=f"{hint}: one name of the data for each of them",
            )
    elif all(answer.isdecimal() for answer in answers):
        numbers = sorted(map(int, answers))
        if numbers and (numbers[0] != 0 or numbers[-1] >= classes):
            raise DataError(
                f"answers are the numbers {numbers[0]} to {numbers[-1]}; classes have the numbers 0 to {classes - 1}",
                hint=f"{hint}: --choices {','.join(str(numbers[0] + i) for i in range(classes))}",
            )
        names = tuple(map(str, range(classes)))
    else:
        names = tuple(sorted(answers))
    if len(names) != classes:
        raise DataError(f"the program has {classes} classes, the answers are {list(names)}", hint=hint)
    return names


class ClassRows:
    """Rows whose answer is a class.

    Raises:
        DataError: The answers are no classes of the program, or padding is not what the model takes for it.
    """

    spelled: tuple[tuple[int, ...], ...] = ()
    ends = False

    def __init__(self, texts: Sequence[Sample], layout: BatchShape, speller: Speller, config: PromptConfig) -> None:
        self.choices: tuple[str, ...] | None = class_names(texts, layout, config)
        self._numbers = {name: number for number, name in enumerate(self.choices)}
        self._layout, self._speller, self._config = layout, speller, config
        if layout.padding is not None and speller.padding not in (None, layout.padding):
            raise DataError(
                f"the tokenizer pads with token {speller.padding}, the model takes token {layout.padding} for padding "
                "and looks for the end of a row by it",
                hint="save the tokenizer with pad_token="
                f"{speller.tokenizer.convert_ids_to_tokens(layout.padding)!r}, or the model with "
                f"config.pad_token_id={speller.padding} and compile it again",
            )
        self._typed = "token_type_ids" in layout.inputs
        frame = speller.pair if config.pair_template is not None else speller.single
        self._frame: Frame = frame
        two = config.pair_template is not None
        separator = getattr(speller.tokenizer, "sep_token", None)
        literals = [piece.text for piece in config.pieces(dict.fromkeys(config.columns, "")) if piece.of_template]
        joined = separator and any(separator in text for text in literals) and any(map(any, speller.pair.types))
        if joined or (two and not self._typed and any(map(any, frame.types))):
            raise DataError(
                f"the template joins two texts by {separator}, so that both would have the same token type"
                if joined
                else "the model takes pairs by token_type_ids, which the program does not take",
                hint='--template "{first}" --pair-template "{second}"'
                if joined
                else "compile again with --task sequence-classification",
            )

    def row(self, sample: Sample) -> Encoded:
        """The row of a sample."""
        if sample.answer not in self._numbers:
            raise DataError(f"the answer {sample.answer!r} is none of {list(self.choices or ())}", where=sample.where)
        frame = self._frame
        room = self._layout.tokens - len(frame.front) - len(frame.between) - len(frame.back)
        if room < 1:
            raise DataError(
                f"a row of {self._layout.tokens} tokens has no room for a text", hint="compile with more --tokens"
            )
        first, second, cut = self._texts(sample, room)
        ids = (*frame.front, *first, *frame.between, *second, *frame.back)
        if not ids:
            raise DataError("the prompt is empty", where=sample.where)
        types = frame.typed(len(first), len(second)) if self._typed else ()
        return Encoded(ids, 0, self._numbers[sample.answer], cut, types)

    def _texts(self, sample: Sample, room: int) -> tuple[list[int], list[int], int]:
        """The tokens of one text, or of two; of two, the longer one is cut first."""
        config, speller = self._config, self._speller
        if config.pair_template is None:
            prompt, cut = fitted(sample, config, speller, room)
            return prompt, [], cut
        both = [speller.spell(config.pieces(sample.cells)), speller.spell(config.pair_pieces(sample.cells))]
        lengths = [len(ids) for ids in both]
        over = max(0, sum(lengths) - room)
        for _ in range(over):
            lengths[int(lengths[1] > lengths[0])] -= 1
        front = config.cut == "front"
        kept = [ids[len(ids) - n :] if front else ids[:n] for ids, n in zip(both, lengths, strict=True)]
        return kept[0], kept[1], over


class AnswerRows:
    """Rows whose answer is made of tokens behind the prompt.

    Raises:
        DataError: The choices are not those that the program was compiled for.
    """

    def __init__(self, texts: Sequence[Sample], layout: BatchShape, speller: Speller, config: PromptConfig) -> None:
        if config.pair_template is not None:
            raise DataError("a second text is for programs that classify rows", hint="put both into --template")
        self._layout, self._speller, self._config = layout, speller, config
        self._words, self.choices = _closed_set(texts, layout, speller, config)
        if layout.choices is not None and (own := [sample for sample in texts if sample.options]):
            raise DataError(
                "the row has answers of its own; the program was compiled for a choice between words that all share",
                where=own[0].where,
                hint="compile with --loss causal-lm",
            )
        few = layout.max_labels is not None or self.choices is not None
        self.ends = config.end_answers if config.end_answers is not None else not few and speller.end is not None
        if self.ends and speller.end is None:
            raise DataError("the tokenizer has no end-of-text token", hint="--no-end-answers")
        self._ending = [speller.end] if self.ends and speller.end is not None else []
        prompt = config.pieces(dict.fromkeys(config.columns, "x"))
        self.spelled = tuple(tuple(self._answer(prompt, choice)) for choice in self.choices or ())
        self._numbers = {name: number for number, name in enumerate(self.choices or ())}
        if layout.choices is not None and set(self.spelled) != {(token,) for token in layout.choices}:
            known = [speller.tokenizer.decode([token]) for token in layout.choices]
            spelled = [speller.tokenizer.convert_ids_to_tokens(list(ids)) for ids in self.spelled]
            raise DataError(
                f"the choices {list(self.choices or ())} are the tokens {spelled} behind this prompt; the program was "
                f"compiled for {known}",
                hint="compile with --loss choice, --loss-choices and --template as the answers follow the prompt; "
                "--label-words name=word gives answers other words",
            )

    def _answer(self, prompt: Sequence[Piece], answer: str, ids: Sequence[int] | None = None) -> list[int]:
        return self._speller.answer(prompt, self._words.get(answer, answer), ids) + self._ending

    def row(self, sample: Sample) -> Encoded:
        """The row of a sample."""
        layout, speller = self._layout, self._speller
        pieces = self._config.pieces(sample.cells)
        whole = speller.spell(speller.prompt(pieces))
        answer = self._answer(pieces, sample.answer, whole)
        options = tuple(tuple(self._answer(pieces, option, whole)) for option in sample.options)
        choice = sample.options.index(sample.answer) if options else self._numbers.get(sample.answer)
        if layout.choices is not None and choice is None:
            raise DataError(f"the answer {sample.answer!r} is none of {list(self.choices or ())}", where=sample.where)
        if not options and choice is not None and tuple(answer) != self.spelled[choice]:
            raise DataError(
                f"the answer {sample.answer!r} begins with another token behind this prompt than behind others",
                where=sample.where,
                hint="let the template end with text of its own: --template '{text}:'",
            )
        if layout.max_labels is not None and len(answer) > layout.max_labels:
            raise DataError(
                f"the answer {sample.answer!r} has {len(answer)} tokens; the program was compiled for at most "
                f"{layout.max_labels} in a row",
                where=sample.where,
                hint="compile with a larger --loss-max-labels, or give the answers shorter words: --label-words",
            )
        longest = max(len(answer), *map(len, options), 0)  # all options follow the same prompt
        room = layout.tokens - len(speller.front) - longest
        if room < 1:
            raise DataError(
                f"the answer has {longest} tokens, and a row of the program {layout.tokens}",
                where=sample.where,
                hint="compile with more --tokens",
            )
        prompt, cut = fitted(sample, self._config, speller, room, whole)
        if not prompt and not speller.front:
            raise DataError("the prompt is empty", where=sample.where)
        return Encoded((*speller.front, *prompt, *answer), len(answer), choice, cut, options=options)


def _closed_set(
    texts: Sequence[Sample], layout: BatchShape, speller: Speller, config: PromptConfig
) -> tuple[Mapping[str, str], tuple[str, ...] | None]:
    """Words of answers, and the answers where they are a closed set: as given, as compiled for, or as found."""
    words = config.words
    if any(sample.options or sample.references for sample in texts):
        return words, None
    if layout.choices is not None and layout.names is not None and not words:
        tokens = dict(zip(layout.names, layout.choices, strict=True))
        words = {name: speller.tokenizer.decode([token]).strip() for name, token in tokens.items()}
    if config.choices is not None:
        return words, config.choices
    if words:
        return words, tuple(words)
    if layout.choices is not None:
        return words, tuple(speller.tokenizer.decode([token]).strip() for token in layout.choices)
    return words, found_choices(texts)


def fitted(
    sample: Sample, config: PromptConfig, speller: Speller, room: int, known: list[int] | None = None
) -> tuple[list[int], int]:
    """The tokens of a prompt, cut where they are more than there is room for, and how many were cut.

    Args:
        sample: The row.
        config: How it becomes a prompt, and what is cut.
        speller: The tokenizer's.
        room: Most tokens.
        known: Tokens of the whole prompt, if they are known.

    Raises:
        DataError: The template alone is too long.
    """

    def spelled(cells: Mapping[str, str]) -> list[int]:
        return speller.spell(speller.prompt(config.pieces(cells)))

    prompt = spelled(sample.cells) if known is None else known
    over = len(prompt) - room
    if over <= 0:
        return prompt, 0
    if config.cut == "front":
        return prompt[over:], over
    cells = shortened(sample.cells, lambda some: len(spelled(some)), room, sample.where, speller)
    fits = spelled(cells)
    return fits, max(1, len(prompt) - len(fits))
