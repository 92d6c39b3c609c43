"""What a program file says about itself, and what this machine is, as plain data for people and for pipelines."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from mobizo_compiler.compiling.described import TESTED_SET, installed_versions

DISTRIBUTION = "mobizo-compiler"


def examine_machine() -> dict[str, Any]:
    """Python, versions beside the tested ones, processors, memory, and what the ExecuTorch runtime here can run."""
    import torch

    from mobizo_compiler.upstream import Runtime

    wanted = _tested_versions()
    memory = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = installed_versions()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "cuda": torch.cuda.is_available(),
        "packages": {
            name: {"installed": found[name], "tested": wanted.get(name), "ok": _fits(found[name], wanted.get(name))}
            for name in TESTED_SET
        },
        "runtime_backends": sorted(Runtime.get().backend_registry.registered_backend_names),
    }


def _tested_versions() -> dict[str, str]:
    """What this distribution requires, as `2.13.*`."""
    with contextlib.suppress(PackageNotFoundError):
        version(DISTRIBUTION)
        pairs = (re.match(r"([A-Za-z0-9_.-]+)==([^;, ]+)", line) for line in requires(DISTRIBUTION) or [])
        return {pair[1]: pair[2] for pair in pairs if pair}
    return {}


def _fits(installed: str, tested: str | None) -> bool:
    if installed == "not installed":
        return tested is None
    return tested is None or (installed.split("+")[0] + ".").startswith(tested.removesuffix("*"))
