"""Fix the number of rows.

Given:    input %ids: i64[rows, 5]    %n = sym_size(%ids, 0)    %v = view(%x, [%n, 5, 3, 4])
Result:   input %ids: i64[4, 5]       %v = view(%x, [4, 5, 3, 4])
Numbers: exact.

The symbol did its work: it said where the rows are. Engines run static shapes faster, and some run nothing else.
"""

from __future__ import annotations

import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mobizo_compiler import facts
from mobizo_compiler.editor import Editor
from mobizo_compiler.pipeline import Pass


@dataclasses.dataclass(frozen=True)
class Specialize(Pass):
    """Give every input `rows` rows."""

    rows: int
    needs = frozenset({facts.SYMBOLIC_ROWS})
    gives = frozenset({facts.STATIC})
    breaks = frozenset({facts.SYMBOLIC_ROWS, facts.CANONICAL})

    def rewrite(self, edit: Editor) -> None:
        """Recompute every value for the fixed number and fold sizes into the arguments."""
        mode = FakeTensorMode()
        inputs = {}
        for name, node in edit.inputs.items():
            value = node.meta["val"]
            shape = [self.rows if isinstance(size, torch.SymInt) else size for size in value.shape]
            with mode:
                inputs[name] = torch.empty(shape, dtype=value.dtype)
        edit.refresh(inputs, fold=True)
