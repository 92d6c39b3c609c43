"""What commands about runs share: a folder that is looked at first, its state and its prompts."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from mobizo_compiler.cli.app import Remarks, print_json
from mobizo_compiler.cli.losses import unescaped
from mobizo_compiler.device.run import JOURNAL, begin
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import (
    ArtifactError,
    ConfigError,
    JournalError,
    JournalLockedError,
    MobizoError,
    ModelSourceError,
)
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.vocabulary import check_vocabulary
from mobizo_compiler.load import load
from mobizo_compiler.text.chat_rows import asked
from mobizo_compiler.text.conversations import USER, Message
from mobizo_compiler.text.hub import load_tokenizer
from mobizo_compiler.text.prompts import PromptConfig
from mobizo_compiler.text.training import read_record, restore_best


def check_file(file: Path) -> None:
    """Raise `ArtifactError` unless there is such a file; what is in it is looked at when it is loaded."""
    if not file.is_file():
        raise ArtifactError("there is no such program file", where=str(file))


def check_run(run: Path) -> None:
    """Raise `JournalError` unless the folder has a run."""
    if not (run / JOURNAL).exists():
        raise JournalError("there is no run in this folder", where=str(run))


def record_of(run: Path | None, best: bool) -> dict[str, Any]:
    """The record of a run, before anything is loaded for it; empty without a run."""
    if run is None:
        if best:
            raise ConfigError("--best is about a run", hint="--run FOLDER")
        return {}
    check_run(run)
    return read_record(run)


def prompt_of(
    given: dict[str, Any], file: Path, record: Mapping[str, Any], of_task: Mapping[str, Any] | None = None
) -> PromptConfig:
    """How rows become prompts: as given, else as in a run before, else as a task or the program has it."""
    before = record.get("data", {}).get("prompt", of_task)
    if before is None and not {"template", "prompt_column"} & given.keys():
        before = load(file, verify=False).manifest.prompt
    given = dict(given)
    for name in ("template", "pair_template"):
        if name in given:
            given[name] = unescaped(given[name])
    if "chat_template" in given and "{" not in given["chat_template"]:  # else it is the template itself
        given["chat_template"] = Path(given["chat_template"]).read_text(encoding="utf-8")
    return PromptConfig.from_json({**(before or {}), **given})


def prompt_in(record: Mapping[str, Any]) -> PromptConfig:
    """How a run made its prompts; the defaults without a run."""
    return PromptConfig.from_json(record.get("data", {}).get("prompt", {}))


def asked_of(text: str, tokenizer: Any, record: Mapping[str, Any]) -> str | list[int]:
    """What a model is to go on with: the text, or, if the run was trained on conversations, the tokens that ask it."""
    prompt = prompt_in(record)
    return text if prompt.chat is None else asked([Message(USER, text)], tokenizer, prompt)


def restored(session: Session, run: Path | None, best: bool) -> int:
    """Steps of the state that the session has then."""
    if run is None:
        return 0
    return restore_best(session, run) if best else session.restore(run)


@contextlib.contextmanager
def training_in(run: Path) -> Iterator[None]:
    """Train in a folder within the block: one process at a time, and nothing is left of a run that was refused.

    Raises:
        JournalLockedError: Another process trains there.
    """
    begun = run.exists()
    try:
        yield
    except JournalLockedError:
        raise JournalLockedError(
            "another process is training in this folder",
            where=str(run),
            hint="wait for it to end, or name another folder with --run",
        ) from None
    except MobizoError:
        if not begun and not (run / JOURNAL).exists():
            shutil.rmtree(run, ignore_errors=True)
        raise


def tokenizer_for(given: str | None, manifest: Manifest, trust_remote_code: bool, recorded: str | None = None) -> Any:
    """The tokenizer that is named, or that of the run, or that of the model, and its name.

    Raises:
        ModelSourceError: There is none, and the hint says how to name one; or it is that of another model.
    """
    name = given or recorded or manifest.tokenizer or manifest.base_model
    if not name:
        raise ModelSourceError("the program does not say which tokenizer it needs", hint="--tokenizer FOLDER-or-NAME")
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    except ModelSourceError as error:
        if given:
            raise
        moved = "the program was compiled from a model that was there; "
        hint = f"{error.hint}; or " if error.hint and "--trust" in error.hint else ""
        raise ModelSourceError(
            error.problem, where=error.where, hint=f"{hint}{moved}--tokenizer FOLDER-or-NAME says where it is now"
        ) from None
    check_vocabulary(tokenizer, manifest.vocabulary, name)
    return tokenizer, name


def say_effect(session: Session, remark: Remarks, who: str) -> None:
    """Say whether the adapter of a session is active, and how far it moves the model's answer to a fixed input."""
    if effect := session.probe().effect:
        remark(f"{who}: moves the model's answer to a fixed input by {effect:.2%}", "dim")
    else:
        remark(f"{who}: changes nothing of the model's answer to a fixed input; is it trained?", "yellow")


def begin_with_adapter(session: Session, run: Path, adapter: Path, as_json: bool, remark: Remarks) -> None:
    """Begin a run from the adapter that a session was given, and say so."""
    say_effect(session, remark, "the adapter")
    begin(session, run)
    if as_json:
        print_json({"run": str(run), "parameters": session.program.parameters})
    else:
        typer.echo(f"the run in {run} begins with the adapter in {adapter}")
