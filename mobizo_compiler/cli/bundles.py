"""`mobizo bundle`, `verify`: whether a program computes on another machine what it computed where it was compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobizo_compiler.cli.app import AsJson, ProgramFile, Quiet, Remarks, app, print_json
from mobizo_compiler.cli.options import ConfigFile
from mobizo_compiler.device.verification import verify_bundle, write_bundle
from mobizo_compiler.format.bundle import read_bundle


@app.command("bundle")
def make_bundle(
    file: ProgramFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle is written.", show_default=False)],
    steps: Annotated[int, typer.Option(help="Training steps, each from where the one before led.")] = 1,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write what a program computes here on a fixed input, so that mobizo verify or mobizo_host checks it elsewhere.

    Run it on the machine that compiled the program, where it was compared with the model.
    """
    write_bundle(file, output, steps)
    bundle = read_bundle(output)
    count = sum(len(call.expected) for call in bundle.calls)
    if as_json:
        print_json({"bundle": str(output), "calls": [call.name for call in bundle.calls], "values": count})
        return
    typer.echo(f"{output}: {count} values of {len(bundle.calls)} calls, {output.stat().st_size / 1e3:.1f} kB")
    Remarks(quiet)(f"on the device: mobizo_host verify {file} {output}, or mobizo verify {file} {output}")


@app.command("verify")
def check_bundle(
    file: ProgramFile,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What bundle wrote for it.", show_default=False)],
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that a program computes on this machine what it computed where its bundle was made."""
    found = verify_bundle(file, bundle)
    if as_json:
        print_json({name: {"found": error, "allowed": allowed} for name, (error, allowed) in found.items()})
        return
    for name, (error, allowed) in found.items():
        typer.echo(f"{name}: {error:.3g}, of at most {allowed:.3g}")
