"""The batches of text that a program takes, as its manifest says."""

from __future__ import annotations

import dataclasses

from mobizo_compiler.errors import DataError
from mobizo_compiler.format.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The batches that a program takes.

    Args:
        rows: Rows of a batch.
        shortest: Fewest tokens of a row.
        tokens: Most tokens of a row.
        inputs: Names of the inputs.
        vocabulary: How many token ids there are.
        classes: How many classes rows have; None if tokens are labelled.
        max_labels: How many tokens of a row may be labelled; None if all may.
        choices: The only tokens that may be labels, if they are few.
        names: Names of the classes, or of the choices, in their order; None if the program does not tell.
        padding: The token that the model takes for padding; None if it has none.
    """

    rows: int
    shortest: int
    tokens: int
    inputs: tuple[str, ...]
    vocabulary: int
    classes: int | None
    max_labels: int | None
    choices: tuple[int, ...] | None
    names: tuple[str, ...] | None = None
    padding: int | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> BatchShape:
        """What the manifest says.

        Raises:
            DataError: The program is not a language model with labels at tokens or rows.
        """
        by_name = {spec.name: spec for spec in manifest.inputs}
        ids, labels = by_name.get("input_ids"), manifest.labels
        known = {"input_ids", "attention_mask", "token_type_ids"}
        causal = ids is not None and len(labels.shape) == 2 and manifest.first_label == 1
        classes = ids is not None and len(labels.shape) == 1 and labels.dtype == "int64"
        if ids is None or len(ids.shape) != 2 or ids.high is None or by_name.keys() - known or not (causal or classes):
            raise DataError(
                f"rows of text cannot be made into inputs {list(by_name)} and labels "
                f"[{', '.join(map(str, labels.shape))}] for the loss {manifest.loss['name']!r}",
                hint="the program must take input_ids [rows, tokens] and a loss of causal language models or of "
                "sequence classification; others train with Session.finetune",
            )
        sizes = {size.name: (size.low, size.high) for size in manifest.sizes}
        (_, rows), (shortest, tokens) = (sizes[s] if isinstance(s, str) else (s, s) for s in ids.shape)
        return cls(
            rows,
            shortest,
            tokens,
            tuple(by_name),
            ids.high + 1,
            labels.high + 1 if classes and labels.high is not None else None,
            manifest.max_labels,
            labels.choices,
            manifest.answers,
            manifest.padding,
        )
