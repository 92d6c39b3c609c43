r"""Tasks: how the rows of a known data set become prompts, answers and a score.

    task = get_task("rte")
    texts = task.samples(read_split("glue/rte", "train"), task.prompt)
    data = TextData.encode(texts, program.manifest, tokenizer, task.prompt)

A task is data. What its table cannot say with columns in braces, Jinja says: the template of a column that is made of
others, and expressions for the answers that a row brings with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mobizo_compiler.errors import DataError
from mobizo_compiler.optional import optional
from mobizo_compiler.text.prompts import PromptConfig, Sample, samples, template_columns
from mobizo_compiler.text.rows import Row

TARGET = "target"  # the column that the right answer of a row is put into


@dataclasses.dataclass(frozen=True)
class Task:
    """How the rows of a data set become prompts, answers and a score.

    Where rows share their answers, `words` names them; where each has answers of its own, `options` finds them; where
    the answer is free text, `references`.

    Args:
        name: As it is asked for.
        title: As papers call it.
        source: The data set and its configuration in `datasets`.
        template: The prompt, with columns in braces, as in `PromptConfig`.
        label: Column of the right answer.
        words: The word of each class by its name, in the order of the classes' numbers.
        options: Jinja expression: a row's own answers.
        labels: Jinja expression: what `label` has for each of a row's own answers.
        references: Jinja expression: the texts that are right, of which the first is learnt.
        made: Columns that are made of others, by Jinja templates.
        other_names: Names that columns have in other copies of the data.
        metric: What is reported: accuracy; "f1", of the second class; or "squad", F1 of words and exact match.
        max_labels: The most tokens of an answer that a program is compiled for.
        learning_rates: The paper's, by number of queries.
    """

    name: str
    title: str
    source: str
    template: str
    label: str = "label"
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: str | None = None
    labels: str | None = None
    references: str | None = None
    made: Mapping[str, str] = dataclasses.field(default_factory=dict)
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metric: Literal["accuracy", "f1", "squad"] = "accuracy"
    max_labels: int = 4
    learning_rates: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have, in the order of their use.

        >>> Task("a", "", "", "{x} {y}", words={"no": "No", "yes": "Yes"}, made={"x": "{{ z | lower }}"}).columns
        ('y', 'z', 'label')
        """
        inner = [*self.made.values(), *(f"{{{{ {text} }}}}" for text in self._expressions.values())]
        used = [name for name in template_columns(self.template) if name not in self.made]
        used += [name for text in inner for name in sorted(_undeclared(text))]
        return tuple(dict.fromkeys(used if self.references else [*used, self.label]))

    @property
    def prompt(self) -> PromptConfig:
        """How samples become prompts and answers; free text ends with the end-of-text token."""
        named = tuple(f"{name}={word}" for name, word in self.words.items())
        return PromptConfig(
            template=self.template,
            answer_column=TARGET,
            choices=tuple(self.words) or None,
            label_words=named or None,
            end_answers=self.references is not None,
        )

    def learning_rate(self, queries: int) -> float:
        """The paper's, for the number of queries that is closest to one that it has.

        >>> Task("a", "", "", "{x}", learning_rates={1: 5e-5, 16: 1e-4}).learning_rate(12)
        0.0001
        """
        return self.learning_rates[min(self.learning_rates, key=lambda known: abs(known - queries))]

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with the columns that the prompt takes; white space around cells is taken off.

        Raises:
            DataError: A row lacks a column, or a column is not what it is in the data set.
        """
        return [Row(self._cells(row, self._values(row)), row.where) for row in rows]

    def samples(self, rows: Sequence[Row], config: PromptConfig) -> list[Sample]:
        """Rows as samples, with the answers that are a row's own.

        Args:
            rows: As `datasets` has them: a class by its number or by its name.
            config: Of the prompt: `Task.prompt`, or that with other choices.

        Raises:
            DataError: As in `rows`; or a row has no right answer.
        """
        made, own = [], []
        for row in rows:
            values = self._values(row)
            options, references = self._list("options", values, row), self._list("references", values, row)
            if self.references is None:
                target = self._right(values, options, row)
            elif not references:
                raise DataError("the row has no answer", where=row.where, hint="leave it out")
            else:
                target = references[0]
            made.append(Row({**self._cells(row, values), TARGET: target}, row.where))
            own.append((options, references))
        pairs = zip(samples(made, config), own, strict=True)
        return [dataclasses.replace(sample, options=some, references=right) for sample, (some, right) in pairs]

    @property
    def _expressions(self) -> dict[str, str]:
        named = {"options": self.options, "labels": self.labels, "references": self.references}
        return {name: text for name, text in named.items() if text is not None}

    def _values(self, row: Row) -> dict[str, Any]:
        """What a row holds, by the names that the task has for its columns."""
        values = {**{name: cell.strip() for name, cell in row.cells.items()}, **row.nested}
        for other, name in self.other_names.items():
            if name not in values and other in values:
                values[name] = values[other]
        if missing := [name for name in self.columns if name not in values and name != self.label]:
            raise DataError(
                f"there is no column {missing[0]!r}",
                where=row.where,
                hint=f"the columns are {', '.join(values)}; the task {self.name} takes {', '.join(self.columns)}, as "
                f"{self.source} has them",
            )
        return values

    def _cells(self, row: Row, values: Mapping[str, Any]) -> dict[str, str]:
        cells = {name: value for name, value in values.items() if isinstance(value, str)}
        with _Explained(self, row):
            made = {name: _template(text).render(values) for name, text in self.made.items()}
        return cells | made

    def _list(self, field: str, values: Mapping[str, Any], row: Row) -> tuple[str, ...]:
        """The texts that an expression of the task finds in a row; none if it has no such expression."""
        if field not in self._expressions:
            return ()
        with _Explained(self, row):
            found = _expression(self._expressions[field])(values)
            return tuple(str(text).strip() for text in found)

    def _right(self, values: Mapping[str, Any], options: tuple[str, ...], row: Row) -> str:
        """The right one of the classes, or of the row's own answers."""
        answers = options or tuple(self.words)
        labels = self._list("labels", values, row) or tuple(map(str, range(len(answers))))
        names = [name.lower() for name in self.words]
        given = str(values.get(self.label, ""))
        if given in labels:
            return answers[labels.index(given)]
        if given.lower() in names:
            return answers[names.index(given.lower())]
        what = f"{self.label} is {given!r}" if self.label in values else f"there is no column {self.label!r}"
        named = f", or one of {', '.join(self.words)}" if self.words else ""
        raise DataError(
            f"{what}; it must be one of {', '.join(labels)}{named}",
            where=row.where,
            hint="splits for tests often have no answers: take the one for training or for validation",
        )


class _Explained:
    """Within the block, what Jinja cannot make of a row is said of that row."""

    def __init__(self, task: Task, row: Row) -> None:
        self._task, self._row = task, row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        template_error = optional("jinja2", "a task").TemplateError
        if isinstance(error, (template_error, TypeError, ValueError, LookupError)):
            raise DataError(
                f"the row is not one of {self._task.source}: {error}",
                where=self._row.where,
                hint=f"its columns {', '.join(self._task.columns)} must be as datasets has them; a CSV cannot hold "
                "lists, JSON lines and parquet can",
            ) from None


@functools.cache
def _environment() -> Any:
    jinja = optional("jinja2", "a task")
    return jinja.Environment(undefined=jinja.StrictUndefined, keep_trailing_newline=True)


@functools.cache
def _template(text: str) -> Any:
    return _environment().from_string(text)


@functools.cache
def _expression(text: str) -> Any:
    return _environment().compile_expression(text, undefined_to_none=False)


@functools.cache
def _undeclared(text: str) -> set[str]:
    meta = optional("jinja2.meta", "a task")
    return set(meta.find_undeclared_variables(_environment().parse(text)))
