"""Saving a file so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from mobizo_compiler.errors import ArtifactError


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file to a temporary name beside `target`, flush it, and rename it.

    Raises:
        ArtifactError: There is no folder to write to.
    """
    if not target.parent.is_dir():
        raise ArtifactError(f"there is no folder {str(target.parent)!r}", where=str(target))
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as copy:
        try:
            with source.open("rb") as original:
                shutil.copyfileobj(original, copy, 1 << 22)
            copy.flush()
            os.fsync(copy.fileno())
            os.chmod(copy.name, 0o644)
            os.replace(copy.name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(copy.name)
            raise
