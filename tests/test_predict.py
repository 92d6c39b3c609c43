"""Classes of new messages: `mobizo predict`, `Classifier`, and where a classifier is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mobizo_compiler as mobizo
from mobizo_compiler import cli
from mobizo_compiler.cli.classes import confusion_table
from mobizo_compiler.errors import DataError
from mobizo_compiler.text.confusion import Confusion
from mobizo_compiler.text.prediction import Classifier
from mobizo_compiler.text.prompts import PromptConfig

pytestmark = pytest.mark.xdist_group("cli")  # one process, so that its programs are made once

PROMPT = ("--template", r"Message :\n{text}", "--answer-column", "tone")
TEXTS = ("good day", "grim rain", "lovely food", "work")


def run(*arguments: Any, code: int = 0, columns: int = 100) -> tuple[str, str]:
    env = {"COLUMNS": str(columns)}
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env=env, catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def trained(tiny_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("predict")
    rows = [f"{word} {thing},{tone}" for word, tone in (("good", "happy"), ("bad", "sad"), ("fine", "happy"))
            for thing in ("day", "rain", "food")]  # fmt: skip
    (folder / "rows.csv").write_text("\n".join(["text,tone", *rows]))
    line = ("finetune", tiny_program, "--data", folder / "rows.csv", "--run", folder / "run", *PROMPT)
    out, _ = run(*line, "--steps", 4, "--learning-rate", 0.5, "--validation-share", 0, "--no-plot")
    assert "mobizo predict" in out and "mobizo generate" not in out, "the program chooses, it does not write"
    return folder / "run"


@pytest.fixture(scope="module")
def expected(trained: Path, tiny_program: Path, tiny_model: Path) -> list[list[float]]:
    """Probabilities of both answers by transformers, with the run's adapter merged into the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    session = mobizo.Session(tiny_program)
    session.restore(trained)
    session.merge_into(model)
    answers = tokenizer.convert_tokens_to_ids(["happy", "sad"])
    with torch.no_grad():
        ids = [tokenizer(f"Message :\n{text}", return_tensors="pt").input_ids for text in TEXTS]
        return [model(one).logits[0, -1, answers].softmax(-1).tolist() for one in ids]


def test_one_text_is_answered_without_options(trained: Path, tiny_program: Path, expected: list[list[float]]) -> None:
    for text, wanted in zip(TEXTS, expected, strict=True):
        found = json.loads(run("predict", tiny_program, text, "--run", trained, "--json")[0])
        (row,) = found["rows"]
        assert list(row["probabilities"]) == ["happy", "sad"] and found["steps"] == 4
        assert list(row["probabilities"].values()) == pytest.approx(wanted, abs=1e-4)
        assert row["predicted"] == ("happy" if wanted[0] > wanted[1] else "sad")
    shown, _ = run("predict", tiny_program, "work", "--run", trained)
    assert shown.split()[0] == row["predicted"] and f"{max(expected[-1]):.3f}" in shown


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_a_file_is_answered_row_by_row(
    suffix: str, trained: Path, tiny_program: Path, expected: list[list[float]], tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text('id,text\n7,good day\n8,grim rain\n9,"lovely food"\n10,work\n')
    out, _ = run(
        "predict", tiny_program, "--data", tmp_path / "new.csv", "--run", trained, "--output", tmp_path / f"a.{suffix}"
    )
    text = (tmp_path / f"a.{suffix}").read_text()
    if suffix in ("csv", "tsv"):
        rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines(), delimiter="\t" if suffix == "tsv" else ","))
        found = [[float(row["p_happy"]), float(row["p_sad"])] for row in rows]
    else:
        rows = json.loads(text) if suffix == "json" else [json.loads(line) for line in text.splitlines()]
        found = [list(row["probabilities"].values()) for row in rows]
    assert [(row["id"], row["text"]) for row in rows] == list(zip(("7", "8", "9", "10"), TEXTS, strict=True))
    assert [row["predicted"] for row in rows] == ["happy" if p[0] > p[1] else "sad" for p in expected]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)
    assert "4 rows" in out and f"a.{suffix}" in out


def test_rows_on_the_terminal_and_as_json(trained: Path, tiny_program: Path, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"text": "good day"}\n{"text": "grim rain"}\n')
    line = ("predict", tiny_program, "--data", tmp_path / "new.jsonl", "--run", trained)
    found = json.loads(run(*line, "--json")[0])
    table = run(*line)[0]
    for row in found["rows"]:
        assert row["text"] in table and f"{row['probabilities'][row['predicted']]:.3f}" in table
    assert (
        "best validation" in run(*line, "--best", code=1)[1] or "no validated state" in run(*line, "--best", code=1)[1]
    )


def test_the_program_itself_without_a_run(tiny_program: Path) -> None:
    found = json.loads(run("predict", tiny_program, "good day", "--template", "Message : {text}", "--json")[0])
    assert found["steps"] == 0 and list(found["rows"][0]["probabilities"]) == ["happy", "sad"]


def test_what_cannot_be_answered(trained: Path, tiny_program: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("message\nhello\n")
    line = ("predict", tiny_program, "--run", trained)
    assert "there is no column 'text'" in run(*line, "--data", tmp_path / "a.csv", code=1)[1]
    assert "a text or --data" in run(*line, code=2)[1]
    assert "a text or --data" in run(*line, "hello", "--data", tmp_path / "a.csv", code=2)[1]
    assert "ends in .csv" in run(*line, "hello", "--output", tmp_path / "a.xls", code=1)[1]
    assert "no such folder" in run(*line, "hello", "--output", tmp_path / "no" / "a.csv", code=1)[1]
    assert "2 columns" in run(*line, "hello", "--template", "{a} {b}", code=1)[1]
    assert "no run in this folder" in run(*line[:2], "hello", "--run", tmp_path, code=1)[1]
    (tmp_path / "b.csv").write_text("text,predicted\nhello,1\n")
    error = run(*line, "--data", tmp_path / "b.csv", "--output", tmp_path / "c.csv", code=1)[1]
    assert "'predicted'" in error and not (tmp_path / "c.csv").exists()


def test_answers_that_are_no_closed_set(tiny_program: Path, words: Any) -> None:
    session = mobizo.Session(tiny_program)
    manifest = session.program.manifest
    labels = dataclasses.replace(manifest.labels, choices=None)
    session.program = dataclasses.replace(
        session.program, manifest=dataclasses.replace(manifest, labels=labels, max_labels=None, answers=None)
    )
    with pytest.raises(DataError, match=r"no closed set(.|\n)*--choices"):
        Classifier(session, words, PromptConfig(template="{text}"))
    config = PromptConfig(template="{text} :", choices=("happy", "sad sad"), end_answers=False)
    found = Classifier(session, words, config).predict([{"text": "good day"}])[0]
    logs = []
    for answer in config.choices or ():
        ids, start = words(f"good day : {answer}").input_ids, 3
        inputs = torch.tensor([ids + [0] * (12 - len(ids))] * 2)
        mask = torch.tensor([[1] * len(ids) + [0] * (12 - len(ids))] * 2)
        logits = session.evaluate({"input_ids": inputs, "attention_mask": mask}).logits[0].double().log_softmax(-1)
        logs.append(sum(logits[t - 1][ids[t]] for t in range(start, len(ids))))
    assert list(found.probabilities.values()) == pytest.approx(torch.stack(logs).softmax(0).tolist(), abs=1e-4)


def test_where_a_classifier_is_wrong() -> None:
    found = Confusion.of(torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 0, 0]), ("a", "b", "c"))
    assert found.counts == ((2, 1, 0), (1, 2, 0), (0, 0, 0))
    assert found.precision == (pytest.approx(2 / 3), pytest.approx(2 / 3), None)
    assert found.recall == (pytest.approx(2 / 3), pytest.approx(2 / 3), None)
    assert found.f1 == (pytest.approx(2 / 3), pytest.approx(2 / 3), None)
    assert found.macro_f1 == pytest.approx(2 / 3), "a class that is neither there nor chosen does not count"
    never = Confusion.of(torch.tensor([0, 0]), torch.tensor([0, 1]), ("a", "b"))
    assert never.f1 == (pytest.approx(2 / 3), 0.0) and never.precision[1] is None
    assert Confusion.of(torch.tensor([0, 1]), torch.tensor([-1, 1]), ("a", "b")).counts == ((0, 0), (0, 1))


def test_many_answers_are_shown_by_what_they_are_taken_for(capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(f"class{k}" for k in range(9))
    found = Confusion.of(torch.tensor([0, 1, 2, 3, 0, 0]), torch.tensor([0, 1, 2, 4, 4, 4]), names)
    Console(width=100).print(confusion_table(found))
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["class4"] == ["class4", "3", "-", "0.000", "0.000", "class0", "(2)"]
    assert lines["class8"] == ["class8", "0", "-", "-", "-"] and "as" not in lines["right"]


def test_evaluate_shows_what_is_taken_for_what(trained: Path, tiny_program: Path) -> None:
    line = ("evaluate", tiny_program, "--data", trained.parent / "rows.csv", "--run", trained)
    found = json.loads(run(*line, "--json")[0])
    counts = torch.tensor(found["confusion"])
    assert counts.sum() == found["rows"] == 9 and counts.sum(1).tolist() == [6, 3]
    assert float(counts.diag().sum()) / 9 == pytest.approx(found["accuracy"])
    for place, name in enumerate(found["choices"]):
        right, all_of, chosen = counts[place, place], counts[place].sum(), counts[:, place].sum()
        assert found["classes"][name]["f1"] == pytest.approx(float(2 * right / (all_of + chosen)))
    table = run(*line)[0]
    assert "F1" in table and "happy" in table and "macro" in table
