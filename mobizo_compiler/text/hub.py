"""Models and tokenizers of transformers, by the name of a hub or from a folder. transformers is optional."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mobizo_compiler.errors import ModelSourceError
from mobizo_compiler.optional import optional

# Task on the command line, and the class of transformers that loads a model for it.
TASKS = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification"}


def load_model(source: str, task: str = "causal-lm") -> Any:
    """The model, float32, in eval mode, without a cache of keys and values.

    Args:
        source: A folder, or the name of a model on the hub, which transformers then downloads.
        task: A key of `TASKS`.

    Raises:
        ModelSourceError: There is no such model, or it is not for that task.
    """
    with calm():
        transformers = optional("transformers", "loading a model by name")
    place = _place(source)
    with _explained(source, "model"), _without_bar(transformers, Path(place).is_dir()):
        model = getattr(transformers, TASKS[task]).from_pretrained(place, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model, by the name of the model or from its folder.

    Raises:
        ModelSourceError: There is none.
    """
    with calm():
        transformers = optional("transformers", "loading a tokenizer")
    with _explained(source, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(_place(source))


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Within the block, what is logged below an error is not shown: torchao logs what it was not built with."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _without_bar(transformers: Any, wanted: bool) -> Iterator[None]:
    """A folder is loaded at once; a bar is for downloads."""
    logs = transformers.utils.logging
    hidden = wanted and logs.is_progress_bar_enabled()
    if hidden:
        logs.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logs.enable_progress_bar()


def _place(source: str) -> str:
    """A folder as it is; a path that is none must not be taken for the name of a model."""
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelSourceError("there is no such folder", where=source)
    return source


@contextlib.contextmanager
def _explained(source: str, what: str) -> Iterator[None]:
    try:
        with calm():
            yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ModelSourceError):
            raise
        problem = " ".join(str(error).split())
        raise ModelSourceError(
            f"transformers cannot load this {what}: {problem}",
            where=source,
            hint="name a folder that save_pretrained wrote, or a model of the hub",
        ) from None
