"""`mobizo finetune`, `tune`, `evaluate` and `generate`: rows of text in, an adapter, numbers or text out."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table

from mobizo_compiler.cli.app import INTERRUPTED, AsJson, Best, ProgramFile, Quiet, Remarks, RunFolder, app, print_json
from mobizo_compiler.cli.compiling import unescaped
from mobizo_compiler.cli.options import ConfigFile, Section, with_sections
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, MissingPackageError
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import StepResult
from mobizo_compiler.load import load
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import Score, generate, score
from mobizo_compiler.text.hub import load_tokenizer
from mobizo_compiler.text.plot import plot_run
from mobizo_compiler.text.prompts import PromptConfig, samples, split
from mobizo_compiler.text.rows import read_rows
from mobizo_compiler.text.training import Outcome, TrainingConfig, Validation, read_record, restore_best, train
from mobizo_compiler.text.tuning import Trial, tune

PROMPTS = Section("prompts", (PromptConfig,), "", "Prompts and answers")
DataFile = Annotated[
    Path,
    typer.Option(
        "--data", help="Rows: .csv, .tsv, .jsonl, .json, or a folder that datasets saved.", show_default=False
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Folder or name of the tokenizer; the model's if left out.", show_default=False),
]
PLOT, PREFIX = "plot.png", "prefix"


@app.command("finetune")
@with_sections(PROMPTS, Section("training", (TrainingConfig,), "", "Training"))
def finetune_program(
    prompts: dict[str, Any],
    training: dict[str, Any],
    file: ProgramFile,
    data: DataFile,
    run: Annotated[Path, typer.Option("--run", help="Folder of the run; one that is there is gone on with.")],
    validation: Annotated[
        Path | None, typer.Option(help="Rows to measure on, in place of a share of the data.", show_default=False)
    ] = None,
    tokenizer: TokenizerName = None,
    plot: Annotated[bool, typer.Option(help=f"Draw {PLOT} in the folder at the end; needs matplotlib.")] = True,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a program on rows with a prompt and an answer.

    Only answers are labelled. What no adapter reaches is computed once for every row, and kept in the folder, if the
    program was compiled with --split-prefix. Ctrl-C ends the step in flight and leaves a run that the same command goes
    on with; its exit code is 130.
    """
    remark = Remarks(quiet)
    options = TrainingConfig.from_json(training)
    program = load(file)
    session = Session(program, prefix_cache=run / PREFIX if program.manifest.prefix else None)
    manifest = program.manifest
    source = _tokenizer_name(tokenizer, manifest)
    spelling = load_tokenizer(source)
    prompt = _prompt(prompts)
    learnt = samples(read_rows(data), prompt)
    measured = []
    if validation is not None:
        measured = samples(read_rows(validation), prompt)
    elif options.validation_share:
        learnt, measured = split(learnt, options.validation_share, options.seed)
    rows = TextData.encode(learnt, manifest, spelling, prompt)
    held_out = None
    if measured:
        held_out = TextData.encode(measured[: options.validation_rows], manifest, spelling, rows.config)
    _say_data(remark, rows, held_out, len(measured))
    notes = {"program": str(file), "data_file": str(data), "tokenizer": source, "eps_used": options.eps or manifest.eps}
    with _interruptible(remark) as interrupted, _Bar(remark) as bar:
        outcome = train(
            session,
            rows,
            held_out,
            options,
            run,
            notes=notes,
            on_begin=bar.begin,
            on_step=bar.step,
            on_validation=bar.validation,
            on_change=lambda text: remark(text, "yellow"),
            stop=interrupted,
        )
    record = read_record(run)
    drawn = plot and outcome.why != "interrupted" and _plot(record, run / PLOT, remark)
    if as_json:
        print_json(_result(outcome, run, drawn))
    elif not quiet:
        _show_outcome(Console(), outcome, file, run, drawn)
    if outcome.why == "interrupted":
        remark(
            f"interrupted after step {outcome.summary.steps} of {outcome.steps}; the same command goes on from there"
        )
        raise typer.Exit(INTERRUPTED)


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
    tokenizer: TokenizerName = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search for the size of the perturbation and the learning rate of a run, in a small part of its steps."""
    remark = Remarks(quiet)
    session = Session(file)
    spelling = load_tokenizer(_tokenizer_name(tokenizer, session.program.manifest))
    prompt = _prompt(prompts)
    rows = TextData.encode(samples(read_rows(data), prompt), session.program.manifest, spelling, prompt)

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
    tokenizer: TokenizerName = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a program on rows: loss of an answer's token, and, where answers are choices, accuracy and AUC.

    Without --run it is the model as it was compiled. With it, prompts are made as in the run where no option says
    otherwise.
    """
    remark = Remarks(quiet)
    session = Session(file)
    steps, record = _restored(session, run, best)
    spelling = load_tokenizer(_tokenizer_name(tokenizer or record.get("tokenizer"), session.program.manifest))
    prompt = _prompt(prompts, record)
    rows = TextData.encode(samples(read_rows(data), prompt), session.program.manifest, spelling, prompt)
    _say_data(remark, rows, None, 0)
    with _Bar(remark) as bar:
        bar.begin(0, len(rows), "evaluating")
        found = score(session, rows, bar.done)
    assert found is not None
    if as_json:
        print_json({"steps": steps, "choices": rows.choices, **dataclasses.asdict(found)})
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in {"after steps": str(steps), "rows": str(found.rows), **_numbers(found)}.items():
        table.add_row(name, value)
    Console().print(table)
    _say_bias(remark, found, rows.choices)


@app.command("generate")
def generate_text(
    file: ProgramFile,
    prompt: Annotated[str, typer.Argument(help="Text to go on with; - reads it from stdin.", show_default=False)],
    run: RunFolder = None,
    best: Best = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 32,
    tokenizer: TokenizerName = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    r"""Go on with a prompt, always with the most likely token, with the adapter that a run has trained.

    Each token is a forward pass over the whole length that the program was compiled for. A line break is written \n.
    """
    session = Session(file)
    _, record = _restored(session, run, best)
    spelling = load_tokenizer(_tokenizer_name(tokenizer or record.get("tokenizer"), session.program.manifest))
    text = sys.stdin.read() if prompt == "-" else unescaped(prompt) or ""
    shown = (lambda piece: None) if as_json else (lambda piece: typer.echo(piece, nl=False))
    found = generate(session, spelling, text, max_new_tokens, shown)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        typer.echo()


def _tokenizer_name(given: str | None, manifest: Manifest) -> str:
    name = given or manifest.base_model
    if not name:
        raise ConfigError("the program does not say which tokenizer it needs", hint="--tokenizer FOLDER-or-NAME")
    return name


def _prompt(given: dict[str, Any], record: dict[str, Any] | None = None) -> PromptConfig:
    """How rows become prompts: as given, and as in a run before."""
    before = (record or {}).get("data", {}).get("prompt", {})
    given = dict(given)
    if "template" in given:
        given["template"] = unescaped(given["template"])
    return PromptConfig.from_json({**before, **given})


def _restored(session: Session, run: Path | None, best: bool) -> tuple[int, dict[str, Any]]:
    """Steps of the state that the session has then, and the record of its run."""
    if run is None:
        if best:
            raise ConfigError("--best is about a run", hint="--run FOLDER")
        return 0, {}
    return restore_best(session, run) if best else session.restore(run), read_record(run)


def _say_data(remark: Remarks, rows: TextData, held_out: TextData | None, measured: int) -> None:
    what = f"{len(rows)} rows"
    if held_out is not None:
        what += f" to learn, {len(held_out)} to validate on"
        if measured > len(held_out):
            what += f" (the first of {measured}: --validation-rows)"
    if rows.choices:
        what += f"; answers: {', '.join(rows.choices)}"
    remark(what)
    for name, data in (("", rows), ("validation ", held_out)):
        if data is not None and data.cut:
            where = "their first tokens" if data.config.cut == "front" else "the end of their longest column"
            remark(f"{data.cut} of {len(data)} {name}prompts are too long and lose {where} (--cut)", "yellow")


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


class _Bar:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, remark: Remarks) -> None:
        self._remark = remark
        self._live = remark.console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
        )
        self._progress = Progress(*columns, console=remark.console, disable=not self._live or remark.console.quiet)
        self._task: TaskID | None = None
        self._smooth: float | None = None
        self._total = 0
        self._first = 0
        self._started = time.monotonic()

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, done: int, total: int, what: str = "fine-tuning") -> None:
        self._total, self._first = total, done
        self._task = self._progress.add_task(what, total=total, completed=done, detail="")
        if done:
            self._remark(f"going on after step {done} of {total}")

    def done(self, count: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=count)

    def step(self, step: int, result: StepResult) -> None:
        self._smooth = result.loss if self._smooth is None else 0.9 * self._smooth + 0.1 * result.loss
        if self._task is not None:
            self._progress.update(self._task, completed=step + 1, detail=f"loss {self._smooth:.3f}")
        made = step + 1 - self._first
        if not self._live and (step + 1) % 50 == 0:
            left = (time.monotonic() - self._started) / made * (self._total - step - 1)
            self._remark(f"step {step + 1} of {self._total}: loss {self._smooth:.3f}, about {left:.0f} s left")

    def validation(self, found: Validation) -> None:
        numbers = ", ".join(f"{name} {value}" for name, value in _numbers(found.score).items())
        self._remark(f"validation after step {found.step}: {numbers}")


def _numbers(found: Score) -> dict[str, str]:
    named = {"loss": found.loss, "choice loss": found.choice_loss, "accuracy": found.accuracy, "AUC": found.auc}
    return {name: f"{value:.3f}" for name, value in named.items() if value is not None}


def _say_bias(remark: Remarks, found: Score, choices: tuple[str, ...] | None) -> None:
    """Warn where accuracy says more about a liking for an answer than about the rows."""
    if found.biased and found.chosen and choices:
        favourite = max(range(len(choices)), key=found.chosen.__getitem__)
        remark(
            f"{choices[favourite]!r} is chosen for {found.chosen[favourite]:.0%} of the rows; without this liking the "
            f"accuracy would be {found.calibrated:.3f}, so the first gains of training will be no more than that",
            "yellow",
        )


def _plot(record: dict[str, Any], path: Path, remark: Remarks) -> bool:
    """Whether there is a plot: a run is not worth less without one."""
    try:
        plot_run(record, path)
    except MissingPackageError as error:
        remark(f"no {path.name}: {error.problem} (pip install matplotlib, or --no-plot)", "yellow")
        return False
    return True


def _result(outcome: Outcome, run: Path, drawn: bool) -> dict[str, Any]:
    return {
        "run": str(run),
        "ended": outcome.why,
        "steps": outcome.summary.steps,
        "resumed_at": outcome.summary.resumed_at,
        "void_steps": list(outcome.summary.void),
        "validations": [dataclasses.asdict(v) for v in outcome.validations],
        "best_step": outcome.best.step if outcome.best else None,
        "plot": str(run / PLOT) if drawn else None,
    }


def _show_outcome(console: Console, outcome: Outcome, file: Path, run: Path, drawn: bool) -> None:
    ended = {"done": "trained", "stopped early": "stopped early", "interrupted": "interrupted"}[outcome.why]
    console.print(f"{ended} after {outcome.summary.steps} steps", highlight=False)
    if outcome.summary.void:
        console.print(f"{len(outcome.summary.void)} steps had no finite loss and changed nothing", style="yellow")
    if outcome.validations and outcome.best is not None:
        chosen = {"before": outcome.validations[0], "now": outcome.validations[-1], "best": outcome.best}
        table = Table(
            "", *(f"{name} (step {v.step})" for name, v in chosen.items()), box=box.SIMPLE_HEAD, pad_edge=False
        )
        shown = [_numbers(v.score) for v in chosen.values()]
        for name in shown[0]:
            table.add_row(name, *(numbers.get(name, "") for numbers in shown))
        console.print(table)
    files = ["run.json", "journal", *([PLOT] if drawn else [])]
    console.print(f"in {run}: {', '.join(files)}", highlight=False, markup=False)
    if outcome.why != "interrupted":
        console.print(f"next: mobizo evaluate {file} --run {run} --data FILE", highlight=False, markup=False)
        console.print(f"      mobizo generate {file} --run {run} PROMPT", highlight=False, markup=False)
        console.print(f"      mobizo export-adapter {file} {run} FOLDER", highlight=False, markup=False)
