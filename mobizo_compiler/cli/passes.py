"""`mobizo passes`: which passes make which method."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mobizo_compiler.backends import get_backend
from mobizo_compiler.cli.app import AsJson, Quiet, app, print_json
from mobizo_compiler.cli.options import ConfigFile
from mobizo_compiler.compiling.insertions import INSERTIONS
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.compiling.pipelines import METHODS, Parts, methods_of
from mobizo_compiler.config import GenerateConfig, ZOConfig
from mobizo_compiler.graph.pipeline import Pass
from mobizo_compiler.passes import Quantize


@app.command("passes")
def show_passes(
    backend: Annotated[str, typer.Option(help="Whose own passes come last; see mobizo backends.")] = "xnnpack",
    quantization: Annotated[
        str | None, typer.Option(help="Recipe for the frozen weights: 8da4w, int8, ...", show_default=False)
    ] = None,
    state: Annotated[str, typer.Option(help="shared, data or io.")] = "shared",
    split_prefix: Annotated[bool, typer.Option("--split-prefix", help="As for mobizo compile.")] = False,
    estimator: Annotated[str, typer.Option(help="two-sided, exact, ...; see mobizo extensions.")] = "two-sided",
    generate: Annotated[
        bool, typer.Option("--generate", help="With the method that generates with a cache of keys and values.")
    ] = False,
    own_passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help="A pass of an installed package; may be given again.", show_default=False),
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the passes of every method of a program, in the order in which they run.

    `before` and `after` of a pass of your own name them; see docs/writing_a_pass.md.
    """
    given: dict[str, Any] = {"quantization": quantization, "state": state, "passes": tuple(own_passes or ())}
    options = Options(
        zo=ZOConfig(estimator=estimator),
        split_prefix=split_prefix,
        generate=GenerateConfig() if generate else None,
        **given,
    )
    store = () if options.quantization is None else (Quantize(options.quantization),)
    parts = Parts(quantize=store, backend=tuple(get_backend(backend).passes()))
    listed = {name: [_described(step) for step in METHODS[name](options, parts)] for name in methods_of(options)}
    if as_json:
        print_json(listed)
        return
    for method, steps in listed.items():
        table = Table(title=method, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for position, step in enumerate(steps, start=1):
            table.add_row(str(position), Text(step["name"], style="cyan"), Text(step["does"]))
        Console().print(table)
        Console().print()
    for name, origin in INSERTIONS.names().items():
        Console().print(f"--pass {name} puts in a pass of {origin}", highlight=False, markup=False)


def _described(step: Pass) -> dict[str, Any]:
    """A pass as JSON values; what it does is the first sentence of its module."""
    text = inspect.getdoc(inspect.getmodule(type(step))) or inspect.getdoc(type(step)) or ""
    return {
        "name": step.name,
        "does": " ".join(text.partition("\n\n")[0].split()),
        "from": type(step).__module__,
        **{word: sorted(getattr(step, word)) for word in ("needs", "gives", "breaks")},
        **{word: getattr(step, word) for word in ("inputs", "outputs", "numbers")},
    }
