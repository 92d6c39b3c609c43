"""An operator of one's own, and the rule that says how the rows of a batch go through it."""

from __future__ import annotations

import torch
from torch import Tensor

from mobizo_compiler.analysis.axes import AxisRule, Call, Layout, RowsMix


@torch.library.custom_op("mobizo_scan::scan", mutates_args=())
def scan(x: Tensor) -> Tensor:
    """Sums of everything before, along the last axis."""
    return x.cumsum(-1)


@scan.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def rows_of_scan(call: Call) -> Layout:
    """The result has its rows where the argument has them, unless the scan runs over the rows."""
    layout, shape = call.first()
    if layout.axis == len(shape) - 1:
        raise RowsMix("the scan runs over the rows")
    return layout


SCAN = AxisRule(("mobizo_scan::scan",), rows_of_scan)
