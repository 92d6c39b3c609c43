"""`mobizo export-gguf`: an adapter for llama.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mobizo_compiler.cli.app import AsJson, Best, ProgramFile, Quiet, TrustRemoteCode, app, print_json
from mobizo_compiler.cli.options import ConfigFile
from mobizo_compiler.cli.runs import check_file, check_run, restored
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, ModelSourceError
from mobizo_compiler.format.gguf_adapter import write_gguf
from mobizo_compiler.format.peft import read_peft
from mobizo_compiler.text.hub import load_config


@app.command("export-gguf")
def write_gguf_adapter(
    file: ProgramFile,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of that program.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="GGUF", help="The file to write.", show_default=False)],
    base_model: Annotated[
        str | None,
        typer.Option(help="Name or path of the model; what was compiled if left out.", show_default=False),
    ] = None,
    best: Best = False,
    trust_remote_code: TrustRemoteCode = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the adapter that a run has trained, for llama.cpp: llama-cli -m MODEL.gguf --lora GGUF."""
    check_file(file)
    check_run(run)
    if not output.parent.is_dir():
        raise ConfigError("there is no such folder", where=str(output.parent))
    session = Session(file)
    steps = restored(session, run, best)
    source = base_model or session.program.manifest.base_model
    if not source:
        raise ModelSourceError(
            "the program does not say which model it was made of", hint="--base-model FOLDER-or-NAME"
        )
    described = load_config(source, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        adapter = read_peft(session.export_adapter(Path(folder) / "adapter"))
    write_gguf(adapter, described, output)
    if as_json:
        print_json({"file": str(output), "steps": steps, "layers": len(adapter.a)})
    else:
        typer.echo(f"the adapter after {steps} steps is in {output}")
