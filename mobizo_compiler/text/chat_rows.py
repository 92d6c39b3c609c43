"""Conversations as rows of tokens, of which those of the answers are labelled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from mobizo_compiler.errors import DataError
from mobizo_compiler.text.answers import Encoded
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.chat_template import ChatTemplate
from mobizo_compiler.text.conversations import Message, without_oldest
from mobizo_compiler.text.prompts import PromptConfig, Sample
from mobizo_compiler.text.speller import Speller


class ChatRows:
    """Rows that are conversations.

    Raises:
        DataError: The program does not write text, or the tokenizer has no chat template.
    """

    choices: tuple[str, ...] | None = None
    spelled: tuple[tuple[int, ...], ...] = ()
    ends = False

    def __init__(self, texts: Sequence[Sample], layout: BatchShape, speller: Speller, config: PromptConfig) -> None:
        if layout.classes is not None or layout.choices is not None:
            raise DataError(
                "the program was compiled to choose between answers, and conversations are whole texts",
                hint="compile with --loss causal-lm",
            )
        self._layout = layout
        self.template = ChatTemplate(speller.tokenizer, config.chat_template)

    def row(self, sample: Sample) -> Encoded:
        """The row of a conversation. Where it is too long, its oldest exchanges go, then the end of the last answer."""
        messages, room = sample.messages, self._layout.tokens
        ids, spans = self.template.encode(messages, sample.where)
        whole = len(ids)
        while len(ids) > room and (shorter := without_oldest(messages)):
            messages = shorter
            ids, spans = self.template.encode(messages, sample.where)
        spans = tuple((first, min(end, room)) for first, end in spans if first < room)
        labelled = sum(end - first for first, end in spans)
        if not spans:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and none of its answer is among the {room} of a row",
                where=sample.where,
                hint="compile with more --tokens",
            )
        if self._layout.max_labels is not None and labelled > self._layout.max_labels:
            raise DataError(
                f"the answers have {labelled} tokens; the program was compiled for at most {self._layout.max_labels} "
                "in a row",
                where=sample.where,
                hint="compile with a larger --loss-max-labels, or without it",
            )
        ids = ids[:room]
        return Encoded(tuple(ids), labelled, None, whole - len(ids), (), spans)


def asked(messages: Sequence[Message], tokenizer: Any, config: PromptConfig) -> list[int]:
    """The tokens that ask for the next answer of a conversation, as training has them before it.

    Args:
        messages: What was said; the last one by the user.
        tokenizer: The model's.
        config: With the chat template of training, as a run has it.

    Raises:
        DataError: The template refuses the conversation.
    """
    return ChatTemplate(tokenizer, config.chat_template).asked(messages, "the prompt")


def stretches(row: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """A row as text, in pieces that are labelled and that are not."""
    edges = [0, *(edge for span in row.spans for edge in span), len(row.ids)]
    pieces = [(list(row.ids[a:b]), bool(k % 2)) for k, (a, b) in enumerate(itertools.pairwise(edges))]
    return [(tokenizer.decode(ids), labelled) for ids, labelled in pieces if ids]
