"""Fix the number of rows.

Given:    input %ids: i64[rows, 5]    %n = sym_size(%ids, 0)    %v = view(%x, [%n, 5, 3, 4])
Result:   input %ids: i64[4, 5]       %v = view(%x, [4, 5, 3, 4])
Numbers: exact.

The symbol did its work: it said where the rows are. Engines run static shapes faster, and some run nothing else.
Sizes that were asked to be dynamic stay symbols.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from mobizo_compiler.errors import PassContractError
from mobizo_compiler.graph import facts
from mobizo_compiler.graph.editor import Editor
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.graph.program import GraphProgram
from mobizo_compiler.upstream import FakeTensorMode


@dataclasses.dataclass(frozen=True)
class Specialize(Pass):
    """Give every input `rows` rows, unless their number is dynamic."""

    rows: int
    needs = frozenset({facts.FUNCTIONAL})
    gives = frozenset({facts.STATIC})
    breaks = frozenset({facts.ANY_ROWS, facts.CANONICAL})
    inputs = "changed"
    outputs = "changed"

    def rewrite(self, edit: Editor) -> None:
        """Recompute every value for the fixed number and fold sizes into the arguments."""
        mode = edit.mode if edit.before.dynamic else FakeTensorMode()
        inputs = {}
        for name, node in edit.inputs.items():
            value = node.meta["val"]
            with mode:
                inputs[name] = torch.empty([self._size(edit, s) for s in value.shape], dtype=value.dtype)
        edit.refresh(inputs, fold=True)

    def ensures(self, before: GraphProgram, after: GraphProgram) -> None:
        """Raise `PassContractError` unless inputs and outputs are what they were, but for the number of rows."""
        _check_shapes("input", before.inputs, after.inputs)
        outputs = ({name: node.meta["val"] for name, node in p.output_nodes.items()} for p in (before, after))
        _check_shapes("output", *outputs)

    def _size(self, edit: Editor, size: int | torch.SymInt) -> int | torch.SymInt:
        """Rows are the only symbol that was not asked for; a size may be a multiple of them."""
        if isinstance(size, int) or str(size.node.expr) in edit.before.dynamic:
            return size
        return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, self.rows)))


def _check_shapes(kind: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Names, dtypes and numbers of axes are the same, and so are all sizes but symbols."""
    for name in old:
        if name in new and old[name].dtype == new[name].dtype and old[name].dim() == new[name].dim():
            pairs = zip(old[name].shape, new[name].shape, strict=True)
            if all(a == b for a, b in pairs if isinstance(a, int)):
                continue
        raise PassContractError(f"specialize made the {kind}s {_shown(new)} of {_shown(old)}")


def _shown(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}: {value.dtype}{list(value.shape)}" for name, value in values.items())
