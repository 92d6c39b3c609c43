"""A conversation with a program: what was said, and the next answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mobizo_compiler.device.generation import MOST_LIKELY, Sampling
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.format.vocabulary import check_vocabulary
from mobizo_compiler.options import MAX_SEED
from mobizo_compiler.text.chat_rows import asked
from mobizo_compiler.text.conversations import ASSISTANT, SYSTEM, USER, Message, without_oldest
from mobizo_compiler.text.generation import Generated, generate
from mobizo_compiler.text.prompts import PromptConfig


class Talk:
    """Turns of a user and of a program that generates with a cache.

    Args:
        session: With the adapter to answer with; it may be changed between turns.
        tokenizer: The model's.
        config: With the chat template of training, as a run has it; the tokenizer's template if None.
        system: What the model is told before the first turn.
        sampling: How tokens are chosen; the seed is that of the first turn, and one more in each turn after it.

    Raises:
        ConfigError: The program was compiled without `generate`.
        ModelSourceError: The tokenizer is that of another model.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        config: PromptConfig | None = None,
        system: str | None = None,
        sampling: Sampling = MOST_LIKELY,
    ) -> None:
        if session.program.manifest.generate is None:
            raise ConfigError(
                "the program has no cache of keys and values, and would read the whole conversation for every token",
                hint="mobizo compile --generate-context 1024, or compile(..., generate=GenerateConfig())",
            )
        check_vocabulary(tokenizer, session.program.manifest.vocabulary, type(tokenizer).__name__)
        self._session, self._tokenizer, self._sampling = session, tokenizer, sampling
        self._config = config or PromptConfig()
        self._before = (Message(SYSTEM, system),) if system else ()
        self.messages: tuple[Message, ...] = self._before
        self._turns = 0

    def forget(self) -> None:
        """Begin anew; what the system said stays."""
        self.messages, self._turns = self._before, 0

    def say(self, text: str, most: int = 256, on_text: Callable[[str], None] = lambda text: None) -> Generated:
        """Say something and get the answer. Where the conversation is too long, its oldest exchanges are left out.

        An answer that is interrupted, by an exception of `on_text`, was not said, and neither was the question.

        Args:
            text: What the user says.
            most: Most tokens of the answer.
            on_text: Told each piece of the answer when it is there.

        Raises:
            DataError: The template refuses the conversation, or the question alone is too long.
        """
        generation = self._session.program.manifest.generate
        assert generation is not None
        messages = (*self.messages, Message(USER, text))
        tokens = asked(messages, self._tokenizer, self._config)
        while len(tokens) >= generation.context:
            if not any(message.role == ASSISTANT for message in messages):
                raise DataError(
                    f"what was said has {len(tokens)} tokens, and the cache has room for {generation.context}",
                    hint="say less, or compile with a larger --generate-context",
                )
            messages = without_oldest((*messages, Message(ASSISTANT, "")))[:-1]
            tokens = asked(messages, self._tokenizer, self._config)
        seed = (self._sampling.seed + self._turns) % (MAX_SEED + 1)
        sampling = dataclasses.replace(self._sampling, seed=seed)
        found = generate(self._session, self._tokenizer, tokens, most, on_text, sampling)
        self.messages = (*messages, Message(ASSISTANT, found.text))
        self._turns += 1
        return found
