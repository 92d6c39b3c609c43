"""`mobizo inspect`, `export-adapter`, `import-adapter`: what a program file is, and adapters in and out of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mobizo_compiler.analysis.costs import si
from mobizo_compiler.cli.app import AsJson, Best, ProgramFile, Quiet, Remarks, app, how_estimated, megabytes, print_json
from mobizo_compiler.cli.options import ConfigFile
from mobizo_compiler.cli.runs import begin_with_adapter, check_run, say_effect
from mobizo_compiler.device.session import Session
from mobizo_compiler.drawing import check_format
from mobizo_compiler.extensions import spelled
from mobizo_compiler.format.manifest import Block
from mobizo_compiler.inspection.figures import draw_program
from mobizo_compiler.inspection.program_file import inspect_file
from mobizo_compiler.load import load
from mobizo_compiler.text.training import restore_best

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of an adapter in peft's format.", show_default=False)
]


@app.command("inspect")
def show_program(
    file: ProgramFile,
    graph: Annotated[
        Path | None,
        typer.Option(help="Draw it beside the graph it was made of: .svg or .png.", show_default=False),
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a program file is: inputs, adapters, options, passes, and what runs in and out of delegates."""
    if graph is not None:
        check_format(graph)
    found = inspect_file(file)
    if graph is not None:
        draw_program(load(file).manifest, graph)
    if as_json:
        print_json(found)
        return
    console = Console()
    zo, elsewhere = found["zo"], found["cannot_run_here"]
    rows = {
        "file": f"{found['file']}, {megabytes(found['file_bytes'])}",
        "model": found["base_model"] or "not told",
        "backend": found["backend"] + (f"; not on this machine: {elsewhere}" if elsewhere else ""),
        "format": f"{found['format_version']}, state {found['state']}",
        "weights": found["quantization"] or "as they were",
        "loss": spelled(found["loss"]),
        "estimator": f"{how_estimated(zo, found['lanes'], found['eps'])}; {spelled(found['rule'])}",
        "adapters": f"{found['parameters']:,} parameters in {len(found['sites'])} layers: "
        + ", ".join(f"{count} x {name}" for name, count in found["layers"].items())
        + f"; r {found['lora']['r']}, alpha {found['lora']['lora_alpha']:g}",
        "gradient": _gradient(found["sites"]),
        "made with": ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(str(text)))
    console.print(table)
    table = Table("", "name", "type", "values", box=box.SIMPLE_HEAD, pad_edge=False)
    for kind in ("inputs", "labels", "outputs"):
        for spec in [found[kind]] if kind == "labels" else found[kind]:
            limits = "" if spec["low"] is None else f"{spec['low']} to {spec['high']}"
            shape = ", ".join(map(str, spec["shape"]))
            table.add_row(kind.rstrip("s"), spec["name"], Text(f"{spec['dtype']} [{shape}]"), limits)
    console.print(table)
    _show_blocks(console, found["outline"])
    _show_methods(console, found)


def _show_blocks(console: Console, outline: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("block", "kind", "weights", "work", "lanes", "adapters"):
        table.add_column(column, overflow="fold")
    for block in map(Block.from_json, outline):
        lanes = {"none": "rows alone", "some": "begin here", "all": "in lanes"}[block.lanes]
        table.add_row(
            Text(block.name + (f" x {block.count}" if block.count > 1 else "")),
            block.kind,
            f"{si(block.parameter_bytes)}B" if block.parameter_bytes else "",
            si(block.multiply_adds) if block.multiply_adds else "",
            lanes,
            ", ".join(block.adapter_names),
        )
    if outline:
        console.print(table)


def _gradient(sites: list[dict[str, Any]]) -> str:
    """Which adapters have an exact gradient."""
    kinds = [site["gradient"] for site in sites]
    if len(set(kinds)) == 1:
        return f"{kinds[0]} for all adapters"
    first = kinds.index("exact")
    return f"measured for {first} adapters, exact for {len(kinds) - first}, from {sites[first]['fqn']} on"


def _show_methods(console: Console, found: dict[str, Any]) -> None:
    methods, history = found["methods"], found["history"]
    if methods:
        table = Table("method", "delegates", "calls outside", "planned memory", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, plan in methods.items():
            counts = sum(plan["outside"].values())
            table.add_row(name, str(plan["delegates"]), str(counts), megabytes(sum(plan["planned_bytes"])))
        console.print(table)
        console.print("outside of delegates", style="bold")
        for name, plan in methods.items():
            calls = ", ".join(f"{count} {call.split('::')[-1]}" for call, count in plan["outside"].items())
            console.print(Text(f"  {name}: {calls or 'nothing'}"), highlight=False)
    if history:
        console.print("\npasses", style="bold")
        for name, steps in history.items():
            console.print(Text(f"  {name}: " + ", ".join(step.partition("(")[0] for step in steps)), highlight=False)


@app.command("export-adapter")
def write_adapter(
    file: ProgramFile,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of that program.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Gets the adapter in peft's format.", show_default=False)
    ],
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Name or path of the model, for those who load it; what was compiled if left out.", show_default=False
        ),
    ] = None,
    best: Best = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the adapter that a run has trained, for peft."""
    check_run(run)
    session = Session(file)
    steps = restore_best(session, run) if best else session.restore(run)
    session.export_adapter(folder, base_model or session.program.manifest.base_model)
    say_effect(session, Remarks(quiet), "the adapter")
    if as_json:
        print_json({"folder": str(folder), "steps": steps})
    else:
        typer.echo(f"the adapter after {steps} steps is in {folder}")


@app.command("import-adapter")
def read_adapter(
    file: ProgramFile,
    folder: Folder,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of the run that begins with it.", show_default=False)
    ],
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Begin a run from an adapter of peft: mobizo finetune --run goes on from it.

    The adapter must have the program's A: one that export-adapter wrote, or the one that the model was compiled with
    (mobizo compile --adapter).
    """
    session = Session(file)
    session.import_adapter(folder)
    begin_with_adapter(session, run, folder, as_json, Remarks(quiet))
