"""The splits of a data set in a local folder, however it was put there."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Literal

from mobizo_compiler.errors import DataError
from mobizo_compiler.text.rows import SUFFIXES, UTF8, Row, read_rows

Split = Literal["train", "validation"]
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev")}


def split_files(path: str | PathLike[str], split: Split) -> list[Path]:
    """What holds a split: files in their order, or a folder that `datasets` saved; empty if there is none.

    A folder has a file for a split (`train.jsonl`, `val.csv`), or numbered ones (`train-00000-of-00002.parquet`),
    itself or in a folder `data`; or it is what `DatasetDict.save_to_disk` wrote. A file, and what
    `Dataset.save_to_disk` wrote, is any split.

    Raises:
        DataError: There is no such file or folder, or it has a split in two formats.
    """
    source = Path(path)
    if not source.exists():
        raise DataError("there is no such file or folder", where=str(source))
    if source.is_file() or (source / "state.json").exists():
        return [source]
    for name in _NAMES[split]:
        if (source / name / "state.json").exists():
            return [source / name]
        for folder in (source, source / "data"):
            inside = sorted(folder.iterdir()) if folder.is_dir() else []
            named = [file for file in inside if re.match(rf"{name}(?![a-z])", file.stem.lower())]
            found = [file for file in named if file.suffix in SUFFIXES]
            if len({file.suffix for file in found}) > 1:
                raise DataError(
                    f"the split {name} is there as {' and as '.join(file.name for file in found)}",
                    where=str(folder),
                    hint="name the file itself",
                )
            if found:
                return found
    return []


def read_split(path: str | PathLike[str], split: Split, encoding: str = UTF8) -> list[Row]:
    """The rows of a split.

    Args:
        path: A folder as `split_files` takes it, or one file, which is read whatever its name is.
        split: "train" or "validation".
        encoding: Of text files.

    Raises:
        DataError: The folder has no such split, or a file of it cannot be read.
        MissingPackageError: As in `read_rows`.
    """
    files = split_files(path, split)
    if not files:
        inside = ", ".join(sorted(file.name for file in Path(path).iterdir())[:8]) or "nothing"
        raise DataError(
            f"the folder has no split for {split}; there is {inside}",
            where=str(path),
            hint=f"name the file, or call it {_NAMES[split][0]}.jsonl, .csv or .parquet",
        )
    return [row for file in files for row in read_rows(file, encoding)]
