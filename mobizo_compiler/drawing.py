"""What all pictures have in common: colours, formats, and files that appear whole. matplotlib is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.optional import optional

BLUE, PALE, ORANGE, GREY, INK = "#1f4e9c", "#b8c8e0", "#c8641e", "#8a8f98", "#20242c"
GREEN, MINT, SAND = "#3a7d44", "#e3f0e3", "#f6e7da"
FORMATS = (".png", ".svg")


def pyplot(purpose: str) -> Any:
    """matplotlib.pyplot, without a screen."""
    optional("matplotlib", purpose).use("Agg")
    return optional("matplotlib.pyplot", purpose)


def write_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write the figure in the format of the file's name, whole or not at all, the same bytes each time."""
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with whole_file(path) as file:
        figure.savefig(file, format=kind, metadata=metadata, **options)


def check_format(path: Path) -> None:
    """Raise `ConfigError` unless a picture can be written under this name, before work is done for it."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"a picture ends in {' or '.join(FORMATS)}, not {path.suffix!r}", where=str(path))
