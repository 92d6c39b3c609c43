"""The rewritten graph in eager PyTorch: what every other backend is compared with."""

from mobizo_compiler.backends.eager.backend import EagerBackend

__all__ = ["EagerBackend"]
