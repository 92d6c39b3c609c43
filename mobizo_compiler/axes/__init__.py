"""Which axis of every value carries the rows of the batch, and proof that rows do not meet.

Lanes are copies of the batch along the row axis. They stay independent if every operation keeps rows apart, and an
adapter can tell lanes apart if it knows where the rows are. `row_axes` finds that by one rule per operator family, on
graphs with a symbolic and with a fixed number of rows alike; what no rule covers is refused, never guessed.
"""

from mobizo_compiler.axes.analysis import RowAxes, row_axes
from mobizo_compiler.axes.layout import Adoption, Layout
from mobizo_compiler.axes.rules import Call, RowsMix, axis_rule, has_rule

__all__ = ["Adoption", "Call", "Layout", "RowAxes", "RowsMix", "axis_rule", "has_rule", "row_axes"]
