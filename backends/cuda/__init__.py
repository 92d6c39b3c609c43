"""ExecuTorch's CUDA delegate: the network as machine code for NVIDIA GPUs, without libtorch."""

from mobizo_compiler.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
