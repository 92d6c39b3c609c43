"""`mobizo predict`: the class of a text, or of every row of a file."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mobizo_compiler.cli.app import (
    AsJson,
    Best,
    Encoding,
    ProgramFile,
    Quiet,
    Remarks,
    RunFolder,
    TrustRemoteCode,
    app,
    print_json,
)
from mobizo_compiler.cli.options import ConfigFile, with_sections
from mobizo_compiler.cli.progress import Bar
from mobizo_compiler.cli.runs import check_file, prompt_of, record_of, restored, tokenizer_for
from mobizo_compiler.cli.tasks import Asked
from mobizo_compiler.cli.text import PROMPTS, TokenizerName
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.load import load
from mobizo_compiler.text.prediction import Classifier, Prediction
from mobizo_compiler.text.prompts import PromptConfig
from mobizo_compiler.text.rows import UTF8, Row, read_rows

PREDICTED, CHANCE = "predicted", "p_{}"
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


@app.command("predict")
@with_sections(PROMPTS)
def predict_classes(
    prompts: dict[str, Any],
    file: ProgramFile,
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Text to classify; - reads it from stdin.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Rows in place of a text, as for finetune; answers are not needed.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write the rows with their answers: .csv, .tsv, .jsonl or .json.", show_default=False
        ),
    ] = None,
    run: RunFolder = None,
    best: Best = False,
    encoding: Encoding = UTF8,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say which answer a text gets, or every row of a file, with the probabilities of all answers.

    With --run, prompts are made as in the run where no option says otherwise. Without it, it is the model as it was
    compiled.
    """
    remark = Remarks(quiet)
    if (text is None) == (data is None):
        raise typer.BadParameter("name a text or --data FILE, one of the two")
    check_file(file)
    _check_output(output)
    record = record_of(run, best)
    prompt = prompt_of(prompts, file, record)
    rows = _one_row(text, prompt) if text is not None else read_rows(data or Path(), encoding)
    task = Asked.of(None, encoding, record=record).task
    if output is not None:
        _check_columns(rows, output)
    program = load(file)
    spelling, _ = tokenizer_for(tokenizer, program.manifest, trust_remote_code, record.get("tokenizer"))
    session = Session(program)
    classifier = Classifier(session, spelling, prompt)
    steps = restored(session, run, best)
    with Bar(remark) as bar:
        if data is not None:
            bar.begin(0, len(rows), "predicting")
        found = classifier.predict(rows if task is None else task.rows(rows), bar.done)
    if cut := sum(one.cut > 0 for one in found):
        remark(f"{cut} of {len(found)} prompts are too long and are cut (--cut)", "yellow")
    described = [_described(row, one) for row, one in zip(rows, found, strict=True)]
    if output is not None:
        with whole_file(output) as raw:
            raw.write(_text(output, described).encode())
    if as_json:
        print_json({"steps": steps, "choices": classifier.choices, "rows": described})
    elif output is not None:
        typer.echo(f"{len(found)} rows with their answers are in {output}")
    elif data is None:
        _show_one(found[0])
    else:
        _show_rows(rows, found, prompt)


def _one_row(text: str, prompt: PromptConfig) -> list[Row]:
    """The text in the only column of the prompt."""
    columns = dict.fromkeys(prompt.columns)
    if len(columns) != 1:
        raise DataError(
            f"the prompt has {len(columns)} columns, {', '.join(columns)}, and one text is given",
            hint="--data FILE with these columns",
        )
    return [Row(dict.fromkeys(columns, sys.stdin.read() if text == "-" else text), "the text")]


def _check_output(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"a file of answers ends in {', '.join(_SUFFIXES)}", where=str(path))
    if not path.parent.is_dir():
        raise ConfigError("there is no such folder", where=str(path.parent))


def _check_columns(rows: Sequence[Row], path: Path) -> None:
    """Raise `DataError` where a row has a column already that answers go into."""
    made = (PREDICTED,) if path.suffix in (".csv", ".tsv") else (PREDICTED, "probabilities")
    for row in rows:
        if taken := [name for name in made if name in row.cells]:
            raise DataError(f"there is a column {taken[0]!r} already", where=row.where, hint="rename it")


def _described(row: Row, found: Prediction) -> dict[str, Any]:
    return {**row.cells, PREDICTED: found.answer, "probabilities": dict(found.probabilities)}


def _text(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows, as the ending of the file says."""
    if path.suffix in (".csv", ".tsv"):
        return _table(rows, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".json":
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table(rows: Sequence[Mapping[str, Any]], delimiter: str) -> str:
    flat = [
        {name: value for name, value in row.items() if name != "probabilities"}
        | {CHANCE.format(name): f"{chance:.6g}" for name, chance in row["probabilities"].items()}
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _show_one(found: Prediction) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, chance in sorted(found.probabilities.items(), key=lambda pair: -pair[1]):
        table.add_row(Text(name), f"{chance:.3f}")
    Console().print(table)


def _show_rows(rows: Sequence[Row], found: Sequence[Prediction], prompt: PromptConfig) -> None:
    columns = tuple(dict.fromkeys(prompt.columns))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*columns, PREDICTED, "probability"):
        table.add_column(Text(column))
    for row, one in zip(rows, found, strict=True):
        cells = [Text(row.cells[column], overflow="fold") for column in columns]
        table.add_row(*cells, Text(one.answer), f"{one.probabilities[one.answer]:.3f}")
    Console().print(table)
