"""Rows of text from files: CSV, JSON lines, plain text, parquet, and folders of `datasets`."""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.optional import optional
from mobizo_compiler.text.tables import read_table

TEXT = "text"  # the column of a file of lines
UTF8 = "utf-8"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt", ".parquet")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Args:
        cells: Text by column; what is missing is empty.
        where: Where it is, for messages.
        nested: What columns hold that is neither text nor a number: lists and objects.
    """

    cells: Mapping[str, str]
    where: str
    nested: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def cell(self, column: str, hint: str) -> str:
        """The text of a column.

        Raises:
            DataError: There is no such column, or it is no text; `hint` says how to name another.
        """
        if column in self.nested:
            raise DataError(
                f"column {column!r} is a {type(self.nested[column]).__name__}, not text or a number",
                where=self.where,
                hint=hint,
            )
        if column not in self.cells:
            names = ", ".join([*self.cells, *self.nested])
            raise DataError(f"there is no column {column!r}", where=self.where, hint=f"the columns are {names}; {hint}")
        return self.cells[column]


def read_rows(path: str | PathLike[str], encoding: str = UTF8) -> list[Row]:
    """The rows of a file, or of a folder that `datasets` saved.

    Args:
        path: `.csv` or `.tsv` with a header; `.jsonl` with an object a line; `.json` with a list of objects; `.txt`
            with a row a line, whose column is `text`; `.parquet`; or a folder of `Dataset.save_to_disk`.
        encoding: Of a text file, as Python names it.

    Raises:
        DataError: There is no such file, it is empty, or it is damaged; the message names the line.
        ConfigError: There is no such encoding.
        MissingPackageError: It is parquet and pyarrow is not installed, or a folder and datasets is not.
    """
    source = Path(path)
    if source.is_dir():
        rows = list(_saved(source))
    elif not source.is_file():
        raise DataError("there is no such file", where=str(source))
    elif source.suffix not in SUFFIXES:
        raise DataError(f"a file of rows ends in {', '.join(SUFFIXES)}", where=str(source))
    elif source.suffix == ".parquet":
        rows = list(_parquet(source))
    else:
        text = _text(source, encoding)
        if source.suffix in (".csv", ".tsv"):
            rows = [Row(cells, where) for cells, where in read_table(text, source)]
        elif source.suffix == ".txt":
            rows = [Row({TEXT: line}, where) for where, line in _lines(text, source)]
        else:
            rows = list(_objects(text, source))
    if not rows:
        raise DataError("the file has no rows", where=str(source))
    return rows


def _text(path: Path, encoding: str) -> str:
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        raise ConfigError(f"there is no encoding {encoding!r}", hint="utf-8, latin-1, cp1252, utf-16") from None
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig" if known == UTF8 else known)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"byte {error.start} is not {encoding.upper()}",
            where=f"{path}, line {line}",
            hint="--encoding latin-1 (or cp1252, utf-16) says how the file is written; or save it as UTF-8",
        ) from None


def _lines(text: str, path: Path) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip("\r")


def _objects(text: str, path: Path) -> Iterable[Row]:
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"the file is not JSON: {error}", where=str(path)) from None
        if not isinstance(values, list):
            raise DataError(f"the file holds a {type(values).__name__}, not a list of objects", where=str(path))
        pairs: Iterable[tuple[str, Any]] = [(f"{path}, object {i}", value) for i, value in enumerate(values, start=1)]
    else:
        pairs = ((where, _value(line, where)) for where, line in _lines(text, path))
    for where, value in pairs:
        if not isinstance(value, dict):
            raise DataError(f"the row is a {type(value).__name__}, not an object with columns", where=where)
        yield row_of(value, where)


def _value(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"the line is not JSON: {error}", where=where) from None


def _parquet(path: Path) -> Iterable[Row]:
    parquet = optional("pyarrow.parquet", f"reading the file {path}")
    try:
        table = parquet.read_table(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"the file is not parquet: {error}", where=str(path)) from None
    for number, values in enumerate(table.to_pylist()):
        yield row_of(values, f"{path}, row {number}")


def _saved(folder: Path) -> Iterable[Row]:
    datasets = optional("datasets", f"reading the folder {folder}")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"datasets cannot load this folder: {error}", where=str(folder)) from None
    if isinstance(loaded, dict):
        parts = ", ".join(f"{folder / name}" for name in loaded)
        raise DataError("the folder holds several splits", where=str(folder), hint=f"name one of them: {parts}")
    for number, values in enumerate(loaded):
        yield row_of(values, f"{folder}, row {number}")


def row_of(values: Mapping[Any, Any], where: str) -> Row:
    """A row of values; pandas writes NaN where there is nothing."""
    cells, nested = dict[str, str](), dict[str, Any]()
    for name, value in values.items():
        if value is None or (isinstance(value, float) and math.isnan(value)):
            cells[str(name)] = ""
        elif isinstance(value, str):
            cells[str(name)] = value
        elif isinstance(value, (bool, int, float)):
            cells[str(name)] = json.dumps(value)
        else:
            nested[str(name)] = value
    return Row(cells, where, nested)
