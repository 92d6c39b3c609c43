"""`mobizo chat`: talk to a program, with the adapter that a run has trained or with several in turns."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mobizo_compiler.cli.app import (
    AsJson,
    Best,
    ProgramFile,
    Quiet,
    Remarks,
    RunFolder,
    TrustRemoteCode,
    app,
    as_it_comes,
)
from mobizo_compiler.cli.options import ConfigFile, with_sections
from mobizo_compiler.cli.runs import check_file, prompt_in, record_of, restored, say_effect, tokenizer_for
from mobizo_compiler.cli.text import SAMPLING, TokenizerName
from mobizo_compiler.device.generation import Sampling
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import AdapterError, ConfigError, DataError, MobizoError
from mobizo_compiler.load import load
from mobizo_compiler.text.talk import Talk

BASE, OF_RUN = "base", "run"
_HELP = "/adapter NAME to switch (/adapter for their names), /new to begin anew, /quit to end; Ctrl-C ends an answer"


@app.command("chat")
@with_sections(SAMPLING)
def chat(
    sampling: dict[str, Any],
    file: ProgramFile,
    run: RunFolder = None,
    best: Best = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Another adapter, by a name for /adapter: NAME=FOLDER in peft's format, or NAME=FILE.ptd; may be "
            "given again.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file with a line for each turn, in place of the terminal.", show_default=False),
    ] = None,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a model, by the chat template that it was trained with.

    The program must have been compiled with --generate-context. Without a terminal, every line of the input is a turn;
    with --json, every answer is a line of JSON.
    """
    remark, chosen = Remarks(quiet), Sampling(**sampling)
    check_file(file)
    named = dict(map(_named, adapter or ()))
    if prompts is not None and not prompts.is_file():
        raise DataError("there is no such file of prompts", where=str(prompts))
    record = record_of(run, best)
    program = load(file)
    spelling, _ = tokenizer_for(tokenizer, program.manifest, trust_remote_code, record.get("tokenizer"))
    session = Session(program)
    states = _states(session, named, run, best, remark)
    talk = Talk(session, spelling, prompt_in(record), system, chosen)
    now = OF_RUN if run is not None else BASE
    session.load_state(states[now])
    lines = _lines(prompts, remark)
    if sys.stdin.isatty() and prompts is None:
        remark(f"{program.manifest.base_model or file}, adapter {now}; {_HELP}")
    for line in lines:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        if command == "/new":
            talk.forget()
        elif command == "/adapter":
            now = _switched(session, states, rest.strip(), now, remark)
        elif command.startswith("/") and command[1:].isalpha():
            remark(f"{command} is no command: {_HELP}", "yellow")
        elif line.strip():
            _turn(talk, line, max_new_tokens, now, as_json, remark)


def _turn(talk: Talk, line: str, most: int, adapter: str, as_json: bool, remark: Remarks) -> None:
    """One question and its answer; what goes wrong with it ends no conversation."""
    try:
        found = talk.say(line, most, as_it_comes(as_json))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        typer.echo()
        remark("interrupted; neither question nor answer is remembered", "yellow")
        return
    except MobizoError as error:
        if not sys.stdin.isatty():
            raise
        remark(str(error), "red")
        return
    if as_json:
        answer = {"prompt": line, "adapter": adapter, **dataclasses.asdict(found)}
        typer.echo(json.dumps(answer, ensure_ascii=False))
    else:
        typer.echo()


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path) or name in (BASE, OF_RUN):
        raise ConfigError(
            f"--adapter is {text!r}", hint=f"--adapter NAME=FOLDER, with a name that is neither {BASE} nor {OF_RUN}"
        )
    return name, Path(path)


def _states(session: Session, named: dict[str, Path], run: Path | None, best: bool, remark: Remarks) -> dict[str, Any]:
    """The state of every adapter by its name; that of the model as it was compiled is called "base"."""
    states = {BASE: session.state()}
    for name, path in named.items():
        session.load_state(states[BASE])
        if path.suffix == ".ptd":
            session.import_ptd(path)
        elif path.is_dir():
            session.import_adapter(path)
        else:
            raise AdapterError("there is no such adapter", where=str(path), hint="a folder of peft, or a .ptd file")
        states[name] = session.state()
    if run is not None:
        restored(session, run, best)
        states[OF_RUN] = session.state()
    for name in (name for name in states if name != BASE):
        session.load_state(states[name])
        say_effect(session, remark, f"adapter {name}")
    return states


def _switched(session: Session, states: dict[str, Any], name: str, now: str, remark: Remarks) -> str:
    """The name of the adapter that answers from here on."""
    if name not in states:
        remark(f"adapters: {', '.join(states)}; now {now}", "yellow" if name else "dim")
        return now
    session.load_state(states[name])
    return name


def _lines(prompts: Path | None, remark: Remarks) -> Iterator[str]:
    """What the user says, a line for each turn."""
    if prompts is not None:
        yield from prompts.read_text(encoding="utf-8").splitlines()
        return
    asks = sys.stdin.isatty()
    while True:
        try:
            if asks:
                remark.console.print(Text("you: ", "bold"), end="")
            yield input()
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo()
            return
