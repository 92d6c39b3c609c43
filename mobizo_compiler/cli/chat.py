"""How conversations are shown before they are learnt."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from mobizo_compiler.cli.app import Remarks
from mobizo_compiler.text.chat_rows import stretches
from mobizo_compiler.text.data import TextData

_OPEN, _CLOSE = "\u27e6", "\u27e7"  # no text of a template, as brackets could be


def say_first_row(remark: Remarks, rows: TextData, tokenizer: Any) -> None:
    """The first conversation as the model sees it, with what is labelled in brackets."""
    remark(f"the first of them, {rows.config.chat}; what is learnt is within {_OPEN} {_CLOSE}:")
    shown = Text()
    for text, labelled in stretches(rows.encoded[0], tokenizer):
        shown.append(f"{_OPEN}{text}{_CLOSE}" if labelled else text, "bold green" if labelled else "dim")
    remark.console.print(shown)
