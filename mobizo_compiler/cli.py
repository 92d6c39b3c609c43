"""The command line, `mobizo`: every command is a function here that is decorated with `@app.command()`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from mobizo_compiler import __version__
from mobizo_compiler.backends import BUILT_IN, ENTRY_POINT_GROUP, get_backend
from mobizo_compiler.errors import MobizoError
from mobizo_compiler.inspection import DISTRIBUTION, examine_machine, inspect_file
from mobizo_compiler.session import Session


class _Commands(TyperGroup):
    """Commands whose errors of this package are messages, not tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MobizoError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they would print whole tensors
    context_settings={"help_option_names": ["-h", "--help"]},
)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs to read.")]
ProgramFile = Annotated[Path, typer.Argument(help="A program file that compile() made.", show_default=False)]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mobizo {__version__}")
        raise typer.Exit


@app.callback()
def mobizo(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Turn inference graphs into programs that fine-tune themselves with forward passes only."""


@app.command("backends")
def show_backends(as_json: AsJson = False) -> None:
    """List the backends, and say which of them can be used on this machine.

    A usable backend compiles here. A program for another device may need that device to run.
    """
    listed = list_backends()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(backend) for backend in listed], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("backend", overflow="fold")
    table.add_column("usable", no_wrap=True)
    table.add_column("where it comes from; why it cannot be used", overflow="fold")
    for backend in listed:
        lines = [Text(f"{origin.distribution}: {origin.loaded_from}") for origin in backend.origins]
        if backend.reason is not None:
            lines.append(Text(backend.reason, style="red"))
        usable = Text("yes", style="green") if backend.available else Text("no", style="red")
        table.add_row(Text(backend.name, style="bold"), usable, Text("\n").join(lines))
    Console().print(table)


@app.command("inspect")
def show_program(file: ProgramFile, as_json: AsJson = False) -> None:
    """Say what a program file is: inputs, adapters, options, and what its methods run in and out of delegates."""
    found = inspect_file(file)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    zo, elsewhere = found["zo"], found["cannot_run_here"]
    rows = {
        "file": f"{found['file']}, {_megabytes(found['file_bytes'])}",
        "backend": found["backend"] + (f"; not on this machine: {elsewhere}" if elsewhere else ""),
        "format": f"{found['format_version']}, state {found['state']}",
        "weights": found["quantization"] or "as they were",
        "loss": found["loss"],
        "estimator": f"{zo['queries']} queries, {found['lanes']} lanes, {zo['noise']}; eps {found['eps']:g}",
        "adapters": f"{found['parameters']:,} parameters in {len(found['sites'])} layers: "
        + ", ".join(f"{count} x {name}" for name, count in found["layers"].items())
        + f"; r {found['lora']['r']}, alpha {found['lora']['lora_alpha']:g}",
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
    if not found["methods"]:
        return
    table = Table("method", "delegates", "calls outside", "planned memory", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, plan in found["methods"].items():
        outside = plan["outside"]
        most = ", ".join(f"{count} {call.split('::')[-1]}" for call, count in list(outside.items())[:4])
        more = f"{sum(outside.values())}: {most}" + (", ..." if len(outside) > 4 else "")
        table.add_row(name, str(plan["delegates"]), more, _megabytes(sum(plan["planned_bytes"])))
    console.print(table)


@app.command("doctor")
def show_machine(as_json: AsJson = False) -> None:
    """Say what this machine has: versions beside the tested ones, threads, memory, and what runs here.

    Exit code 1 if a package has another version than the tested one.
    """
    found = examine_machine() | {"backends": {b.name: b.reason for b in list_backends()}}
    wrong = [name for name, package in found["packages"].items() if not package["ok"]]
    if as_json:
        typer.echo(json.dumps(found | {"ok": not wrong}, indent=2))
        raise typer.Exit(1 if wrong else 0)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    memory = "" if found["memory_bytes"] is None else f", {found['memory_bytes'] / 1e9:.0f} GB of memory"
    table.add_row("python", f"{found['python']} on {found['system']}")
    table.add_row("machine", f"{found['processors']} processors, {found['torch_threads']} threads in PyTorch{memory}")
    for name, package in found["packages"].items():
        note = "" if package["ok"] else f"  tested with {package['tested']}"
        table.add_row(name, Text(package["installed"] + note, style="" if package["ok"] else "red"))
    usable = [name for name, reason in found["backends"].items() if reason is None]
    others = [name for name in found["backends"] if name not in usable]
    not_here = f" (not {', '.join(others)}: mobizo backends)" if others else ""
    table.add_row("compiles for", ", ".join(usable) + not_here)
    table.add_row("runtime has", ", ".join(found["runtime_backends"]))
    Console().print(table)
    raise typer.Exit(1 if wrong else 0)


@app.command("export-adapter")
def write_adapter(
    file: ProgramFile,
    run: Annotated[Path, typer.Argument(help="Folder of a run of that program.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Gets the adapter in peft's format.", show_default=False)],
    base_model: Annotated[str | None, typer.Option(help="Name or path of the model, for those who load it.")] = None,
) -> None:
    """Write the adapter that a run has trained, for peft."""
    session = Session(file)
    steps = session.restore(run)
    session.export_adapter(folder, base_model)
    typer.echo(f"the adapter after {steps} steps is in {folder}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a backend is loaded from: an installed distribution, and `"package.module:Class"` in it."""

    distribution: str
    loaded_from: str


@dataclasses.dataclass(frozen=True)
class ListedBackend:
    """A name under which a backend is installed.

    Args:
        name: The name in `compile(..., backend=name)`.
        origins: Who claims the name; more than one if packages collide.
        available: Whether `compile` can use it on this machine.
        reason: Why not.
    """

    name: str
    origins: tuple[Origin, ...]
    available: bool
    reason: str | None


def list_backends() -> list[ListedBackend]:
    """All installed backends by name. Each is loaded to be asked whether it can be used; none can break the list."""
    origins: dict[str, dict[str, Origin]] = {
        name: {value: Origin(f"{DISTRIBUTION} {__version__}", value)} for name, value in BUILT_IN.items()
    }
    for point in entry_points(group=ENTRY_POINT_GROUP):
        origins.setdefault(point.name, {}).setdefault(point.value, Origin(_distribution(point), point.value))
    found = []
    for name, claims in sorted(origins.items()):
        reason = _why_not(name)
        found.append(ListedBackend(name, tuple(claims.values()), reason is None, reason))
    return found


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"


def _why_not(name: str) -> str | None:
    """Why the backend cannot be used here, also if that is because it is broken."""
    try:
        # What a plugin prints is not part of the list.
        with contextlib.redirect_stdout(sys.stderr):
            reason: object = get_backend(name).unavailable()
    except MobizoError as error:
        return " ".join(line.strip() for line in str(error).splitlines())
    except (Exception, SystemExit) as error:
        return f"it broke when it was asked: {type(error).__name__}: {error}"
    return None if reason is None else str(reason)
