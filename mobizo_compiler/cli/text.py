"""`mobizo finetune`, `tune`, `evaluate` and `generate`: rows of text in, an adapter, numbers or text out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mobizo_compiler.cli.app import (
    INTERRUPTED,
    AsJson,
    Best,
    Encoding,
    ProgramFile,
    Quiet,
    Remarks,
    RunFolder,
    TrustRemoteCode,
    app,
    as_it_comes,
    print_json,
)
from mobizo_compiler.cli.chat import say_first_row
from mobizo_compiler.cli.classes import confusion_table
from mobizo_compiler.cli.losses import unescaped
from mobizo_compiler.cli.options import ConfigFile, Section, with_sections
from mobizo_compiler.cli.outcome import PLOT, next_commands, plotted, result_of, say_unchanged, show_outcome
from mobizo_compiler.cli.privacy import Private
from mobizo_compiler.cli.progress import Bar, TimeLeft, shown
from mobizo_compiler.cli.runs import (
    asked_of,
    check_file,
    prompt_of,
    record_of,
    restored,
    tokenizer_for,
    training_in,
)
from mobizo_compiler.cli.tasks import Asked, TaskName, TaskRows, task_score
from mobizo_compiler.device.accountant import Privacy
from mobizo_compiler.device.generation import Sampling
from mobizo_compiler.device.limits import Limits
from mobizo_compiler.device.ranks import DistributedSession
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError
from mobizo_compiler.format.program import Program
from mobizo_compiler.load import load
from mobizo_compiler.text.confusion import Confusion
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import Score, measure
from mobizo_compiler.text.generation import generate
from mobizo_compiler.text.paper_tasks import ROWS
from mobizo_compiler.text.prompts import PromptConfig, Sample, empty_prompts, split
from mobizo_compiler.text.rows import UTF8
from mobizo_compiler.text.training import TrainingConfig, read_record, train
from mobizo_compiler.text.tuning import Trial, tune

PROMPTS = Section("prompts", (PromptConfig,), "", "Prompts and answers")
SAMPLING = Section("sampling", (Sampling,), "", "Choice of the next token")
DataFile = Annotated[
    Path,
    typer.Option(
        "--data",
        help="Rows: .csv, .tsv, .jsonl, .json, .parquet, or a folder that datasets saved; with --task, a folder of "
        "splits.",
        show_default=False,
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Folder or name of the tokenizer; the model's if left out.", show_default=False),
]
PREFIX = "prefix"


@app.command("finetune")
@with_sections(
    PROMPTS,
    Section("training", (TrainingConfig,), "", "Training"),
    Section("privacy", (Privacy,), "privacy", "Differential privacy (compile with --zo-row-losses)"),
    Section("limits", (Limits,), "", "Limits: the same command goes on later"),
)
def finetune_program(
    prompts: dict[str, Any],
    training: dict[str, Any],
    privacy: dict[str, Any],
    limits: dict[str, Any],
    file: ProgramFile,
    data: DataFile,
    run: Annotated[Path, typer.Option("--run", help="Folder of the run; one that is there is gone on with.")],
    validation: Annotated[
        Path | None, typer.Option(help="Rows to measure on, in place of a share of the data.", show_default=False)
    ] = None,
    task: TaskName = None,
    task_rows: TaskRows = ROWS,
    encoding: Encoding = UTF8,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    plot: Annotated[bool, typer.Option(help=f"Draw {PLOT} in the folder at the end; needs matplotlib.")] = True,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="One of several processes that torchrun started, which share the rows of every step."
        ),
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a program on rows with a prompt and an answer.

    Only answers are labelled. With --task the data is a folder with the splits of a task of the paper, and settings are
    the paper's where none are given. What no adapter reaches is computed once for every row, and kept in the folder, if
    the program was compiled with --split-prefix. Ctrl-C ends the step in flight and leaves a run that the same command
    goes on with; its exit code is 130.
    """
    follows = distributed and os.environ.get("RANK", "0") != "0"  # rank 0 says what there is to say
    remark = Remarks(quiet or follows)
    options, until = TrainingConfig.from_json(training), Limits.from_json(limits)
    private = Private(Privacy.from_json(privacy)) if privacy else None
    if private is not None and distributed:
        raise ConfigError("a private run is of one process", hint="leave out --distributed")
    check_file(file)
    asked = Asked.of(task, encoding, task_rows)
    prompt = prompt_of(prompts, file, {}, asked.prompt)
    (learnt, prompt), measured = asked.read(data, prompt, "train", remark), list[Sample]()
    if validation is not None or asked.has_validation(data):
        measured, _ = asked.read(validation or data, prompt, "validation", remark)
    elif options.validation_share:
        learnt, measured = split(learnt, options.validation_share, options.seed)
    program = load(file)
    manifest = program.manifest
    options = TrainingConfig.from_json(asked.training(training, manifest, remark))
    spelling, source = tokenizer_for(tokenizer, manifest, trust_remote_code)
    rows = TextData.encode(learnt, manifest, spelling, prompt)
    held_out = None
    if measured:
        held_out = TextData.encode(measured[: options.validation_rows], manifest, spelling, rows.config)
    _say_data(remark, rows, held_out, len(measured), empty_prompts(learnt) + empty_prompts(measured))
    if rows.config.chat is not None:
        say_first_row(remark, rows, spelling)
    notes = {"program": str(file), "data_file": str(data), "tokenizer": source, "eps_used": options.eps or manifest.eps}
    if asked.task is not None:
        notes["task"] = asked.task.name
    if follows:
        _follow(program, rows, options, run)
        return
    with training_in(run), _interruptible(remark) as interrupted:
        # Before the bar takes hold of stderr.
        kind = DistributedSession if distributed else Session
        session = kind(program, prefix_cache=run / PREFIX if manifest.prefix else None)
        if isinstance(session, DistributedSession):
            _agree(session, rows, options)
            remark(f"{session.ranks} ranks share the rows of every step", "dim")
        with Bar(remark) as bar:

            def begin(done: int, steps: int) -> None:
                every = options.validate_every if held_out is not None else steps + 1
                first = math.ceil(len(rows) / rows.layout.rows / session.ranks) if manifest.prefix else 0
                bar.begin(done, steps, left=TimeLeft(steps, first, lambda step: math.ceil((steps - step) / every)))

            outcome = train(
                session,
                rows,
                held_out,
                options,
                run,
                notes=notes,
                on_begin=begin,
                on_step=functools.partial(private.step, bar) if private else bar.step,
                on_validation=bar.validation,
                on_change=lambda text: remark(text, "yellow"),
                stop=interrupted,
                until=until,
                privacy=private.privacy if private else None,
                on_privacy=functools.partial(private.begin, remark, len(rows)) if private else lambda *_: None,
            )
    say_unchanged(remark, outcome)
    record = read_record(run)
    drawn = plot and outcome.ended and plotted(record, run / PLOT, remark)
    if as_json:
        spent = {} if private is None else {"epsilon_spent": private.spent(outcome.summary.steps)}
        print_json({**result_of(outcome, run, drawn), **spent})
    elif not quiet:
        if private is not None:
            Console().print(private.told(outcome.summary.steps), highlight=False)
        show_outcome(Console(), outcome, run, drawn, next_commands(file, run, rows, manifest, data if task else None))
    if not outcome.ended:
        why = "interrupted" if outcome.summary.limit is None else f"{outcome.summary.limit}: stopped"
        remark(f"{why} after step {outcome.summary.steps} of {outcome.steps}; the same command goes on from there")
    if outcome.why == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _follow(program: Program, rows: TextData, options: TrainingConfig, run: Path) -> None:
    """Be a rank that measures on rows of its own, until rank 0 says that the run is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all, and rank 0 ends the run
    cache = run / f"{PREFIX}.{os.environ['RANK']}" if program.manifest.prefix else None
    if cache is not None:
        run.mkdir(parents=True, exist_ok=True)
    session = DistributedSession(program, prefix_cache=cache)
    _agree(session, rows, options)
    batches = rows.batches(options.seed, options.balanced, options.group_by_length)
    session.finetune(batches, steps=0, learning_rate=0.0)  # rank 0 knows both


def _agree(session: DistributedSession, rows: TextData, options: TrainingConfig) -> None:
    """Make sure that the ranks go through the same rows in the same order."""
    order = [rows.digest, options.seed, options.balanced, options.group_by_length]
    session.agree("data, prompt or order of rows", json.dumps(order).encode())


@app.command("tune")
@with_sections(PROMPTS)
def tune_program(
    prompts: dict[str, Any],
    file: ProgramFile,
    data: DataFile,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run that it is for.")] = 200,
    share: Annotated[float, typer.Option(min=0, max=1, help="Most that the search may take of them.")] = 0.1,
    eps: Annotated[float | None, typer.Option(help="Not searched for if given.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the run.")] = 0,
    task: TaskName = None,
    task_rows: TaskRows = ROWS,
    encoding: Encoding = UTF8,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search for the size of the perturbation and the learning rate of a run, in a small part of its steps."""
    remark = Remarks(quiet)
    check_file(file)
    asked = Asked.of(task, encoding, task_rows)
    learnt, prompt = asked.read(data, prompt_of(prompts, file, {}, asked.prompt), "train", remark)
    program = load(file)
    spelling, _ = tokenizer_for(tokenizer, program.manifest, trust_remote_code)
    rows = TextData.encode(learnt, program.manifest, spelling, prompt)
    session = Session(program)

    def say(what: str, trial: Trial) -> None:
        remark(f"{what} {trial.value:.3g}: {'agreement' if what == 'eps' else 'loss'} {trial.score:.3f}")

    found = tune(session, rows.batches(seed), steps=steps, share=share, eps=eps, seed=seed, on_trial=say)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        typer.echo(f"--eps {found.eps:g} --learning-rate {found.learning_rate:.3g}")


@app.command("evaluate")
@with_sections(PROMPTS)
def evaluate_program(
    prompts: dict[str, Any],
    file: ProgramFile,
    data: DataFile,
    run: RunFolder = None,
    best: Best = False,
    task: TaskName = None,
    task_rows: TaskRows = ROWS,
    encoding: Encoding = UTF8,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a program on rows: loss of an answer's token, and, where answers are choices, accuracy and AUC.

    Without --run it is the model as it was compiled. With it, prompts are made as in the run where no option says
    otherwise. With --task, and after a run with it, the score of the task is measured too, on the split for validation.
    """
    remark = Remarks(quiet)
    check_file(file)
    record = record_of(run, best)
    asked = Asked.of(task, encoding, task_rows, record)
    texts, prompt = asked.read(data, prompt_of(prompts, file, record, asked.prompt), "validation", remark)
    program = load(file)
    spelling, _ = tokenizer_for(tokenizer, program.manifest, trust_remote_code, record.get("tokenizer"))
    rows = TextData.encode(texts, program.manifest, spelling, prompt)
    session = Session(program)
    steps = restored(session, run, best)
    _say_data(remark, rows, None, 0, empty_prompts(texts))
    scores: dict[str, float | None] = {}
    with Bar(remark) as bar:
        bar.begin(0, len(rows), "evaluating")
        measured = measure(session, rows, bar.done)
        assert measured is not None
        found, confusion = measured.score, None
        if measured.log_NC is not None and rows.choices is not None:
            confusion = Confusion.of(measured.log_NC.argmax(dim=-1), measured.answers, rows.choices)
        if asked.task is not None:
            scores = task_score(asked.task, session, spelling, rows, texts, confusion, bar, remark)
    if as_json:
        of_task = {} if asked.task is None else {"task": asked.task.name, "task_scores": scores}
        own = {"steps": steps, "choices": rows.choices, **dataclasses.asdict(found)}
        print_json({**own, **_as_json(confusion), **of_task})
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    named = {name: f"{value:.3f}" for name, value in scores.items() if value is not None}
    for name, value in {"after steps": str(steps), "rows": str(found.rows), **shown(found), **named}.items():
        table.add_row(name, value)
    Console().print(table)
    if confusion is not None:
        Console().print(confusion_table(confusion))
    _say_bias(remark, found, rows.choices)


@app.command("generate")
@with_sections(SAMPLING)
def generate_text(
    sampling: dict[str, Any],
    file: ProgramFile,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to go on with; - reads it from stdin.", show_default=False)
    ],
    run: RunFolder = None,
    best: Best = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 32,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    r"""Go on with a prompt, with the adapter that a run has trained. A line break is written \n.

    A program that was compiled with --generate-context has a cache of keys and values; with another one, each token is
    a forward pass over the whole length that it was compiled for.
    """
    chosen = Sampling(**sampling)
    check_file(file)
    record = record_of(run, best)
    program = load(file)
    spelling, _ = tokenizer_for(tokenizer, program.manifest, trust_remote_code, record.get("tokenizer"))
    session = Session(program)
    restored(session, run, best)
    text = asked_of(sys.stdin.read() if prompt == "-" else unescaped(prompt) or "", spelling, record)
    found = generate(session, spelling, text, max_new_tokens, as_it_comes(as_json), chosen)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        typer.echo()


def _say_data(remark: Remarks, rows: TextData, held_out: TextData | None, measured: int, empty: int) -> None:
    what = f"{len(rows)} rows"
    if held_out is not None:
        what += f" to learn, {len(held_out)} to validate on"
        if measured > len(held_out):
            what += f" (the first of {measured}: --validation-rows)"
    if rows.choices:
        what += f"; answers: {', '.join(rows.choices)}"
    remark(what)
    if rows.assumed:
        named = ", ".join(f"{number} is {name}" for number, name in enumerate(rows.choices or ()))
        remark(f"the model has no names for its classes; by the alphabet, {named} (--choices names them)", "yellow")
    if empty:
        remark(f"{empty} prompts have no text in any column", "yellow")
    for name, data in (("", rows), ("validation ", held_out)):
        if data is not None and data.cut:
            where = "their first tokens" if data.config.cut == "front" else "the end of their longest column"
            what = f"prompts are too long and lose {where} (--cut)"
            if data.config.chat is not None:
                what = "conversations are too long and lose their oldest turns, or the end of the last answer"
            remark(f"{data.cut} of {len(data)} {name}{what}", "yellow")


@contextlib.contextmanager
def _interruptible(remark: Remarks) -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C only asks for an end; a second one is the usual interrupt."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        remark("finishing the step in flight; Ctrl-C again does not wait for it")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _say_bias(remark: Remarks, found: Score, choices: tuple[str, ...] | None) -> None:
    """Warn where accuracy says more about a liking for an answer than about the rows."""
    if found.biased and found.chosen and choices:
        favourite = max(range(len(choices)), key=found.chosen.__getitem__)
        remark(
            f"{choices[favourite]!r} is chosen for {found.chosen[favourite]:.0%} of the rows; without this liking the "
            f"accuracy would be {found.calibrated:.3f}, so the first gains of training will be no more than that",
            "yellow",
        )


def _as_json(confusion: Confusion | None) -> dict[str, Any]:
    if confusion is None:
        return {"confusion": None, "classes": None, "macro_f1": None}
    return {"confusion": confusion.counts, "classes": confusion.by_choice(), "macro_f1": confusion.macro_f1}
