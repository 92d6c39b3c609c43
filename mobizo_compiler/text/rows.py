"""Rows of text from files: CSV, JSON lines, plain text, and folders of `datasets`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from mobizo_compiler.errors import DataError
from mobizo_compiler.optional import optional

TEXT = "text"  # the column of a file of lines
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file: its cells by column, and where it is, for messages."""

    cells: Mapping[str, str]
    where: str


def read_rows(path: str | PathLike[str]) -> list[Row]:
    """The rows of a file, or of a folder that `datasets` saved.

    Args:
        path: `.csv` or `.tsv` with a header; `.jsonl` with an object a line; `.json` with a list of objects; `.txt`
            with a row a line, whose column is `text`; or a folder of `Dataset.save_to_disk`. Text is UTF-8.

    Raises:
        DataError: There is no such file, it is empty, or it is damaged; the message names the line.
    """
    source = Path(path)
    if source.is_dir():
        rows = list(_saved(source))
    elif not source.is_file():
        raise DataError("there is no such file", where=str(source))
    elif source.suffix not in _SUFFIXES:
        raise DataError(f"a file of rows ends in {', '.join(_SUFFIXES)}", where=str(source))
    else:
        text = _text(source)
        if source.suffix in (".csv", ".tsv"):
            rows = list(_table(text, "," if source.suffix == ".csv" else "\t", source))
        elif source.suffix == ".txt":
            rows = [Row({TEXT: line}, where) for where, line in _lines(text, source)]
        else:
            rows = list(_objects(text, source))
    if not rows:
        raise DataError("the file has no rows", where=str(source))
    return rows


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"byte {error.start} is not UTF-8", where=f"{path}, line {line}", hint="save the file as UTF-8"
        ) from None


def _lines(text: str, path: Path) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip("\r")


def _table(text: str, delimiter: str, path: Path) -> Iterable[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header) or "" in header:
                    raise DataError(f"the columns {header} need names, each its own", where=where)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"the row has {len(cells)} cells, the header has {len(header)}",
                    where=where,
                    hint='put text with a delimiter or a line break in it between "double quotes"',
                )
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"the row cannot be read: {error}", where=f"{path}, line {reader.line_num}") from None


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
        yield Row({str(name): _cell(name, cell, where) for name, cell in value.items()}, where)


def _value(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"the line is not JSON: {error}", where=where) from None


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
        where = f"{folder}, row {number}"
        yield Row({str(name): _cell(name, cell, where) for name, cell in values.items()}, where)


def _cell(name: object, value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise DataError(f"column {name!r} is a {type(value).__name__}, not text or a number", where=where)
