"""The command line, `mobizo`: every command is a function here that is decorated with `@app.command()`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from importlib.metadata import EntryPoint, entry_points
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

DISTRIBUTION = "mobizo-compiler"


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
def show_backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs to read.")] = False,
) -> None:
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
