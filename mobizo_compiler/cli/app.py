"""What all commands share: the application, its errors and exit codes, and how results and remarks are printed."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mobizo_compiler import __version__
from mobizo_compiler.cli.help import WIDTH, PlainCommand
from mobizo_compiler.device.journal import JournalWarning
from mobizo_compiler.errors import MobizoError
from mobizo_compiler.extensions import spelled
from mobizo_compiler.quiet import quiet

FAILED, INTERRUPTED = 1, 130  # 0: done; 2: wrong usage, which typer itself says; see docs/command_line.md


# In the order in which a person comes to them: make a program, use it, carry it elsewhere, look at what there is.
ORDER = (
    *("compile", "finetune", "tune", "evaluate", "predict", "generate", "chat", "inspect"),
    *(
        "export-adapter",
        "import-adapter",
        "export-gguf",
        "import-gguf",
        "bundle",
        "verify",
        "backends",
        "extensions",
        "passes",
        "doctor",
    ),
)


class _Commands(TyperGroup):
    """Commands whose errors are messages, not tracebacks."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, as help lists them."""
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def invoke(self, ctx: Any) -> Any:
        with _noting_interrupts() as interrupted:
            try:
                with quiet(), warnings.catch_warnings():
                    warnings.showwarning = _remark_on_warning
                    return super().invoke(ctx)
            except typer.Exit:
                raise
            except (KeyboardInterrupt, Exception) as error:
                # Modules in C that are imported meanwhile make another error of an interrupt.
                stopped = interrupted.is_set() or isinstance(error, KeyboardInterrupt)
                said = "interrupted" if stopped else _said(error)
                if said is None:
                    raise
                typer.echo(said, err=True)
                raise typer.Exit(INTERRUPTED if stopped else FAILED) from None


def _said(error: BaseException) -> str | None:
    """The message of an error that is the user's to mend; None for one that is ours."""
    if isinstance(error, MobizoError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # no such file, or the disk is full
        problem = error.strerror or " ".join(str(error).split())
        return f"{error.filename}: {problem}" if error.filename else problem
    return None


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[threading.Event]:
    """Within the block, Ctrl-C is also noted; it raises as it does anyway."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _remark_on_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """What this package warns of is for the user; what libraries warn of is for us."""
    if issubclass(category, JournalWarning):
        typer.echo(f"warning: {message}", err=True)


class _App(typer.Typer):
    """An application whose commands have plain help texts."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """As in typer."""
        return super().command(name, cls=PlainCommand, **options)


app = _App(
    cls=_Commands,
    rich_markup_mode=None,  # it takes brackets of defaults for markup, and cuts the names of options
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they would print whole tensors
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for other programs to read.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr; errors still.")]
Encoding = Annotated[str, typer.Option("--encoding", help="How text files are written: latin-1, cp1252, utf-16, ...")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies beside the model or the tokenizer.")
]
ProgramFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A program file that compile made.", show_default=False)
]
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
    """Turn inference graphs into programs that fine-tune themselves in an inference engine."""


def print_json(values: Any) -> None:
    """The result of a command, for programs."""
    typer.echo(json.dumps(values, indent=2))


def as_it_comes(as_json: bool) -> Callable[[str], None]:
    """What shows text piece by piece; nothing where the result is JSON."""
    return (lambda piece: None) if as_json else (lambda piece: typer.echo(piece, nl=False))


def how_estimated(zo: Mapping[str, Any], lanes: int, eps: float) -> str:
    """The estimator of a program in a line; one lane has nothing that it could be compared with."""
    name = spelled(zo["estimator"])
    if lanes == 1:
        return f"{name}: the gradient itself"
    return f"{name}, {zo['queries']} queries, {lanes} lanes, {zo['noise']}; eps {eps:g}"


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
