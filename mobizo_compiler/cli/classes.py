"""How answers that are classes are shown, and which command fits a program."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.text.confusion import Confusion

_MOST_COLUMNS = 8  # of answers; with more of them, each has the one that it is taken for most often


def writes_text(manifest: Manifest) -> bool:
    """Whether a program was compiled for whole texts, not for a choice or for classes of rows."""
    return manifest.labels.choices is None and len(manifest.labels.shape) == 2


def confusion_table(found: Confusion) -> Table:
    """What each answer is taken for, with precision, recall and F1."""
    whole = len(found.choices) <= _MOST_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("right answer", footer="macro F1", overflow="fold")
    for column in [*(f"as {name}" for name in found.choices)] if whole else ["rows"]:
        table.add_column(Text(column), justify="right", overflow="fold")
    for column in ("precision", "recall"):
        table.add_column(column, justify="right")
    table.add_column("F1", justify="right", footer=_shown(found.macro_f1))
    if not whole:
        table.add_column("most taken for", overflow="fold")
    for place, (name, counts, *shares) in enumerate(
        zip(found.choices, found.counts, found.precision, found.recall, found.f1, strict=True)
    ):
        cells = [str(count) for count in counts] if whole else [str(sum(counts))]
        most, other = max((count, k) for k, count in enumerate(counts) if k != place)
        taken = f"{found.choices[other]} ({most})" if most else ""
        table.add_row(Text(name), *cells, *map(_shown, shares), *([] if whole else [Text(taken)]))
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def recommended(manifest: Manifest, file: Path, data: Path | None, training: str) -> str:
    """The commands that come after compile.

    Args:
        manifest: Of the program.
        file: Where it is.
        data: The rows that it was compiled for, if it was for some.
        training: Options of finetune that fit.
    """
    last = "generate {} --run RUN PROMPT" if writes_text(manifest) else "predict {} --run RUN TEXT"
    first = f"finetune {file} --data {data or 'ROWS'} --run RUN {training}".rstrip()
    return f"next: mobizo {first}\n      mobizo {last.format(file)}"
