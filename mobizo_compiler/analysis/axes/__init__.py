"""Which axis of every value carries the rows of the batch, and proof that rows do not meet.

Lanes are copies of the batch along the row axis. They stay independent if every operation keeps rows apart, and an
adapter can tell lanes apart if it knows where the rows are. `row_axes` finds that by one rule per operator family, on
graphs with a symbolic and with a fixed number of rows alike; what no rule covers is refused, never guessed.
"""

from mobizo_compiler.analysis.axes.layout import Adoption, Layout
from mobizo_compiler.analysis.axes.rules import AXIS_RULES, AxisRule, Call, RowsMix, axis_rule, has_rule
from mobizo_compiler.analysis.axes.walk import RowAxes, row_axes

__all__ = [
    "AXIS_RULES",
    "Adoption",
    "AxisRule",
    "Call",
    "Layout",
    "RowAxes",
    "RowsMix",
    "axis_rule",
    "has_rule",
    "row_axes",
]
