"""ExecuTorch's portable and optimized CPU kernels, without a delegate: runs wherever the runtime runs."""

from mobizo_compiler.backends.portable.backend import PortableBackend

__all__ = ["PortableBackend"]
