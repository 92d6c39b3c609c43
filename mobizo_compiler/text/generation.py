"""Text that a session writes: a prompt, and what the program goes on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

from mobizo_compiler.device.generation import MOST_LIKELY, Ending, Sampling
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import DataError
from mobizo_compiler.text.answers import Encoded
from mobizo_compiler.text.batch_shape import BatchShape
from mobizo_compiler.text.data import TextData, filling
from mobizo_compiler.text.evaluation import logits_of
from mobizo_compiler.text.prompts import Piece, PromptConfig
from mobizo_compiler.text.speller import Speller


@dataclasses.dataclass(frozen=True)
class Generated:
    """Text that a session wrote.

    Args:
        text: Without the prompt.
        tokens: Its token ids; the end of text is not among them.
        stopped: "end": the model ended the text. "limit": as many tokens as were asked for. "length": the cache, or
            where there is none, the rows of the program are full.
    """

    text: str
    tokens: tuple[int, ...]
    stopped: str


def generate(
    session: Session,
    tokenizer: Any,
    prompt: str | Sequence[int],
    most: int = 64,
    on_text: Callable[[str], None] = lambda text: None,
    sampling: Sampling = MOST_LIKELY,
    until: str | None = None,
) -> Generated:
    """Go on with a prompt, with the method `forward` where the program has it.

    Without it, every token is a call of `evaluate` on a whole batch, of which one row is used: for looking at what was
    learnt, not for serving.

    Args:
        session: With the state to generate with.
        tokenizer: The model's.
        prompt: Taken as it is, special tokens included; a space at its end is the model's to write, as in training.
            Tokens in place of a text have all that stands in front of it.
        most: Most tokens to add.
        on_text: Told each piece of text when it is there.
        sampling: How the next token is chosen.
        until: A text that ends it too.

    Raises:
        DataError: The prompt does not fit, or the program gives no logits of tokens.
    """
    speller, generation = Speller(tokenizer), session.program.manifest.generate
    if isinstance(prompt, str):
        ids = speller.front + speller.spell(speller.prompt([Piece(prompt, True)]))
    else:
        ids = list(prompt)
    if generation is not None:
        _check(ids, generation.context, generation.vocabulary, "a larger --generate-context")
        stops = {*generation.stop_ids, *([] if speller.end is None else [speller.end])}
        options = dataclasses.asdict(sampling)
        found = session.generate(ids, most, stop_ids=sorted(stops), **options)
    else:
        found = _by_whole_rows(session, speller, ids, most, sampling)
    tokens: list[int] = []
    shown = ""
    while True:
        try:
            tokens.append(next(found))
        except StopIteration as end:
            stopped: Ending = end.value
            break
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # else the last character is not whole yet
            on_text(text[len(shown) :])
            shown = text
        if until is not None and until in text:
            stopped = "end"
            found.close()
            break
    text = tokenizer.decode(tokens)
    on_text(text[len(shown) :])
    return Generated(text, tuple(tokens), stopped)


def _check(ids: Sequence[int], room: int, vocabulary: int, larger: str) -> None:
    if not ids or len(ids) >= room or max(ids) >= vocabulary:
        raise DataError(
            f"the prompt has {len(ids)} tokens; it must have 1 to {room - 1}, below {vocabulary}",
            hint=f"compile with {larger}" if len(ids) >= room else None,
        )


def _by_whole_rows(
    session: Session, speller: Speller, ids: list[int], most: int, sampling: Sampling
) -> Generator[int, None, Ending]:
    """The tokens that go on with a prompt, each from the logits of the whole row."""
    layout = BatchShape.of(session.program.manifest)
    if layout.classes is not None:
        raise DataError("the program classifies rows; it does not generate text")
    _check(ids, layout.tokens, layout.vocabulary, "more --tokens")
    data = TextData((), layout, None, (), filling(layout, speller), PromptConfig())
    row, generator = list(ids), sampling.generator()
    for _ in range(most):
        if len(row) == layout.tokens:
            return "length"
        logits_V = logits_of(session, data, [Encoded(tuple(row), 0, None, 0)])[0, len(row) - 1]
        token = sampling.choose(logits_V, generator)
        if token == speller.end:
            return "end"
        yield token
        row.append(token)
    return "limit"
