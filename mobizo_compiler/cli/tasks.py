"""The tasks of the paper on the command line: `compile --for` and the `--task` of finetune, tune and evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mobizo_compiler.cli.app import Remarks
from mobizo_compiler.cli.progress import Bar
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.step.estimators import get_estimator
from mobizo_compiler.text.confusion import Confusion
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.paper_tasks import (
    ANSWER_TOKENS,
    BATCH_TIMES_QUERIES,
    LORA,
    MOST_TOKENS,
    PAPER_TASKS,
    QUERIES,
    ROWS,
    TRAINING,
    get_task,
)
from mobizo_compiler.text.prompts import PromptConfig, Sample, samples
from mobizo_compiler.text.question_answering import answer_questions
from mobizo_compiler.text.rows import read_rows
from mobizo_compiler.text.splits import Split, read_split, split_files
from mobizo_compiler.text.tasks import Task

TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="A task of the paper, which says how rows of its data set become prompts, answers and a score: "
        f"{', '.join(PAPER_TASKS)}.",
        show_default=False,
    ),
]
TaskRows = Annotated[
    int, typer.Option("--task-rows", min=1, help="Rows that --task takes of a split at most: the first ones.")
]
_EXAMPLE_TOKENS = 64  # of the inputs that a program of every length is captured with


# -- compile -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PaperProgram:
    """Options of `mobizo compile`, with the paper's where nothing was given."""

    lora: dict[str, Any]
    zo: dict[str, Any]
    loss: dict[str, Any]
    generate: dict[str, Any]
    words: dict[str, str]
    template: str | None
    rows: int
    tokens: int
    max_tokens: int | None

    @classmethod
    def of(
        cls,
        task: Task,
        lora: Mapping[str, Any],
        zo: Mapping[str, Any],
        loss: Mapping[str, Any],
        generate: Mapping[str, Any],
        rows: int | None,
        tokens: int | None,
        max_tokens: int | None,
        *,
        split_prefix: bool,
    ) -> PaperProgram:
        """What a task asks for.

        Args:
            task: The task.
            lora: Options of the adapters, as given; so are those of the estimate, the loss and generation.
            zo: See `lora`.
            loss: See `lora`.
            generate: See `lora`.
            rows: Of a batch.
            tokens: Of a row.
            max_tokens: Of a row where every length is taken.
            split_prefix: Whether there is a prefix, which goes with rows of one length only, as a gradient does.

        Raises:
            ConfigError: The choice between words is to be trained, and the task has none.
        """
        zo = {"queries": QUERIES, **zo}
        estimator = get_estimator(zo.get("estimator", "two-sided"))
        rows = rows or max(1, BATCH_TIMES_QUERIES // (zo["queries"] if estimator.lanes(2) > 1 else 1))
        if tokens is None and max_tokens is None:
            fixed = split_prefix or estimator.differentiates
            tokens, max_tokens = (MOST_TOKENS, None) if fixed else (_EXAMPLE_TOKENS, MOST_TOKENS)
        tokens = tokens or min(_EXAMPLE_TOKENS, max_tokens or MOST_TOKENS)
        words, template = dict[str, str](), None
        if loss.get("kind") == "choice":
            if not task.words:
                raise ConfigError(
                    f"the rows of {task.name} do not share their answers, which the loss choice is about",
                    hint="leave out --loss: answers of a row's own are scored as wholes",
                )
            words, template = dict(task.words), task.template
        else:
            loss = {"max_labels": task.max_labels, **loss}
        if task.references is not None:
            generate = {"context": (max_tokens or tokens) + ANSWER_TOKENS, **generate}
        lora = {**LORA, **lora}
        return cls(lora, zo, dict(loss), dict(generate), words, template, rows, tokens, max_tokens)


def check_alone(task: str, classes: Path | None, adapter: Path | None, template: str | None, words: str | None) -> None:
    """Raise `ConfigError` where other options say what the task of --for says."""
    if task != "causal-lm":
        raise ConfigError("the tasks of the paper are for language models", hint="leave out --task, or --for")
    others = {"--classify": classes, "--adapter": adapter, "--template": template, "--label-words": words}
    if given := [name for name, value in others.items() if value is not None]:
        raise ConfigError(f"--for and {given[0]} are both given", hint="leave out one of them")


# -- finetune, tune, evaluate, predict ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """How the rows of a command are read: as a task of the paper has them, or as they are.

    Args:
        task: The task, if there is one.
        encoding: Of text files.
        most: Rows of a split that a task takes at most.
    """

    task: Task | None
    encoding: str
    most: int = ROWS

    @classmethod
    def of(cls, name: str | None, encoding: str, most: int = ROWS, record: Mapping[str, Any] | None = None) -> Asked:
        """The task that is named, or that of a run before.

        Raises:
            ConfigError: There is no such task.
        """
        named = name or (record or {}).get("task")
        return cls(None if named is None else get_task(named), encoding, most)

    @property
    def prompt(self) -> dict[str, Any] | None:
        """How rows become prompts where nothing else is said, as JSON; None without a task."""
        return None if self.task is None else self.task.prompt.to_json()

    def read(
        self, path: Path, prompt: PromptConfig, split: Split, remark: Remarks
    ) -> tuple[list[Sample], PromptConfig]:
        """The samples of a file or folder, and how they become prompts."""
        if self.task is None:
            rows = read_rows(path, self.encoding)
            prompt = prompt.for_rows(rows)
            return samples(rows, prompt), prompt
        rows = read_split(path, split, self.encoding)
        if len(rows) > self.most:
            remark(f"the first {self.most} of {len(rows)} rows for {split} (--task-rows)")
        return self.task.samples(rows[: self.most], prompt), prompt

    def has_validation(self, path: Path) -> bool:
        """Whether a folder has a split for validation beside the one for training."""
        found = [] if self.task is None else split_files(path, "validation")
        return bool(found) and self.task is not None and found != split_files(path, "train")

    def training(self, given: Mapping[str, Any], manifest: Manifest, remark: Remarks) -> dict[str, Any]:
        """Options of training: as given, else the paper's, which are for estimates of few directions."""
        if self.task is None:
            return dict(given)
        zo = manifest.zo
        if zo.differentiates or zo.normalize or manifest.rule["name"] != "sgd":
            remark("the paper's steps and learning rate are not those of this estimate and rule: left out", "yellow")
            return {"validate_every": TRAINING["validate_every"], "validation_rows": self.most, **given}
        paper = {**TRAINING, "validation_rows": self.most, "learning_rate": self.task.learning_rate(zo.queries)}
        if "epochs" in given:
            del paper["steps"]
        found = {**paper, **given}
        length = f"{found['epochs']} epochs" if "steps" not in found else f"{found['steps']} steps"
        remark(f"{self.task.title}: {length}, learning rate {found['learning_rate']:g}, {zo.queries} queries")
        return found


def task_score(
    task: Task,
    session: Session,
    tokenizer: Any,
    data: TextData,
    texts: Sequence[Sample],
    confusion: Confusion | None,
    bar: Bar,
    remark: Remarks,
) -> dict[str, float | None]:
    """What a task reports beside the loss and the accuracy, by name."""
    if task.metric == "f1" and confusion is not None:
        return {f"F1 of {confusion.choices[1]}": confusion.f1[1]}
    if task.metric != "squad":
        return {}
    if session.program.manifest.generate is None:
        remark(
            "answers were not written, so there is no F1 and no exact match: the program has no cache to generate with "
            "(compile with --generate-context); the loss is of the right answer's tokens",
            "yellow",
        )
        return {"F1": None, "exact match": None}
    bar.begin(0, len(data), "writing answers")
    found = answer_questions(session, tokenizer, data, texts, ANSWER_TOKENS, bar.done)
    return {"F1": found.f1, "exact match": found.exact_match}
