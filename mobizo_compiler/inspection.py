"""What a program file says about itself, and what this machine is, as plain data for people and for pipelines."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
from collections import Counter
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from mobizo_compiler.api import TESTED_SET, installed_versions, load
from mobizo_compiler.plan import Plan, read_plans

DISTRIBUTION = "mobizo-compiler"


def inspect_file(path: Path) -> dict[str, Any]:
    """A program file as JSON values: the manifest, its sites by kind of layer, and what every method runs.

    Raises:
        ArtifactError: There is no such file, or it is damaged, or not a program of this compiler.
    """
    program = load(path)
    manifest = program.manifest
    plans: dict[str, Plan] = read_plans(path) if path.suffix != ".pt2" else {}
    described = dataclasses.asdict(manifest)
    sites = described.pop("sites")
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        **{
            name: described[name]
            for name in ("format_version", "backend", "state", "quantization", "eps", "loss", "rule", "prefix")
        },
        "cannot_run_here": getattr(program.artifact, "cannot_run", None),
        "inputs": described["inputs"],
        "labels": described["labels"],
        "outputs": described["outputs"],
        "sizes": described["sizes"],
        "lora": described["lora"],
        "zo": described["zo"],
        "lanes": manifest.zo.lanes,
        "parameters": manifest.parameters,
        "sites": sites,
        "layers": dict(Counter(site["fqn"].rpartition(".")[2] for site in sites)),
        "methods": {name: dataclasses.asdict(plan) for name, plan in plans.items() if not name.startswith("mobizo")},
        "base_model": manifest.base_model,
        "outline": described["outline"],
        "history": {name: list(steps) for name, steps in manifest.history.items()},
        "versions": dict(manifest.versions),
    }


def examine_machine() -> dict[str, Any]:
    """Python, versions beside the tested ones, processors, memory, and what the ExecuTorch runtime here can run."""
    import torch
    from executorch.runtime import Runtime

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
