"""Vulkan: ExecuTorch's delegate for GPUs of phones and desktops."""

from mobizo_compiler.backends.vulkan.backend import VulkanBackend, load_runtime

__all__ = ["VulkanBackend", "load_runtime"]
