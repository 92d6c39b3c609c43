"""Lowering through ExecuTorch, and its stock runtime: what the backends that are its delegates share.

Knows none of them. A delegate of another package derives from `ExecuTorchBackend`, and lowers by `lower_to_executorch`.
"""

from mobizo_compiler.backends.executorch.backend import ExecuTorchBackend
from mobizo_compiler.backends.executorch.lower import lower_to_executorch
from mobizo_compiler.backends.executorch.program_file import ExecuTorchArtifact

__all__ = ["ExecuTorchArtifact", "ExecuTorchBackend", "lower_to_executorch"]
