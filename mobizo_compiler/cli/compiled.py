"""What `mobizo compile` says of the program that it made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mobizo_compiler.cli.app import Remarks, how_estimated, megabytes
from mobizo_compiler.compiling.dry_run import estimate
from mobizo_compiler.extensions import spelled
from mobizo_compiler.format.program import Program


def say_new(remark: Remarks, names: Sequence[str]) -> None:
    """Say which weights were drawn."""
    remark(
        f"the folder has no {', '.join(names)}: drawn from a fixed seed, frozen, and kept in exported adapters as "
        "modules_to_save",
        "yellow",
    )


def say_rank(remark: Remarks, program: Program) -> None:
    """Warn where one direction is all that an adapter on the output layer alone can move."""
    manifest = program.manifest
    choices = len(manifest.labels.choices or manifest.answers or ())
    (site, *others) = program.sites
    vocabulary = manifest.outputs[0].shape[-1] if manifest.outputs else None
    if not others and site.out_features == vocabulary and site.r < choices - 1:
        remark(
            f"an adapter of rank {site.r} on the output layer alone cannot tell {choices} answers apart: --lora-r "
            f"{choices - 1}",
            "yellow",
        )


def description(program: Program, output: Path | None) -> dict[str, Any]:
    """A program in JSON values."""
    manifest = program.manifest
    return {
        "file": str(output) if output else None,
        "file_bytes": output.stat().st_size if output else None,
        "backend": manifest.backend,
        "loss": manifest.loss,
        "quantization": manifest.quantization,
        "lanes": manifest.zo.lanes,
        "eps": manifest.eps,
        "parameters": program.parameters,
        "sites": [site.fqn for site in program.sites],
        # A program out of the cache has no graphs to estimate from.
        "estimate": dataclasses.asdict(estimate(program)) if program.methods else None,
    }


def show_program(program: Program, described: dict[str, Any], dry_run: bool) -> None:
    """A program in a table; `described` is what `description` says of it."""
    manifest, needs = program.manifest, described["estimate"]
    rows = {
        "file": "none: this was a dry run"
        if dry_run
        else f"{described['file']}, {megabytes(described['file_bytes'] or 0)}",
        "backend": manifest.backend,
        "loss": spelled(manifest.loss),
        "estimator": f"{how_estimated(manifest.zo.to_json(), manifest.lanes, manifest.eps)}; {spelled(manifest.rule)}",
        "adapters": f"{program.parameters:,} parameters in {len(program.sites)} layers",
    }
    if dry_run:
        named = [site.fqn for site in program.sites]
        rows["layers"] = ", ".join(named[:6]) + (f", ... and {len(named) - 6} more" if len(named) > 6 else "")
    if needs:
        ratio = needs["step_multiply_adds"] / max(1, needs["inference_multiply_adds"])
        rows["weights"] = f"{megabytes(needs['weight_bytes'])}, state {megabytes(needs['state_bytes'])}"
        rows["activations"] = (
            f"about {megabytes(needs['step_activation_bytes'])} in a step, "
            f"{megabytes(needs['inference_activation_bytes'])} in an evaluation of one batch"
        )
        rows["work"] = f"{needs['step_multiply_adds'] / 1e9:.3g} G multiply-adds in a step, {ratio:.3g} evaluations"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(text))
    Console().print(table)
