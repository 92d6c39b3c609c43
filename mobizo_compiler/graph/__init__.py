"""The graph of one method, and the passes that rewrite it: all that the author of a pass imports.

`GraphProgram` is what flows through a `Pipeline` of `Pass`es; a pass changes a private copy through an `Editor`, and
declares `facts` that it needs, gives and breaks. `program_text` prints a program, `parse` reads one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobizo_compiler.graph import facts
    from mobizo_compiler.graph.editor import Editor
    from mobizo_compiler.graph.nodes import ancestors, operand, operator_name, source_line
    from mobizo_compiler.graph.parser import parse
    from mobizo_compiler.graph.pipeline import Insertion, Pass, Pipeline
    from mobizo_compiler.graph.printer import program_text
    from mobizo_compiler.graph.program import GraphProgram

__all__ = [
    "Editor",
    "GraphProgram",
    "Insertion",
    "Pass",
    "Pipeline",
    "ancestors",
    "facts",
    "operand",
    "operator_name",
    "parse",
    "program_text",
    "source_line",
]

# Where they are. They are imported when they are asked for: a program that is only run needs no symbolic algebra, nor
# PyTorch's tracer, which take as long to load as PyTorch does.
_HOMES = {
    "Editor": "editor",
    "GraphProgram": "program",
    "Insertion": "pipeline",
    "Pass": "pipeline",
    "Pipeline": "pipeline",
    "ancestors": "nodes",
    "operand": "nodes",
    "operator_name": "nodes",
    "parse": "parser",
    "program_text": "printer",
    "source_line": "nodes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
