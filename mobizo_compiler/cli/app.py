"""What all commands share: the application, its errors and exit codes, and how results and remarks are printed."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mobizo_compiler import __version__
from mobizo_compiler.device.journal import JournalWarning
from mobizo_compiler.errors import MobizoError
from mobizo_compiler.text.hub import calm

FAILED, INTERRUPTED = 1, 130  # 0: done; 2: wrong usage, which typer itself says; see docs/command_line.md


class _Commands(TyperGroup):
    """Commands whose errors are messages, not tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with calm(), warnings.catch_warnings():
                warnings.showwarning = _remark_on_warning
                return super().invoke(ctx)
        except MobizoError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(FAILED) from None
        except BrokenPipeError:
            raise
        except OSError as error:  # a file that cannot be read or written
            if error.filename is None:
                raise
            typer.echo(f"{error.filename}: {error.strerror}", err=True)
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _remark_on_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """What this package warns of is for the user; what libraries warn of is for us."""
    if issubclass(category, JournalWarning):
        typer.echo(f"warning: {message}", err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they would print whole tensors
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for other programs to read.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr; errors still.")]
ProgramFile = Annotated[Path, typer.Argument(help="A program file that compile made.", show_default=False)]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Folder of a run of that program.", show_default=False)]
Best = Annotated[
    bool, typer.Option("--best", help="The state with the best validation loss of the run, not its last one.")
]


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


def print_json(values: Any) -> None:
    """The result of a command, for programs."""
    typer.echo(json.dumps(values, indent=2))


def megabytes(size: float) -> str:
    """A size for people.

    >>> megabytes(1_250_000)
    '1.2 MB'
    """
    return f"{size / 1e6:.1f} MB"


class Remarks:
    """What a command says on stderr while it works.

    Args:
        quiet: Say nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=not sys.stderr.isatty())

    def __call__(self, text: str, style: str | None = None) -> None:
        """One remark; brackets in it are text."""
        self.console.print(text, style=style, markup=False)
