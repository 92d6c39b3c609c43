"""The tasks of the paper: rows as `datasets` has them become prompts, answers and scores."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mobizo_compiler.cli.tasks import PaperProgram
from mobizo_compiler.errors import ConfigError, DataError, MissingPackageError
from mobizo_compiler.text.paper_tasks import PAPER_TASKS, get_task
from mobizo_compiler.text.prompts import Sample
from mobizo_compiler.text.rows import read_rows, row_of
from mobizo_compiler.text.splits import read_split, split_files
from tests import test_predict as predict

pytestmark = pytest.mark.xdist_group("cli")  # one process, so that its programs are made once

YES_NO = "Yes or No?\n"
CHOICES = {"text": ["ice", "iron", "wood"], "label": ["A", "B", "C"]}
# A row as datasets has it, the prompt, and the right answer, or the row's own answers with it in front.
ROWS: dict[str, tuple[dict[str, Any], str, str | list[str]]] = {
    "sst2": ({"sentence": "a fine film . ", "label": 1}, "a fine film . It was", "positive"),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1},
        f'It rains.\nDoes this mean that "It is wet." is true? {YES_NO}',
        "not_entailment",
    ),
    "mrpc": (
        {"sentence1": "A.", "sentence2": "B.", "label": 1},
        f"Do the following two sentences mean the same thing? {YES_NO}Sentence 1: A.\nSentence 2: B.\n",
        "equivalent",
    ),
    "qqp": (
        {"question1": "A?", "question2": "B?", "label": 0},
        f"Are these two questions asking the same thing? {YES_NO}Question 1: A?\nQuestion 2: B?\n",
        "not_duplicate",
    ),
    "qnli": (
        {"question": "Who?", "sentence": "Ann.", "label": 0},
        f"Does this sentence answer the question? {YES_NO}Question: Who?\nSentence: Ann.\n",
        "entailment",
    ),
    "wnli": (
        {"sentence1": "A.", "sentence2": "B.", "label": 0},
        f"Given the first sentence, is the second sentence true? {YES_NO}Sentence 1: A.\nSentence 2: B.\n",
        "not_entailment",
    ),
    "boolq": ({"passage": "Ice melts.", "question": "does ice melt", "label": 1}, "Ice melts. Does ice melt?", "True"),
    "wsc": (
        {"text": "Mark said He left.", "span1_text": "Mark", "span2_text": "He", "label": 1},
        f'Mark said He left.\nIn the previous sentence, does the pronoun "he" refer to Mark? {YES_NO}',
        "True",
    ),
    "wic": (
        {"word": "bank", "sentence1": "A.", "sentence2": "B.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA.\nB.\n',
        "False",
    ),
    "multirc": (
        {"paragraph": "P.", "question": "Q?", "answer": "Ann", "label": 1},
        f'P.\nQuestion: Q?\nI found this answer "Ann". Is that correct? {YES_NO}',
        "True",
    ),
    "copa": (
        {"premise": "I fell.", "choice1": "The ice was slick.", "choice2": "I ran.", "question": "cause", "label": 1},
        "I fell because",
        ["I ran.", "the ice was slick."],
    ),
    "winogrande": (
        {"sentence": "Ann met Eve because _ called.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Ann met Eve because",
        ["Eve called.", "Ann called."],
    ),
    "arc-easy": (
        {"question": "What melts?", "choices": CHOICES, "answerKey": "A"},
        "Pick the most correct option to answer the following question.\nWhat melts?\nOptions:\n"
        "- A: ice\n- B: iron\n- C: wood\nAnswer:",
        ["A", "B", "C"],
    ),
    "arc-challenge": (
        {"question": "What rusts?", "choices": CHOICES | {"label": ["1", "2", "3"]}, "answerKey": "2"},
        "Pick the most correct option to answer the following question.\nWhat rusts?\nOptions:\n"
        "- 1: ice\n- 2: iron\n- 3: wood\nAnswer:",
        ["2", "1", "3"],
    ),
    "squad": (
        {"title": "T", "context": "C.", "question": "Q?", "answers": {"text": ["in Paris", "Paris"]}},
        "Title: T\nContext: C.\nQuestion: Q?\nAnswer:",
        "in Paris",
    ),
}


def sample_of(name: str, **changed: Any) -> Sample:
    task = get_task(name)
    values = {key: value for key, value in {**ROWS[name][0], **changed}.items() if value is not None}
    return task.samples([row_of(values, "here, line 3")], task.prompt)[0]


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_every_task_makes_prompts_and_answers(name: str) -> None:
    values, prompt, right = ROWS[name]
    task, found = get_task(name), sample_of(name)
    assert task.prompt.render(found.cells) == prompt
    assert set(task.columns) == set(values), "its columns are those of the data set that it needs"
    if isinstance(right, str):
        assert found.answer == right and not found.options
    else:
        assert found.answer == right[0] and sorted(found.options) == sorted(right)
    assert bool(task.words) + (task.options is not None) + (task.references is not None) == 1
    assert set(task.learning_rates) == {1, 4, 16} and all(5e-5 <= rate <= 5e-4 for rate in task.learning_rates.values())
    for column in set(task.columns) - {task.label}:
        with pytest.raises(DataError, match=f"no column '{column}'") as error:
            sample_of(name, **{column: None})
        assert f"the task {name} takes" in str(error.value) and "line 3" in str(error.value)


def test_a_class_is_a_number_a_name_or_true_or_false() -> None:
    assert [sample_of("rte", label=label).answer for label in (0, "0", "Entailment", "entailment")] == [
        "entailment"
    ] * 4
    assert [sample_of("boolq", label=label).answer for label in (True, "True", 1)] == ["True"] * 3
    row = {"passage": "P.", "question": "is it so", "answer": False}  # as google/boolq has it
    assert get_task("boolq").samples([row_of(row, "")], get_task("boolq").prompt)[0].answer == "False"
    row = {"sentence1": "A.", "sentence2": "B.", "label": 0}  # as glue has it
    assert get_task("rte").samples([row_of(row, "")], get_task("rte").prompt)[0].cells["premise"] == "A."
    for name, label in (("rte", -1), ("rte", ""), ("sst2", "good"), ("copa", 2)):
        with pytest.raises(DataError, match="it must be one of 0, 1") as error:
            sample_of(name, label=label)
        assert f"label is {str(label)!r}" in str(error.value) and "splits for tests" in str(error.value)
    with pytest.raises(DataError, match="there is no column 'answerKey'"):
        sample_of("arc-easy", answerKey=None)


def test_rows_that_are_not_of_the_data_set() -> None:
    for name, changed in (
        ("arc-easy", {"choices": "ice, iron"}),
        ("arc-easy", {"choices": ["ice", "iron"]}),
        ("winogrande", {"sentence": "no gap"}),
        ("copa", {"question": "why"}),
        ("copa", {"choice1": ""}),
        ("boolq", {"question": ""}),
        ("squad", {"answers": "Paris"}),
    ):
        with pytest.raises(DataError, match="the row is not one of") as error:
            sample_of(name, **changed)
        assert "line 3" in str(error.value) and "parquet" in str(error.value)
    with pytest.raises(DataError, match="no answer"):
        sample_of("squad", answers={"text": []})


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sst2'") as error:
        get_task("SST-2")
    assert "winogrande" in str(error.value)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_splits_of_a_folder(tmp_path: Path) -> None:
    line = json.dumps(ROWS["rte"][0])
    files = ("train.jsonl", "validation.jsonl", "test.jsonl", "training_notes.txt", "train.md")
    for name in files:
        (tmp_path / name).write_text(f"{line}\n")
    assert split_files(tmp_path, "train") == [tmp_path / "train.jsonl"]
    assert len(read_split(tmp_path, "validation")) == 1
    assert len(read_split(tmp_path / "test.jsonl", "validation")) == 1, "a file is read whatever its name is"
    (tmp_path / "train.csv").write_text("premise,hypothesis,label\na,b,0\n")
    with pytest.raises(DataError, match=r"train.csv and as train.jsonl"):
        read_split(tmp_path, "train")
    with pytest.raises(DataError, match="no such file or folder"):
        read_split(tmp_path / "gone", "train")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number in (1, 0):
        (tmp_path / "hub" / "data" / f"train-0000{number}-of-00002.jsonl").write_text(f'{{"n": {number}}}\n')
    (tmp_path / "hub" / "data" / "dev.csv").write_text("n\n7\n")
    assert [row.cells["n"] for row in read_split(tmp_path / "hub", "train")] == ["0", "1"]
    assert [row.cells["n"] for row in read_split(tmp_path / "hub", "validation")] == ["7"]
    with pytest.raises(DataError, match="no split for validation; there is data") as error:
        (tmp_path / "hub" / "data" / "dev.csv").unlink()
        read_split(tmp_path / "hub", "validation")
    assert "validation.jsonl" in str(error.value)


def test_parquet_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):
        read_split(tmp_path, "train")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is optional")
def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name in ("arc-easy", "squad"):
        table = pyarrow.Table.from_pylist([ROWS[name][0]])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        (row,) = read_rows(tmp_path / f"{name}.parquet")
        assert get_task(name).samples([row], get_task(name).prompt)[0] == dataclasses.replace(
            sample_of(name), where=row.where
        )
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="not parquet"):
        read_rows(tmp_path / "bad.parquet")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is optional")
def test_what_datasets_saved(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from datasets.table import InMemoryTable

    table = InMemoryTable(pyarrow.Table.from_pylist([ROWS["arc-easy"][0]] * 2))
    saved = datasets.Dataset(table, fingerprint="one")  # with a name, so that nothing is pickled to find one
    datasets.DatasetDict({"train": saved, "validation": saved}).save_to_disk(str(tmp_path / "both"))
    rows = read_split(tmp_path / "both", "train")
    found = get_task("arc-easy").samples(rows, get_task("arc-easy").prompt)
    assert len(found) == 2 and found[0].options == ("A", "B", "C")
    saved.save_to_disk(str(tmp_path / "one"))
    assert len(read_split(tmp_path / "one", "validation")) == 2, "what is not split is any split"


# -- commands ----------------------------------------------------------------------------------------------------------


def test_what_compile_takes_from_the_paper() -> None:
    def paper(name: str, tokens: int | None = None, prefix: bool = False, **given: Any) -> PaperProgram:
        zo, loss = given.pop("zo", {}), given.pop("loss", {})
        return PaperProgram.of(get_task(name), {"r": 4}, zo, loss, {}, None, tokens, None, split_prefix=prefix)

    found = paper("rte")
    assert found.lora == {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}, "what is given goes first"
    assert (found.rows, found.zo["queries"], found.max_tokens) == (4, 4, 512)
    assert [paper("rte", zo={"queries": q}).rows for q in (1, 4, 16, 32)] == [16, 4, 1, 1]
    exact = paper("rte", zo={"estimator": "exact"})
    assert (exact.rows, exact.tokens, exact.max_tokens) == (16, 512, None), "a gradient is for one length"
    assert paper("rte", prefix=True).max_tokens is None and paper("rte", tokens=32).max_tokens is None
    assert found.loss == {"max_labels": 4} and found.template is None and not found.generate
    assert paper("squad", tokens=64).generate == {"context": 114}
    choice = paper("rte", loss={"kind": "choice"})
    assert choice.words == {"entailment": "Yes", "not_entailment": "No"} and "max_labels" not in choice.loss
    with pytest.raises(ConfigError, match="do not share their answers"):
        paper("copa", loss={"kind": "choice"})


SMALL = ("--backend", "portable", "--tokens", 12, "--zo-queries", 2)


def test_compile_for_a_task(tiny_model: Path) -> None:
    out, _ = predict.run("compile", tiny_model, "--dry-run", "--json", "--for", "copa", *SMALL)
    found = json.loads(out)
    assert found["lanes"] == 4 and found["loss"]["max_labels"] == 32 and found["eps"] == 0.01
    assert sorted(site.rpartition(".")[2] for site in found["sites"]) == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert "did you mean 'copa'" in predict.run("compile", tiny_model, "--dry-run", "--for", "cop", code=1)[1]
    both = ("--for", "copa", "--template", "{text}")
    assert "leave out one" in predict.run("compile", tiny_model, "--dry-run", *both, code=1)[1]


WORDS = ("--label-words", "entailment=happy,not_entailment=sad")  # of which the tiny program has tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rte")
    for split, count in (("train", 8), ("validation", 4)):
        lines = [json.dumps({"premise": f"good {i}", "hypothesis": "day", "label": i % 2}) for i in range(count)]
        (path / f"{split}.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def trained(tiny_program: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    run = tmp_path_factory.mktemp("tasks") / "run"
    line = ("finetune", tiny_program, "--task", "rte", "--data", folder, "--run", run, *WORDS)
    out, remarks = predict.run(*line, "--steps", 2, "--task-rows", 6, "--no-plot")
    return run, out, remarks


def test_finetune_takes_splits_and_settings(trained: tuple[Path, str, str], folder: Path) -> None:
    run, out, remarks = trained
    record = json.loads((run / "run.json").read_text())
    assert record["task"] == "rte" and record["data"]["training_rows"] == 6 and record["data"]["validation_rows"] == 4
    settings = record["settings"]
    assert (settings["steps"], settings["learning_rate"], settings["schedule"]) == (2, 5e-5, "constant")
    assert settings["validate_every"] == 500
    assert "RTE: 2 steps, learning rate 5e-05, 4 queries" in remarks
    assert "the first 6 of 8 rows for train (--task-rows)" in remarks
    assert f"--data {folder}" in out.replace("\n", " ").replace("  ", " ") and "predict" not in out


def test_evaluate_and_predict_know_the_task_of_the_run(
    trained: tuple[Path, str, str], tiny_program: Path, folder: Path
) -> None:
    run = trained[0]
    found = json.loads(predict.run("evaluate", tiny_program, "--run", run, "--data", folder, "--json")[0])
    assert found["rows"] == 4 and found["task"] == "rte" and found["choices"] == ["entailment", "not_entailment"]
    out, _ = predict.run("predict", tiny_program, "--run", run, "--data", folder / "train.jsonl", "--json")
    assert len(json.loads(out)["rows"]) == 8


def test_the_score_of_a_task(tiny_program: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": "good", "sentence2": "day", "label": i % 2} for i in range(4)]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = ("evaluate", tiny_program, "--task", "mrpc", "--data", tmp_path)
    line = (*line, "--label-words", "not_equivalent=happy,equivalent=sad")
    found = json.loads(predict.run(*line, "--json")[0])
    assert found["task_scores"] == {"F1 of equivalent": found["classes"]["equivalent"]["f1"]}
    assert "F1 of equivalent" in predict.run(*line)[0]


def test_other_settings_than_the_papers(tiny_program: Path, folder: Path, tmp_path: Path) -> None:
    line = ("finetune", tiny_program, "--task", "rte", "--data", folder, "--run", tmp_path / "run", *WORDS, "--no-plot")
    _, remarks = predict.run(*line, "--epochs", 0.5, "--learning-rate", 0.1)
    assert "RTE: 0.5 epochs, learning rate 0.1" in remarks
    assert json.loads((tmp_path / "run" / "run.json").read_text())["summary"]["steps"] == 2


def test_what_is_wrong_is_said_before_a_run_is_begun(tiny_program: Path, folder: Path, tmp_path: Path) -> None:
    def refused(*options: Any) -> str:
        return predict.run("finetune", tiny_program, "--run", tmp_path / "run", *options, code=1)[1]

    assert "did you mean 'rte'" in refused("--task", "RTE", "--data", folder)
    assert "no column 'question1'" in refused("--task", "qqp", "--data", folder)
    assert "no split for train" in refused("--task", "rte", "--data", tmp_path)
    assert "the program was compiled for" in refused("--task", "rte", "--data", folder)
    assert not (tmp_path / "run").exists()
