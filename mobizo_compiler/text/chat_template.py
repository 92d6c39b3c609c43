"""Conversations as tokens, by a tokenizer's chat template, with the tokens of the answers marked.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n[Hello!<|im_end|>]\\n

Where a template marks answers itself (`{% generation %}`), it is asked. Any other is rendered up to each answer, as if
the answer were asked for: what the whole conversation has beyond that, up to the token that ends the turn, is it.

What somebody says is text, also where it spells a special token: nobody ends a turn by writing so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mobizo_compiler.errors import DataError
from mobizo_compiler.optional import optional
from mobizo_compiler.text.conversations import ASSISTANT, Message, as_dicts
from mobizo_compiler.text.speller import SpecialTokens, one_of

Spans = tuple[tuple[int, int], ...]
_MARKS = re.compile(r"\{%-?\s*generation\b")
_OTHER = "--chat-template FILE gives another one, which may mark answers by {% generation %}"


class ChatTemplate:
    """A chat template, and the tokenizer that spells what it writes.

    Args:
        tokenizer: A fast tokenizer of transformers.
        text: The template; the tokenizer's if None.

    Raises:
        DataError: There is no template, or the tokenizer does not say where its tokens are.
    """

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        self._jinja = optional("jinja2", "a chat template")
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("the tokenizer does not say where in a text its tokens are", hint="use a fast tokenizer")
        self._tokenizer = tokenizer
        try:
            self.text: str = text or tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                "the tokenizer has no chat template: it is that of a model that was not trained for conversations",
                hint='--tokenizer names one that has, --chat-template FILE gives one; or --template "{instruction}" '
                "--answer-column output makes plain prompts",
            ) from None
        self._marks = bool(_MARKS.search(self.text))
        self._special = SpecialTokens(tokenizer)
        ends = one_of({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        self._ending = re.compile(rf"\s*(?:{ends})")

    def render(self, messages: Sequence[Message], where: str, *, ask: bool = False) -> str:
        """A conversation as text; with `ask`, up to where an answer begins.

        Raises:
            DataError: The template refuses it.
        """
        try:
            return str(self._apply(messages, tokenize=False, add_generation_prompt=ask))
        except (self._jinja.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                where=where,
                hint=f"its roles are {', '.join(message.role for message in messages)}",
            ) from None

    def encode(self, messages: Sequence[Message], where: str) -> tuple[list[int], Spans]:
        """The tokens of a conversation, as transformers makes them, and which are of answers.

        Args:
            messages: The conversation.
            where: The row, for messages.

        Raises:
            DataError: The template refuses the conversation, or answers cannot be told from the rest.
        """
        text = self.render(messages, where)
        if self._marks:
            if said := self._said(messages):
                raise DataError(
                    f"somebody says {said[0]!r}, which is a special token, and the chat template marks answers itself",
                    where=where,
                    hint="leave out such conversations, or use a template without {% generation %}",
                )
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            found = self._apply(messages, tokenize=True, **options)
            return list(found["input_ids"]), _spans(found["assistant_masks"])
        answers = list(self._answers(messages, text, where))
        ids, begins = self._spelled(messages, text, where)
        return ids, _spans([any(a <= first < b for a, b in answers) for first in begins])

    def asked(self, messages: Sequence[Message], where: str) -> list[int]:
        """The tokens up to where the next answer begins.

        Raises:
            DataError: The template refuses the conversation.
        """
        return self._spelled(messages, self.render(messages, where, ask=True), where, ask=True)[0]

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(as_dicts(messages), chat_template=self.text, **options)

    def _said(self, messages: Sequence[Message]) -> list[str]:
        """The special tokens that are spelled in what is said."""
        return [found.group() for message in messages for found in self._special.pattern.finditer(message.content)]

    def _spelled(
        self, messages: Sequence[Message], text: str, where: str, *, ask: bool = False
    ) -> tuple[list[int], list[int]]:
        """The tokens of a rendered conversation, and where in the text each begins.

        Where special tokens are said, the conversation is rendered with a mark in their places, which tells where they
        are in the text.
        """
        places, start, said = list[tuple[int, int]](), 0, self._said(messages)
        if said:
            mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
            marked = [dataclasses.replace(m, content=self._special.pattern.sub(mark, m.content)) for m in messages]
            pieces = self.render(marked, where, ask=ask).split(mark)
            for piece, token in zip(pieces, said, strict=False):
                places.append((start + len(piece), start + len(piece) + len(token)))
                start = places[-1][1]
            if len(pieces) != len(said) + 1 or text != "".join(map("".join, zip(pieces, [*said, ""], strict=True))):
                raise DataError(
                    f"somebody says {said[0]!r}, which is a special token, and the chat template changes what is said",
                    where=where,
                    hint=f"leave out such conversations; {_OTHER}",
                )
        return self._special.spelled(text, places)

    def _answers(self, messages: Sequence[Message], text: str, where: str) -> Iterator[tuple[int, int]]:
        """Where answers begin and end in the text."""
        ends = self._ends(messages, text, where)
        for place, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            asked, end = self.render(messages[:place], where, ask=True), next(ends)
            if not text.startswith(asked) or len(asked) >= end:
                raise DataError(
                    f"the chat template asks for an answer by {_tail(asked)!r}, which is not what stands before the "
                    "answer in the whole conversation, so that training would be on what is never asked",
                    where=f"{where}, message {place + 1}",
                    hint=f"conversations of one exchange each may do; {_OTHER}",
                )
            yield len(asked), end

    def _ends(self, messages: Sequence[Message], text: str, where: str) -> Iterator[int]:
        """Where each answer ends, with the token that ends its turn.

        The conversation is rendered with a word in place of each answer: what is around the words is of the template.
        """
        contents = [message.content for message in messages if message.role == ASSISTANT]
        marks = iter([f"ANSWER-{number}-OF-{len(contents)}" for number in range(len(contents))])
        replaced = [Message(m.role, next(marks)) if m.role == ASSISTANT else m for m in messages]
        pieces = re.split(rf"ANSWER-\d+-OF-{len(contents)}", self.render(replaced, where))
        place = len(pieces[0])
        fits = len(pieces) == len(contents) + 1 and text.startswith(pieces[0])
        for number, content in enumerate(contents if fits else ()):
            after = pieces[number + 1]
            forms = (content, content.strip(), content.rstrip(), content.lstrip())
            end = next((place + len(c) for c in forms if text.startswith(c + after, place)), None)
            if end is None:
                fits = False
                break
            ending = self._ending.match(text, end)
            place = end + len(after)
            yield ending.end() if ending else end
        if not fits or place != len(text):
            raise DataError(
                "the chat template changes what the assistant says, so that it cannot be found in the text",
                where=where,
                hint=_OTHER,
            )


def _spans(labelled: Sequence[object]) -> Spans:
    """First and last of each run of labelled tokens, the last one not included; token 0 follows nothing.

    >>> _spans([0, 1, 1, 0, 1])
    ((1, 3), (4, 5))
    """
    marks = [False, *(bool(mark) for mark in labelled[1:]), False]
    edges = [place for place in range(1, len(marks)) if marks[place] != marks[place - 1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _tail(text: str) -> str:
    return text if len(text) <= 40 else f"...{text[-40:]}"
