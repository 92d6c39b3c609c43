"""Lowering through ExecuTorch, and its stock runtime: what the backends that are its delegates share.

Knows none of them. A delegate of another package derives from `ExecuTorchBackend`, and lowers by `lower_to_executorch`,
which is best imported where it is called: it brings ExecuTorch's exporter, which running a program does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobizo_compiler.backends.executorch.backend import ExecuTorchBackend
from mobizo_compiler.backends.executorch.program_file import ExecuTorchArtifact
from mobizo_compiler.late import late_names

if TYPE_CHECKING:
    from mobizo_compiler.backends.executorch.lower import lower_to_executorch

__all__ = ["ExecuTorchArtifact", "ExecuTorchBackend", "lower_to_executorch"]

__getattr__ = late_names(__name__, {"lower_to_executorch": "mobizo_compiler.backends.executorch.lower"})
