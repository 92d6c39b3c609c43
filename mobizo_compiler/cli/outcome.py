"""What `mobizo finetune` says of a run that ended: its numbers, its plot, and the commands that come next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mobizo_compiler.cli.app import Remarks
from mobizo_compiler.cli.classes import writes_text
from mobizo_compiler.cli.progress import shown
from mobizo_compiler.errors import MissingPackageError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.plot import plot_run
from mobizo_compiler.text.training import Outcome

PLOT = "plot.png"


def say_unchanged(remark: Remarks, outcome: Outcome) -> None:
    """Say where training made nothing better."""
    found = outcome.validations
    if outcome.ended and len(found) > 1 and outcome.best is found[0] and found[0].step == 0:
        remark(
            "no validation was better than the one before the first step: nothing was learnt that helps other rows "
            "(another --learning-rate, which mobizo tune finds, more --steps, or more rows)",
            "yellow",
        )


def plotted(record: dict[str, Any], path: Path, remark: Remarks) -> bool:
    """Whether there is a plot: a run is not worth less without one."""
    try:
        plot_run(record, path)
    except MissingPackageError as error:
        remark(f"no {path.name}: {error.problem} (pip install matplotlib, or --no-plot)", "yellow")
        return False
    return True


def result_of(outcome: Outcome, run: Path, drawn: bool) -> dict[str, Any]:
    """A run in JSON values."""
    return {
        "run": str(run),
        "ended": outcome.why,
        "limit": outcome.summary.limit,
        "steps": outcome.summary.steps,
        "resumed_at": outcome.summary.resumed_at,
        "void_steps": list(outcome.summary.void),
        "validations": [dataclasses.asdict(v) for v in outcome.validations],
        "best_step": outcome.best.step if outcome.best else None,
        "plot": str(run / PLOT) if drawn else None,
    }


def next_commands(file: Path, run: Path, rows: TextData, manifest: Manifest, data: Path | None = None) -> list[str]:
    """What a run is for: commands that fit the program and what it has learnt; `data` is that of a task."""
    found = [f"evaluate {file} --run {run} --data {data or 'FILE'}"]
    if rows.choices is not None and len(set(rows.config.columns)) == 1:
        found.append(f"predict {file} --run {run} TEXT")
    if manifest.generate is not None and rows.config.chat is not None:
        found.append(f"chat {file} --run {run}")
    elif writes_text(manifest) and data is None:
        found.append(f"generate {file} --run {run} PROMPT")
    return [*found, f"export-adapter {file} {run} FOLDER"]


def show_outcome(console: Console, outcome: Outcome, run: Path, drawn: bool, commands: Sequence[str]) -> None:
    """A run in a table, the files that it left, and the commands that come next."""
    ended = {
        "done": "trained",
        "stopped early": "stopped early",
        "limit": "stopped by a limit",
        "budget": "the budget is spent",
    }
    console.print(f"{ended.get(outcome.why, outcome.why)} after {outcome.summary.steps} steps", highlight=False)
    if outcome.summary.void:
        console.print(f"{len(outcome.summary.void)} steps had no finite loss and changed nothing", style="yellow")
    if outcome.validations and outcome.best is not None:
        chosen = {"before": outcome.validations[0], "now": outcome.validations[-1], "best": outcome.best}
        table = Table(
            "", *(f"{name} (step {v.step})" for name, v in chosen.items()), box=box.SIMPLE_HEAD, pad_edge=False
        )
        numbers = [shown(v.score) for v in chosen.values()]
        for name in numbers[0]:
            table.add_row(name, *(some.get(name, "") for some in numbers))
        console.print(table)
    files = ["run.json", "journal", *([PLOT] if drawn else [])]
    console.print(f"in {run}: {', '.join(files)}", highlight=False, markup=False)
    if outcome.ended:
        for place, command in enumerate(commands):
            start = "      " if place else "next: "
            console.print(f"{start}mobizo {command}", highlight=False, markup=False)
