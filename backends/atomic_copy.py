"""Saving a file so that it appears whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from mobizo_compiler.errors import ArtifactError
from mobizo_compiler.files import whole_file


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file to a temporary name beside `target`, flush it, and rename it.

    Raises:
        ArtifactError: There is no folder to write to.
    """
    if not target.parent.is_dir():
        raise ArtifactError(f"there is no folder {str(target.parent)!r}", where=str(target))
    with source.open("rb") as original, whole_file(target) as copy:
        shutil.copyfileobj(original, copy, 1 << 22)
