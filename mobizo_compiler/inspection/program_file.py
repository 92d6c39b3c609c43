"""What a program file says about itself, as plain data for people and for pipelines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from mobizo_compiler.backends import get_backend
from mobizo_compiler.errors import ExtensionUnavailableError, UnknownExtensionError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.inspection.plan import Plan, read_plans
from mobizo_compiler.load import load
from mobizo_compiler.step.estimators import get_estimator


def inspect_file(path: Path) -> dict[str, Any]:
    """A program file as JSON values: the manifest, its sites by kind of layer, and what every method runs.

    Raises:
        ArtifactError: There is no such file, or it is damaged, or not a program of this compiler.
    """
    program = load(path)
    manifest = program.manifest
    plans: dict[str, Plan] = read_plans(path) if get_backend("portable").reads(path) else {}
    described = manifest.described()
    sites = described.pop("sites")
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        **{
            name: described[name]
            for name in (
                "format_version",
                "backend",
                "state",
                "quantization",
                "activation_memory_bytes",
                "eps",
                "loss",
                "rule",
                "prefix",
            )
        },
        "cannot_run_here": program.artifact.cannot_run,
        "inputs": described["inputs"],
        "labels": described["labels"],
        "outputs": described["outputs"],
        "sizes": described["sizes"],
        "lora": described["lora"],
        "zo": described["zo"],
        "lanes": manifest.zo.lanes,
        "parameters": manifest.parameters,
        "sites": [{**site, "gradient": how} for site, how in zip(sites, _gradients(manifest), strict=True)],
        "layers": dict(Counter(site["fqn"].rpartition(".")[2] for site in sites)),
        "methods": {name: dataclasses.asdict(plan) for name, plan in plans.items() if not name.startswith("mobizo")},
        "base_model": manifest.base_model,
        "outline": described["outline"],
        "history": {name: list(steps) for name, steps in manifest.history.items()},
        "versions": dict(manifest.versions),
    }


def _gradients(manifest: Manifest) -> list[str]:
    """For each site, how a step comes to its gradient: "exact" or "measured"; "unknown" if nobody here knows."""
    sites = manifest.sites
    try:
        measured = get_estimator(manifest.zo.estimator).measured(sites)
    except (UnknownExtensionError, ExtensionUnavailableError):
        return ["unknown"] * len(sites)
    return ["measured"] * measured + ["exact"] * (len(sites) - measured)
