"""XNNPACK: ExecuTorch's delegate for CPUs, and the default backend."""

from mobizo_compiler.backends.xnnpack.backend import XnnpackBackend

__all__ = ["XnnpackBackend"]
