"""Classes of new rows: what a program that chooses between answers says to rows that nobody has answered.

prompt = PromptConfig.from_json(read_record("run1")["data"]["prompt"])     as the run has it
Classifier(session, tokenizer, prompt).predict([{"message": "my bell is loud"}])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import DataError
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import measure
from mobizo_compiler.text.prompts import PromptConfig, Sample
from mobizo_compiler.text.rows import Row, row_of

HINT = "--template and --prompt-column choose"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a row is taken for.

    Args:
        answer: The most likely answer.
        probabilities: Of all answers, in the order of the program; their sum is 1.
        cut: How many tokens of its prompt had to go.
    """

    answer: str
    probabilities: Mapping[str, float]
    cut: int = 0


class Classifier:
    """The choice between the answers of a program.

    Args:
        session: With the state to choose with.
        tokenizer: The model's.
        config: How rows become prompts. That of a run, in its `run.json`, has all that was found out in training.

    Raises:
        DataError: The program has no closed set of answers.
    """

    def __init__(self, session: Session, tokenizer: Any, config: PromptConfig) -> None:
        self._session, self._tokenizer, self._config = session, tokenizer, config
        known = self._encoded(())
        if known.choices is None:
            raise DataError(
                "the program was not compiled for a choice, and its answers are no closed set",
                hint="--choices a,b names them; mobizo generate writes text",
            )
        self.choices = known.choices
        # A row is encoded with an answer. The longest one leaves the room that every answer has.
        lengths = [len(ids) for ids in known.spelled] or [0]
        self._answer = self.choices[lengths.index(max(lengths))]

    def predict(
        self, rows: Sequence[Mapping[str, Any] | Row], done: Callable[[int], None] = lambda rows: None
    ) -> list[Prediction]:
        """The answers of rows.

        Args:
            rows: Text by column, the columns of the prompt among them.
            done: Told after each batch how many rows are done.

        Raises:
            DataError: A row lacks a column of the prompt, or its prompt does not fit the program.
        """
        named = [row if isinstance(row, Row) else row_of(row, f"row {n}") for n, row in enumerate(rows, start=1)]
        columns = self._config.columns
        texts = [
            Sample({column: row.cell(column, HINT) for column in columns}, self._answer, row.where) for row in named
        ]
        if not texts:
            return []
        data = self._encoded(texts)
        found = measure(self._session, data, done)
        assert found is not None and found.log_NC is not None
        both = zip(found.log_NC.exp(), data.encoded, strict=True)
        return [self._prediction(chances_C.tolist(), row.cut) for chances_C, row in both]

    def _encoded(self, texts: Sequence[Sample]) -> TextData:
        return TextData.encode(texts, self._session.program.manifest, self._tokenizer, self._config)

    def _prediction(self, chances: list[float], cut: int) -> Prediction:
        answer = self.choices[chances.index(max(chances))]
        return Prediction(answer, dict(zip(self.choices, chances, strict=True)), cut)
