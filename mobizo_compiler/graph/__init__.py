"""The graph of one method, and the passes that rewrite it: all that the author of a pass imports.

`GraphProgram` is what flows through a `Pipeline` of `Pass`es; a pass changes a private copy through an `Editor`, and
declares `facts` that it needs, gives and breaks. `program_text` prints a program, `parse` reads one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobizo_compiler.late import late_names

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

__getattr__ = late_names(
    __name__,
    {
        "Editor": "mobizo_compiler.graph.editor",
        "GraphProgram": "mobizo_compiler.graph.program",
        "Insertion": "mobizo_compiler.graph.pipeline",
        "Pass": "mobizo_compiler.graph.pipeline",
        "Pipeline": "mobizo_compiler.graph.pipeline",
        "ancestors": "mobizo_compiler.graph.nodes",
        "operand": "mobizo_compiler.graph.nodes",
        "operator_name": "mobizo_compiler.graph.nodes",
        "parse": "mobizo_compiler.graph.parser",
        "program_text": "mobizo_compiler.graph.printer",
        "source_line": "mobizo_compiler.graph.nodes",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
