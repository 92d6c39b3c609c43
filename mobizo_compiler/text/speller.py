"""Texts as token ids: the same for training, evaluation and generation, and as the tokenizer itself spells them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mobizo_compiler.errors import DataError
from mobizo_compiler.text.prompts import Piece

_PROBES = ("a", "the", "1", "x")


def one_of(texts: Iterable[str]) -> str:
    """A pattern that matches any of the texts, the longest that fits; nothing where there is none.

    >>> one_of(["<s", "<s>", " "])
    '<s>|<s'
    """
    return "|".join(sorted((re.escape(text) for text in texts if text.strip()), key=len, reverse=True)) or r"(?!)"


class SpecialTokens:
    """The tokens of a tokenizer that no text should become: a text may spell them, and is text then.

    `pattern` matches them.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = {i: t for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
        self.pattern = re.compile(one_of({*tokenizer.all_special_tokens, *(t.content for t in added.values())}))
        self._ids = {*added, *tokenizer.all_special_ids}
        self._unknown = tokenizer.unk_token_id
        self._tokenizer = tokenizer

    def plain(self, text: str) -> list[int]:
        """The tokens of a text, none of them special.

        Tokenizers of the kind Unigram find special tokens among the words of their model: then the text is cut.
        """
        ids = self._split(text)
        if not (self._ids - {self._unknown}).intersection(ids):
            return ids
        cuts = [0, *(found.start() + 1 for found in self.pattern.finditer(text)), len(text)]
        return [token for first, last in itertools.pairwise(cuts) for token in self._split(text[first:last])]

    def spelled(self, text: str, said: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The tokens of a text, and where each begins: as the tokenizer has them, but for special ones that are said.

        Args:
            text: The text.
            said: First and last character of what is text, although it spells a special token.
        """
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, begins = list[int](), list[int]()
        for token, (first, last) in zip(found.input_ids, found.offset_mapping, strict=True):
            meant = token not in self._ids or not any(first < b and a < last for a, b in said)
            spelled = [token] if meant else self.plain(text[first:last])
            ids += spelled
            begins += [first] * len(spelled)
        return ids, begins

    def _split(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around one text, or around two.

    Args:
        front: Tokens before the first text.
        between: Tokens between two texts; none for one.
        back: Tokens at the end.
        types: Token types of front, first text, between, second text and back; empty if the tokenizer has none.
    """

    front: tuple[int, ...]
    between: tuple[int, ...]
    back: tuple[int, ...]
    types: tuple[tuple[int, ...], ...]

    def typed(self, first: int, second: int = 0) -> tuple[int, ...]:
        """Token types of a row whose texts have so many tokens; empty if all are 0."""
        if not any(any(part) for part in self.types):
            return ()
        front, one, between, two, back = self.types
        return (*front, *one[:1] * first, *between, *two[:1] * second, *back)


class Speller:
    """Texts as token ids, with the special tokens that the tokenizer puts around a text kept apart.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        DataError: What the tokenizer puts around a text cannot be told from the text.

    `front` and `back` are the tokens before and after a text; `end` ends a text; `padding` is what the tokenizer fills
    rows with, None if it does not say.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._special = tokenizer, SpecialTokens(tokenizer)
        found = (probe for probe in _PROBES if self.ids(probe))
        self._probe = next(found, _PROBES[0])
        self.single = frame = self._frame(None)
        self.front, self.back = list(frame.front), list(frame.back)
        self.end: int | None = tokenizer.eos_token_id
        self.padding: int | None = tokenizer.pad_token_id

    @functools.cached_property
    def pair(self) -> Frame:
        """What goes around two texts."""
        return self._frame(self._probe)

    def ids(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text alone.

        Args:
            text: The text.
            special: Whether text that spells a special token is that token.
        """
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if special else self._special.plain(text)

    def spell(self, pieces: Sequence[Piece]) -> list[int]:
        """The tokens of a prompt: of its whole text, with special tokens where the template has them, and only there.

        Where a cell spells a special token, only that is spelled otherwise; by a tokenizer that does not say where its
        tokens are, the text between those of the template is spelled piece by piece.
        """
        text = "".join(piece.text for piece in pieces)
        spelt = [match.span() for match in self._special.pattern.finditer(text)]
        if not spelt:
            return self.ids(text)
        wanted, start = list[tuple[int, int]](), 0
        for piece in pieces:
            found = self._special.pattern.finditer(piece.text) if piece.of_template else ()
            wanted += [(start + match.start(), start + match.end()) for match in found]
            start += len(piece.text)
        if wanted == spelt:
            return self.ids(text, special=True)
        if getattr(self.tokenizer, "is_fast", False) and set(wanted) <= set(spelt):
            return self._special.spelled(text, [span for span in spelt if span not in wanted])[0]
        ids: list[int] = []
        start = 0
        for first, last in [*wanted, (len(text), len(text))]:
            ids += self.ids(text[start:first]) if first > start else []
            ids += self.ids(text[first:last], special=True) if last > first else []
            start = last
        return ids

    def prompt(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces before an answer: a space at their end belongs to the answer, as tokenizers have it."""
        if not pieces or not pieces[-1].text.endswith(" "):
            return list(pieces)
        *before, last = pieces
        return [*before, dataclasses.replace(last, text=last.text[:-1])]

    def answer(self, pieces: Sequence[Piece], answer: str, prompt: Sequence[int] | None = None) -> list[int]:
        """The tokens of an answer behind a prompt: what the whole text has beyond the prompt.

        Args:
            pieces: The prompt, as it is written.
            answer: The answer. A space goes before it unless there is white space.
            prompt: Tokens of `self.prompt(pieces)`, where they are known.

        Where the whole text begins with other tokens than the prompt alone, it is what the answer alone has.
        """
        text, before = "".join(piece.text for piece in pieces), self.prompt(pieces)
        moved = text != "".join(piece.text for piece in before)
        apart = not moved and (not text or text[-1].isspace() or answer[0].isspace())
        behind = answer if apart else f" {answer}"
        begin = list(prompt) if prompt is not None else self.spell(before)
        whole = self.spell([*before, Piece(behind, False)])
        begins_so = len(whole) > len(begin) and whole[: len(begin)] == begin
        return whole[len(begin) :] if begins_so else self.ids(behind)

    def _frame(self, second: str | None) -> Frame:
        probe = self._probe
        found = self.tokenizer(probe) if second is None else self.tokenizer(probe, second)
        ids = list(found.input_ids)
        types = list(found["token_type_ids"]) if "token_type_ids" in found else [0] * len(ids)
        ends, start = [0], 0
        for text in [probe] if second is None else [probe, second]:
            inner = self.ids(text)
            places = range(start, len(ids) - len(inner) + 1)
            place = next((i for i in places if ids[i : i + len(inner)] == inner), None)
            if place is None or not inner:
                raise DataError(
                    f"the tokenizer spells {text!r} as {ids} with and as {inner} without special tokens, so that its "
                    "special tokens cannot be told from the text"
                )
            start = place + len(inner)
            ends += [place, start]
        if second is None:
            ends += [start, start]
        parts = list(zip(ends, [*ends[1:], len(ids)], strict=True))
        spans = [tuple(ids[a:b]) for a, b in parts]
        return Frame(spans[0], spans[2], spans[4], tuple(tuple(types[a:b]) for a, b in parts))


def shortened(
    cells: Mapping[str, str], count: Callable[[Mapping[str, str]], int], room: int, where: str, speller: Speller
) -> dict[str, str]:
    """The cells of a prompt with the end of the longest one cut off, until the prompt fits.

    Args:
        cells: Text by column.
        count: How many tokens a prompt of such cells has.
        room: Most tokens.
        where: The row, for the message.
        speller: Spells a cell.

    Raises:
        DataError: The template alone is too long.
    """
    left = dict(cells)
    while count(left) > room:
        lengths = {column: len(speller.ids(text)) for column, text in left.items()}
        longest = max(lengths, key=lambda column: lengths[column])
        if not left[longest]:
            raise DataError(
                f"the template alone is longer than the {room} tokens that there is room for",
                where=where,
                hint="compile with more --tokens, or shorten the template",
            )
        text, ends = left[longest], _ends(speller, left[longest])
        fits, above = 0, len(ends)  # how many tokens of the column are known to fit, and not to fit
        while above - fits > 1:
            middle = (fits + above) // 2
            room_for = count({**left, longest: text[: ends[middle]]}) <= room
            fits, above = (middle, above) if room_for else (fits, middle)
        left[longest] = text[: ends[fits]]
    return left


def _ends(speller: Speller, text: str) -> list[int]:
    """Where a text can be cut: behind every token, but not within a character; the first place is 0, the end is none.

    A tokenizer that does not say where its tokens are has its text cut behind any character.
    """
    if not getattr(speller.tokenizer, "is_fast", False):
        return list(range(len(text)))
    offsets = speller.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    ).offset_mapping
    return sorted({0, *(end for _, end in offsets)} - {len(text)})
