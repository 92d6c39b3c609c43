"""Which tokenizer a model has: a program keeps a checksum of its tokens, to refuse another's."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobizo_compiler.errors import ConfigError, ModelSourceError

Vocabulary = tuple[int, int]  # how many tokens, and CRC-32 of "<id> <token>\n" of each, in the order of ids


def vocabulary_of(tokenizer: Any, first: int | None = None) -> Vocabulary:
    """What says which tokenizer this is.

    Args:
        tokenizer: One of transformers, or another with `get_vocab`: ids by token.
        first: Only tokens whose ids are below this; None for all.

    Raises:
        ConfigError: It has no such method.

    >>> from types import SimpleNamespace
    >>> vocabulary_of(SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1})) == (2, zlib.crc32(b"0 a\\n1 b\\n"))
    True
    """
    try:
        known: Mapping[str, int] = tokenizer.get_vocab()
        ids = sorted((number, token) for token, number in known.items() if first is None or number < first)
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{type(tokenizer).__name__} is no tokenizer with get_vocab: {error}") from None
    size = 1 + ids[-1][0] if ids else 0
    return size, zlib.crc32("".join(f"{number} {token}\n" for number, token in ids).encode(errors="replace"))


def name_of(tokenizer: Any) -> str | None:
    """Where a tokenizer of transformers came from: a name, or the whole path of a folder; None if it does not tell."""
    name = getattr(tokenizer, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return located(name)


def located(name: str | None) -> str | None:
    """A name, or the whole path of what is there under it.

    >>> located("hub/name"), located(None)
    ('hub/name', None)
    """
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def check_vocabulary(tokenizer: Any, known: Vocabulary | None, where: str) -> None:
    """Compare a tokenizer with that of the model; it may have tokens that were added behind the model's.

    Args:
        tokenizer: One of transformers.
        known: What a program says of its own (`Manifest.vocabulary`); nothing is compared where it says nothing.
        where: What the tokenizer is called.

    Raises:
        ModelSourceError: It gives other ids to words.
    """
    if known is None:
        return
    found = vocabulary_of(tokenizer, known[0])
    if found != known:
        others = f"{found[0]} tokens, not {known[0]}" if found[0] != known[0] else "the same number, but other ones"
        raise ModelSourceError(
            f"this is the tokenizer of another model: it has {others}",
            where=where,
            hint="name the one that the program was compiled with, where words have other numbers; or compile with "
            "this one (mobizo compile --tokenizer), if the model was trained with it",
        )
