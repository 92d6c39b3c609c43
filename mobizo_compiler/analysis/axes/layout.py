"""`Layout`: where the rows of the batch lie in a tensor; `Adoption`: a value that takes part without having any."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from torch import fx


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rows lie in one axis, of size `outer * rows * inner`: row r has the entries `(o * rows + r) * inner + i`.

    Args:
        axis: The axis, counted from the front.
        outer: How many blocks of rows there are in the axis; 0 if the split does not matter.
        inner: How many neighbouring entries belong to one row; 0 if the split does not matter.
        kind: "rows": entries of different rows differ. "same": they are equal. "index": they are the row's number.

    >>> Layout(0).reshaped((3, 5, 8), (15, 8), rows=3)
    Layout(axis=0, outer=1, inner=5, kind='rows')
    >>> Layout(1).reshaped((5, 3, 8), (15, 8), rows=3)
    Layout(axis=0, outer=5, inner=1, kind='rows')
    """

    axis: int
    outer: int = 1
    inner: int = 1
    kind: Literal["rows", "same", "index"] = "rows"

    def at(self, axis: int) -> Layout:
        """The same split in another axis."""
        return dataclasses.replace(self, axis=axis)

    @property
    def any_split(self) -> bool:
        """All entries along the axis are equal, so that any split of it is right."""
        return self.outer == 0

    def fits(self, other: Layout) -> bool:
        """Whether both say the same about one axis."""
        same_split = (self.outer, self.inner) == (other.outer, other.inner)
        return self.axis == other.axis and (same_split or self.any_split or other.any_split)

    def reshaped(self, before: Sequence[int], after: Sequence[int], rows: int) -> Layout | None:
        """The layout after a row-major reshape; None if the rows are then spread over several axes."""
        if self.any_split:
            found = [axis for axis, size in enumerate(after) if size and size % rows == 0]
            return self.at(found[0]) if len(found) == 1 else None
        stride = self.inner * math.prod(before[self.axis + 1 :])
        for axis, size in enumerate(after):
            below = math.prod(after[axis + 1 :])
            if below and stride and stride % below == 0 and size * below % (stride * rows) == 0:
                return Layout(axis, size * below // (stride * rows), stride // below, self.kind)
        return None


@dataclasses.dataclass(frozen=True)
class Adoption:
    """A value without rows that a graph of a fixed number of rows gives one entry per row, all equal.

    Args:
        user: The call that uses it.
        value: The value.
        axis: Its axis that has one entry per row.
        broadcasts: Whether the call broadcasts; if not, it needs a value of full size.
    """

    user: fx.Node
    value: fx.Node
    axis: int
    broadcasts: bool
