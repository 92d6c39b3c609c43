"""Batches as people have them: labels among the inputs, a loader instead of a list, fewer rows in the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mobizo_compiler.errors import InputError
from mobizo_compiler.format.manifest import TensorSpec

LABELS = "labels"
Batch = tuple[Any, Tensor] | Mapping[str, Any]
Batches = Callable[[int], Batch] | Sequence[Batch] | Iterable[Batch]
Pair = tuple[Any, Tensor | None]  # inputs, and labels where they are not among them


def without_labels(inputs: Any, specs: Sequence[TensorSpec]) -> Any:
    """The model's inputs without the labels that lie among them, unless the model takes labels itself."""
    if isinstance(inputs, Mapping) and LABELS in inputs and all(spec.name != LABELS for spec in specs):
        return {name: value for name, value in inputs.items() if name != LABELS}
    return inputs


def labelled(inputs: Any, labels: Tensor | None, specs: Sequence[TensorSpec]) -> tuple[Any, Tensor]:
    """Inputs and labels, where the labels may lie among the inputs.

    Raises:
        InputError: There are no labels.
    """
    if labels is not None:
        return inputs, labels
    rest = without_labels(inputs, specs)
    if rest is inputs:
        raise InputError("there are no labels", hint='pass them beside the inputs, or in their dict as "labels"')
    return rest, inputs[LABELS]


def pair(batch: Any) -> Pair:
    """Inputs and labels of a batch, or a dict that has both and None.

    Raises:
        InputError: It is neither.
    """
    if isinstance(batch, Mapping):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    found = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
    raise InputError(f"a batch is {found}; it must be (inputs, labels), or a dict of inputs with labels among them")


def by_step(batches: Batches) -> Callable[[int], Pair]:
    """A function of the step's number; what has an end is gone through again and again.

    Raises:
        InputError: They are neither a function nor something that can be gone through twice, or there are none; and
            from the function, where a batch is neither (inputs, labels) nor a dict.
    """
    if callable(batches):
        return lambda step: pair(batches(step))
    if isinstance(batches, Sequence):
        if not batches:
            raise InputError("batches is empty; it must be a function of the step, or a sequence of (inputs, labels)")
        return lambda step: pair(batches[step % len(batches)])
    if not isinstance(batches, Iterable) or isinstance(batches, (Iterator, Mapping)):
        raise InputError(
            f"batches is a {type(batches).__name__}; it must be a function of the step, or a sequence or a loader of "
            "(inputs, labels)",
            hint="a generator cannot be rewound, so a run could not be taken up again",
        )
    loader = _Loader(batches)
    return lambda step: pair(loader(step))


class _Loader:
    """Goes through a loader step by step. One that shuffles has another order each time, and so has a run."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader = loader
        self._left: Iterator[Batch] = iter(())
        self._next = 0

    def __call__(self, step: int) -> Batch:
        if step < self._next:
            self._left, self._next = iter(()), 0
        if self._next == 0 and (length := self._length()):
            self._next = step - step % length  # whole passes need not be read
        while True:
            for batch in self._left:
                self._next += 1
                if self._next > step:
                    return batch
            self._left = iter(self._loader)
            first = next(self._left, None)
            if first is None:
                raise InputError("batches is empty")
            self._next += 1
            if self._next > step:
                return first

    def _length(self) -> int:
        """Batches of a pass; 0 if it cannot say."""
        try:
            return len(cast(Sequence[Batch], self._loader))
        except TypeError:
            return 0


def filled(
    values: Sequence[Any], labels: Any, specs: Sequence[TensorSpec], label_spec: TensorSpec
) -> tuple[Sequence[Any], Any]:
    """A batch that has fewer rows than it should, with its last row again for those that are missing, and not counted.

    It is left as it is where the loss has no label that does not count, or where some inputs have all rows.

    Args:
        values: The inputs.
        labels: Their labels.
        specs: What the program takes.
        label_spec: What labels it takes.
    """
    if not isinstance(labels, Tensor) or labels.dim() != len(label_spec.shape) or label_spec.also is None:
        return values, labels
    given, wanted = labels.shape[0], label_spec.shape[0]
    if not isinstance(wanted, int) or not 0 < given < wanted:
        return values, labels
    rows = torch.arange(wanted).clamp(max=given - 1)
    whole = []
    for value, spec in zip(values, specs, strict=True):
        axis = _short_axis(value, spec, given, wanted)
        if axis is None and spec.shape[:1] == (wanted,):
            return values, labels
        whole.append(value if axis is None else value.index_select(axis, rows))
    more = labels.new_full((wanted - given, *labels.shape[1:]), label_spec.also)
    return whole, torch.cat((labels, more))


def _short_axis(value: object, spec: TensorSpec, given: int, wanted: int) -> int | None:
    if not isinstance(value, Tensor) or value.dim() != len(spec.shape):
        return None
    short = [axis for axis, size in enumerate(value.shape) if (size, spec.shape[axis]) == (given, wanted)]
    return short[0] if len(short) == 1 else None
