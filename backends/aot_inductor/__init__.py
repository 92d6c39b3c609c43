"""AOTInductor: PyTorch's compiler to machine code, for servers and boards with a CPU or an NVIDIA GPU."""

from mobizo_compiler.backends.aot_inductor.backend import AotInductorBackend, on_cuda

__all__ = ["AotInductorBackend", "on_cuda"]
