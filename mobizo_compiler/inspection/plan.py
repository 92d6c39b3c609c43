"""What a `.pte` file makes the runtime do, read from the file itself.

Both files of a comparison are counted the same way: by the instructions that the runtime executes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from mobizo_compiler.analysis.costs import product_multiply_adds


@dataclasses.dataclass(frozen=True)
class Plan:
    """One method of a file.

    Args:
        delegates: Calls of a delegate.
        outside: Calls of portable and optimized kernels, by operator.
        outside_multiply_adds: Those of the matrix products and convolutions among them.
        planned_bytes: Size of every arena that is planned ahead: activations, then state that methods share.
    """

    delegates: int
    outside: dict[str, int]
    outside_multiply_adds: int
    planned_bytes: list[int]


def read_plans(path: Path) -> dict[str, Plan]:
    """The methods of a program file. Only its first part is read, not the weights."""
    from mobizo_compiler.backends.executorch.head import execution_plans  # brings PyTorch

    return {plan.name: _plan(plan) for plan in execution_plans(path) if plan.inputs}


def _plan(plan: Any) -> Plan:
    outside: Counter[str] = Counter()
    delegates = products = 0
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if type(call).__name__ == "DelegateCall":
            delegates += 1
        elif type(call).__name__ == "KernelCall":
            name = plan.operators[call.op_index].name
            outside[name] += 1
            shapes: list[Any] = [getattr(plan.values[index].val, "sizes", None) for index in call.args]
            products += product_multiply_adds(name.split("::")[-1].removesuffix("_copy"), shapes, shapes[-1])
    return Plan(delegates, dict(outside.most_common()), products, plan.non_const_buffer_sizes[1:])
