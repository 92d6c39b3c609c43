"""`mobizo export-gguf` and `import-gguf`: adapters for llama.cpp, and from it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from mobizo_compiler.cli.app import AsJson, Best, ProgramFile, Quiet, Remarks, TrustRemoteCode, app, print_json
from mobizo_compiler.cli.options import ConfigFile
from mobizo_compiler.cli.runs import begin_with_adapter, check_file, check_run, restored
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, ModelSourceError
from mobizo_compiler.format.gguf_adapter import read_gguf, write_gguf
from mobizo_compiler.format.peft import read_peft, state_of
from mobizo_compiler.text.hub import load_config

BaseModel = Annotated[
    str | None, typer.Option(help="Name or path of the model; what was compiled if left out.", show_default=False)
]


@app.command("export-gguf")
def write_gguf_adapter(
    file: ProgramFile,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of that program.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="GGUF", help="The file to write.", show_default=False)],
    base_model: BaseModel = None,
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
    described = _configuration(session, base_model, trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        adapter = read_peft(session.export_adapter(Path(folder) / "adapter"))
    write_gguf(adapter, described, output)
    if as_json:
        print_json({"file": str(output), "steps": steps, "layers": len(adapter.a)})
    else:
        typer.echo(f"the adapter after {steps} steps is in {output}")


@app.command("import-gguf")
def read_gguf_adapter(
    file: ProgramFile,
    adapter: Annotated[Path, typer.Argument(metavar="GGUF", help="A LoRA of llama.cpp.", show_default=False)],
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of the run that begins with it.", show_default=False)
    ],
    base_model: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Begin a run from an adapter of llama.cpp: mobizo finetune --run goes on from it.

    The adapter must have the program's A: it was exported from one of its runs, or the model was compiled with it
    (mobizo compile --adapter GGUF), or the program trains A (--lora-train-a).
    """
    check_file(file)
    session = Session(file)
    layers = [site.fqn for site in session.program.sites]
    found = read_gguf(adapter, _configuration(session, base_model, trust_remote_code), layers)
    session.load_state(state_of(session.program, found, str(adapter)))
    begin_with_adapter(session, run, adapter, as_json, Remarks(quiet))


def _configuration(session: Session, base_model: str | None, trust_remote_code: bool) -> Any:
    """The configuration of the model that a program was made of."""
    source = base_model or session.program.manifest.base_model
    if not source:
        raise ModelSourceError(
            "the program does not say which model it was made of", hint="--base-model FOLDER-or-NAME"
        )
    return load_config(source, trust_remote_code=trust_remote_code)
