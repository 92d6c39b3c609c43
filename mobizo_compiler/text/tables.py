"""Tables in text: comma-separated and tab-separated files as people have them."""

from __future__ import annotations

import csv
import io
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mobizo_compiler.errors import DataError

Cells = dict[str, str]
_DELIMITERS = ",;\t"
_LIMIT = threading.Lock()


def read_table(text: str, path: Path) -> Iterable[tuple[Cells, str]]:
    """The cells of every row by column, and where the row ends; columns without a name are left out.

    A `.csv` has the delimiter that makes the most of its header: comma, semicolon or tab. In a `.tsv` a line is a row,
    and a quote is text unless it is around a whole cell; only where lines have unequal numbers of cells are quotes
    taken to hold line breaks.

    Raises:
        DataError: A row cannot be read, or has another number of cells than the header.
    """
    if path.suffix == ".tsv":
        lines = [(line.rstrip("\r"), number) for number, line in enumerate(text.split("\n"), start=1)]
        rows = [([_unquoted(cell) for cell in line.split("\t")], number) for line, number in lines if line.strip()]
        if len({len(cells) for cells, _ in rows}) > 1:
            with suppress(DataError):  # then a line has too many or too few cells, which is what is said
                rows = _quoted(text, "\t", path)
    else:
        rows = _quoted(text, _delimiter(text), path)
    return _rows(rows, path)


def _delimiter(text: str) -> str:
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(_DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))


def _unquoted(cell: str) -> str:
    """A cell that is whole within quotes, without them; any other as it is.

    >>> _unquoted('"a ""b"" c"'), _unquoted('"He said'), _unquoted('"a" and "b"')
    ('a "b" c', '"He said', '"a" and "b"')
    """
    inner = cell[1:-1].replace('""', "")
    whole = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if whole else cell


def _quoted(text: str, delimiter: str, path: Path) -> list[tuple[list[str], int]]:
    """Rows whose quoted cells may hold delimiters and line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    with _LIMIT:  # one limit on the length of cells is for the whole process: it is raised for this file and put back
        before = csv.field_size_limit(sys.maxsize)
        try:
            rows = [(cells, reader.line_num) for cells in reader if cells]
        except csv.Error as error:
            where = f"{path}, line {reader.line_num}"
            raise DataError(f"the row cannot be read: {error}", where=where) from None
        finally:
            csv.field_size_limit(before)
    if delimiter == "\t" and any("\t" in cell and "\n" in cell for cells, _ in rows for cell in cells):
        raise DataError("a quote joins several lines into one cell", where=str(path))
    return rows


def _rows(lines: Iterable[tuple[Sequence[str], int]], path: Path) -> Iterator[tuple[Cells, str]]:
    header: list[str] | None = None
    for cells, number in lines:
        where = f"{path}, line {number}"
        if header is None:
            header = [name.strip() for name in cells]
            named = [name for name in header if name]
            if not named or len(set(named)) < len(named):
                raise DataError(f"the columns {header} need names, each its own", where=where)
            continue
        if len(cells) != len(header):
            raise DataError(
                f"the row has {len(cells)} cells, the header has {len(header)}",
                where=where,
                hint='put text with a delimiter or a line break in it between "double quotes"',
            )
        yield {name: cell for name, cell in zip(header, cells, strict=True) if name}, where
