"""What this machine lacks for compiling to a GPU. Nothing is imported to find out, and nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch

_TOOLKITS = ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT")
_DEFAULT_TOOLKIT = "/usr/local/cuda"


def missing_for_cuda(index: int = 0) -> str | None:
    """The first thing that compiling for a GPU needs and this machine does not have; None if it has all.

    Args:
        index: Which GPU.
    """
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if index and index >= torch.cuda.device_count():
        return f"there is no GPU with index {index}, PyTorch sees {torch.cuda.device_count()}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    return None


def missing_for_delegate() -> str | None:
    """As `missing_for_cuda`, with the tools that ExecuTorch's delegate calls besides."""
    if reason := missing_for_cuda():
        return reason
    for tool in ("nvcc", "ptxas"):
        if not _has_tool(tool):
            return (
                f"{tool} of the CUDA toolkit is neither on PATH nor below {', '.join(_TOOLKITS)} or {_DEFAULT_TOOLKIT}"
            )
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler: install g++, or set the environment variable CXX"
    return None


def _has_tool(name: str) -> bool:
    folders = [*(os.environ[key] for key in _TOOLKITS if os.environ.get(key)), _DEFAULT_TOOLKIT]
    return shutil.which(name) is not None or any((Path(folder) / "bin" / name).is_file() for folder in folders)
