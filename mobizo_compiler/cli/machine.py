"""`mobizo backends` and `mobizo doctor`: what this machine can do."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mobizo_compiler.backends import BACKENDS, get_backend
from mobizo_compiler.cli.app import FAILED, AsJson, Quiet, app, print_json
from mobizo_compiler.cli.extensions import origins_of
from mobizo_compiler.cli.options import ConfigFile
from mobizo_compiler.errors import MobizoError
from mobizo_compiler.extensions import Origin
from mobizo_compiler.inspection.machine import examine_machine


@app.command("backends")
def show_backends(config: ConfigFile = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the backends, and say which of them can be used on this machine.

    A usable backend compiles here. A program for another device may need that device to run.
    """
    listed = list_backends()
    if as_json:
        print_json([dataclasses.asdict(backend) for backend in listed])
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


@app.command("doctor")
def show_machine(config: ConfigFile = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say what this machine has: versions beside the tested ones, threads, memory, and what runs here.

    Exit code 1 if a package has another version than the tested one.
    """
    found = examine_machine() | {"backends": {b.name: b.reason for b in list_backends()}}
    wrong = [name for name, package in found["packages"].items() if not package["ok"]]
    if as_json:
        print_json(found | {"ok": not wrong})
        raise typer.Exit(FAILED if wrong else 0)
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
    raise typer.Exit(FAILED if wrong else 0)


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
    found = []
    for name in sorted(BACKENDS.names()):
        reason = _why_not(name)
        found.append(ListedBackend(name, origins_of(BACKENDS, name), reason is None, reason))
    return found


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
