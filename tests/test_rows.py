"""Files of rows as people have them, and the time that many rows take."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch

from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.text.evaluation import auc
from mobizo_compiler.text.prompts import PromptConfig, samples, split
from mobizo_compiler.text.rows import read_rows

PROMPT = PromptConfig(template="{text}", answer_column="tone")


def cells(path: Path, **options: str) -> list[dict[str, str]]:
    return [dict(row.cells) for row in read_rows(path, **options)]


def test_a_stray_quote_in_a_tsv_joins_no_lines(tmp_path: Path) -> None:
    lines = ['"He said it was great\tpos', "A poor film\tneg", 'They said "fine"\tpos', 'the end"\tneg']
    (tmp_path / "a.tsv").write_text("\n".join(["text\ttone", *lines]) + "\n")
    found = read_rows(tmp_path / "a.tsv")
    assert [f"{row.cells['text']}\t{row.cells['tone']}" for row in found] == lines
    assert [row.where.rpartition(" ")[2] for row in found] == ["2", "3", "4", "5"]
    broken = ["text\ttone", *lines, "one cell alone"]
    (tmp_path / "b.tsv").write_text("\n".join(broken))
    with pytest.raises(DataError, match="has 1 cells, the header has 2") as error:
        read_rows(tmp_path / "b.tsv")
    assert str(error.value.where).endswith("line 6")


def test_a_tsv_of_pandas_has_line_breaks_in_quotes(tmp_path: Path) -> None:
    rows = [["text", "tone"], ['a "b"\nc', "pos"], ["tab\there", "neg"], ["plain", "pos"]]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    assert [[row["text"], row["tone"]] for row in cells(tmp_path / "a.tsv")] == rows[1:]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (",text,tone\n0,good,happy\n", {"text": "good", "tone": "happy"}),
        ("text,tone,,,\ngood,happy,,,\n", {"text": "good", "tone": "happy"}),
        ("text;tone\ngood, very;happy\n", {"text": "good, very", "tone": "happy"}),
        ("text\ttone\ngood, very\thappy\n", {"text": "good, very", "tone": "happy"}),
        (f"text,tone\n{'x' * 200_000},happy\n", {"text": "x" * 200_000, "tone": "happy"}),
    ],
    ids=["index without a name", "Kaggle's empty columns", "semicolons", "tabs", "a long cell"],
)
def test_tables_as_people_have_them(tmp_path: Path, content: str, expected: dict[str, str]) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(content)
    assert cells(tmp_path / "a.csv") == [expected]
    assert csv.field_size_limit() == before, "the limit of the process is what it was"


def test_other_encodings_are_an_option(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,tone\ncafé,happy\n".encode("latin-1"))
    with pytest.raises(DataError, match="--encoding latin-1"):
        read_rows(tmp_path / "a.csv")
    assert cells(tmp_path / "a.csv", encoding="latin-1")[0]["text"] == "café"
    with pytest.raises(ConfigError, match="no encoding 'klingon'"):
        read_rows(tmp_path / "a.csv", "klingon")


def test_nested_columns_that_nobody_asks_for_and_nan(tmp_path: Path) -> None:
    row = {"text": "good", "tone": "happy", "answers": {"text": ["a"], "start": [0]}, "score": float("nan")}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    found = read_rows(tmp_path / "a.jsonl")
    assert found[0].cells == {"text": "good", "tone": "happy", "score": ""}
    assert samples(found, PROMPT)[0].answer == "happy"
    with pytest.raises(DataError, match="column 'answers' is a dict"):
        samples(found, PromptConfig(template="{answers}", answer_column="tone"))
    (tmp_path / "b.jsonl").write_text('{"text": "good", "tone": NaN}\n')
    with pytest.raises(DataError, match="the answer is empty"):
        samples(read_rows(tmp_path / "b.jsonl"), PROMPT)


def test_the_area_under_the_curve_from_ranks() -> None:
    torch.manual_seed(0)
    scores, answers = torch.randn(60).mul(2).round(), torch.arange(60) % 3 - (torch.arange(60) % 3 == 2).long() * 3
    difference = scores[answers == 1][:, None] - scores[answers == 0][None]
    pairs = (difference > 0).double().mean() + 0.5 * (difference == 0).double().mean()
    assert auc(scores, answers) == pytest.approx(float(pairs), abs=1e-12), "with equal scores, and rows of no choice"
    assert auc(torch.tensor([0.0, 1.0]), torch.tensor([1, 1])) is None
    assert auc(torch.arange(4.0), torch.tensor([0, 0, 1, 1])) == 1.0


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    """What is quadratic in rows takes minutes or gigabytes here; the bound is far from what is linear."""
    many = 100_000
    lines = [f'"row {i}, long",{"happy" if i % 3 else "sad"}' for i in range(many)]
    (tmp_path / "a.csv").write_text("text,tone\n" + "\n".join(lines) + "\n")
    begun = time.process_time()
    texts = samples(read_rows(tmp_path / "a.csv"), PROMPT)
    training, validation = split(texts, 0.1, seed=0)
    area = auc(torch.randn(many), (torch.arange(many) % 2))
    assert len(training) + len(validation) == many and area is not None and 0.45 < area < 0.55
    assert time.process_time() - begun < 60
