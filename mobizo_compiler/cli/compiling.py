"""`mobizo compile`: a model of transformers as a program file."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.export import Dim

from mobizo_compiler.api import compile
from mobizo_compiler.backends import Backend, get_backend
from mobizo_compiler.cli.app import AsJson, Quiet, Remarks, app, megabytes, print_json
from mobizo_compiler.cli.options import ConfigFile, Section, with_sections
from mobizo_compiler.compiling.dry_run import DryRun, estimate
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.config import LoraConfig, ZOConfig
from mobizo_compiler.drawing import check_format
from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.format.program import Program
from mobizo_compiler.inspection.figures import draw_program
from mobizo_compiler.quantization.weights import ROUND_ACTIVATIONS, QuantizationConfig
from mobizo_compiler.step.losses import LOSSES, get_loss
from mobizo_compiler.step.rules import RULES
from mobizo_compiler.text.hub import TASKS, load_model, load_tokenizer
from mobizo_compiler.text.prompts import Piece, PromptConfig
from mobizo_compiler.text.rows import TEXT, read_rows
from mobizo_compiler.text.speller import Speller

_DRY_PHASES = ("capture", "rewrite")
_DEFAULT_LOSS = {"causal-lm": "causal-lm", "sequence-classification": "sequence-classification"}


@dataclasses.dataclass(frozen=True)
class LossChoice:
    """Which loss.

    Args:
        kind: causal-lm, choice, masked-lm, sequence-classification or mse; that of the task if not given.
        choices: The answers between which the loss "choice" decides, one token each behind a space: "yes,no".
    """

    kind: str | None = None
    choices: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class RuleChoice:
    """Which update rule.

    Args:
        rule: sgd, momentum, sign, adam or scalar-adam.
    """

    rule: str = "sgd"


SECTIONS = (
    Section("lora", (LoraConfig,), "lora", "Adapters"),
    Section("zo", (ZOConfig,), "zo", "Gradient estimate"),
    Section("rule", (RuleChoice, *RULES.values()), "rule", "Update rule", head="rule"),
    Section("loss", (LossChoice, *LOSSES.values()), "loss", "Loss", head="kind", text=("choices",)),
    Section("quantization", (QuantizationConfig,), "quantization", "Quantization of the frozen weights", head="recipe"),
)


@app.command("compile")
@with_sections(*SECTIONS)
def compile_model(
    lora: dict[str, Any],
    zo: dict[str, Any],
    rule: dict[str, Any],
    loss: dict[str, Any],
    quantization: dict[str, Any],
    model: Annotated[
        str,
        typer.Argument(help="Folder of a model of transformers, or its name on the hub (then it is downloaded)."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The program file to write.", show_default=False)
    ] = None,
    task: Annotated[str, typer.Option(help=f"What to load the model for: {' or '.join(TASKS)}.")] = "causal-lm",
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch; every lane has as many.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a row; shorter ones are padded.")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(min=3, help="Take every length up to this, in place of one.", show_default=False)
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=2, help="Take any number of rows up to this.", show_default=False)
    ] = None,
    backend: Annotated[str, typer.Option(help="See mobizo backends.")] = "xnnpack",
    state: Annotated[
        str, typer.Option(help="shared, data (begins from a .ptd), or io for Android and iOS.")
    ] = "shared",
    split_prefix: Annotated[
        bool,
        typer.Option(
            "--split-prefix", help="Make what no adapter reaches a method whose results are kept; see mobizo finetune."
        ),
    ] = False,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="Real text for what is measured on examples (quantization that rounds activations): lines, CSV or "
            "JSON lines.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='Prompt of an example: "Review: {text}".', show_default=False)
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of a LoRA of peft, whose layers, rank and A are taken.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name of the tokenizer; the model's if left out.", show_default=False)
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Reuse what was compiled before from equal input.", show_default=False)
    ] = None,
    dump_dir: Annotated[
        Path | None, typer.Option(help="Write the program text after every pass here.", show_default=False)
    ] = None,
    graph: Annotated[Path | None, typer.Option(help="Draw the program: .svg or .png.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; write nothing.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compile a model into a program that fine-tunes itself with forward passes only.

    The same input gives the same file, byte for byte. With --dry-run everything is checked, captured and rewritten, but
    not lowered.
    """
    remark = Remarks(quiet)
    _check(task, output, dry_run, graph, tokens, max_tokens, rows, max_rows)
    kind = _loss_kind(loss, task)
    options = Options.from_json(
        {
            "lora": lora,
            "zo": zo,
            "rule": {"rule": "sgd", **rule},
            "quantization": _quantization(quantization),
            "state": state,
            "split_prefix": split_prefix,
        }
    )
    target: Backend = get_backend(backend)
    started = time.monotonic()

    def say(line: str) -> None:
        remark(f"{time.monotonic() - started:6.0f} s  {line}")

    loaded = load_model(model, task)
    texts = _texts(examples, template)
    speller = Speller(load_tokenizer(tokenizer or model)) if texts or kind == "choice" else None
    inputs = _inputs(loaded, speller, texts, rows, tokens)
    if not texts and options.quantization is not None and _measures(options.quantization):
        remark(
            "smoothing is measured on random tokens: --examples FILE with real text suits the model better", "yellow"
        )
    program = compile(
        loaded,
        inputs,
        options=dataclasses.replace(options, loss=_loss(kind, loss, speller)),
        backend=DryRun(target) if dry_run else target,
        dynamic_shapes=_dynamic(inputs, max_rows, max_tokens),
        adapter=adapter,
        base_model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        dump_dir=None if dry_run else dump_dir,
        cache_dir=None if dry_run else cache_dir,
        progress=lambda line: None if dry_run and line not in _DRY_PHASES else say(line),
    )
    if output is not None and not dry_run:
        program.save(output)
    if graph is not None and not dry_run:
        draw_program(program.manifest, graph)
    described = _described(program, None if dry_run else output)
    if as_json:
        print_json(described)
    elif dry_run or not quiet:
        _show(program, described, dry_run)


def _check(
    task: str,
    output: Path | None,
    dry_run: bool,
    graph: Path | None,
    tokens: int,
    max_tokens: int | None,
    rows: int,
    max_rows: int | None,
) -> None:
    """What can be said before anything is loaded."""
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}", hint=f"use {' or '.join(TASKS)}")
    if output is None and not dry_run:
        raise typer.BadParameter("name the program file to write, or use --dry-run", param_hint="--output")
    for path in (output, graph):
        if path is not None and not path.parent.is_dir():
            raise ConfigError("there is no such folder", where=str(path.parent))
    if graph is not None:
        check_format(graph)
    for name, size, most in (("tokens", tokens, max_tokens), ("rows", rows, max_rows)):
        if most is not None and size > most:
            raise ConfigError(f"--{name} is {size}, which is more than --max-{name} {most}")


def _quantization(given: dict[str, Any]) -> QuantizationConfig | None:
    if given and "recipe" not in given:
        raise ConfigError(f"quantization has {', '.join(given)}, but no recipe", hint="--quantization 8da4w")
    return QuantizationConfig.from_json(given) if given else None


def _measures(quantization: QuantizationConfig) -> bool:
    return quantization.recipe in ROUND_ACTIVATIONS and quantization.smoothing != 0


def _loss_kind(given: dict[str, Any], task: str) -> str:
    kind = given.get("kind", _DEFAULT_LOSS[task])
    if kind not in LOSSES:
        raise ConfigError(f"loss is {kind!r}", hint=f"use one of {', '.join(LOSSES)}")
    if (kind == "choice") != ("choices" in given):
        raise ConfigError(
            "the loss choice and --loss-choices go together", hint='--loss choice --loss-choices "yes,no"'
        )
    return str(kind)


def _loss(kind: str, given: dict[str, Any], speller: Speller | None) -> Any:
    fields = {name: value for name, value in given.items() if name != "kind"}
    if kind == "choice":
        assert speller is not None
        spelled = {choice: speller.answer([Piece("x:", True)], choice.strip()) for choice in fields["choices"]}
        for choice, ids in spelled.items():
            if len(ids) != 1:
                raise ConfigError(
                    f"the choice {choice!r} is {len(ids)} tokens behind a space; the loss decides between single ones",
                    hint="choose other words for the answers, or train with the loss causal-lm",
                )
        fields["choices"] = tuple(ids[0] for ids in spelled.values())
    return get_loss({"loss": kind, **fields})


def _texts(examples: Path | None, template: str | None) -> list[str]:
    """Prompts to measure on."""
    if examples is None:
        if template is not None:
            raise ConfigError("the template is for the rows of --examples, which is not given")
        return []
    prompt = PromptConfig(template=unescaped(template), prompt_column=TEXT)
    rows = read_rows(examples)
    for row in rows:
        if missing := [column for column in prompt.columns if column not in row.cells]:
            raise DataError(
                f"there is no column {missing[0]!r}",
                where=row.where,
                hint=f"the columns are {', '.join(row.cells)}; --template chooses",
            )
    return [prompt.render(row.cells) for row in rows]


def unescaped(template: str | None) -> str | None:
    r"""A template from a command line, where a line break is written `\n`.

    >>> unescaped(r"a\nb")
    'a\nb'
    """
    return template and template.replace("\\n", "\n").replace("\\t", "\t")


def _inputs(model: Any, speller: Speller | None, texts: list[str], rows: int, tokens: int) -> dict[str, Tensor]:
    """The example inputs: real text over and over again, or tokens drawn with a fixed seed."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if not texts or speller is None:
        ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ids = torch.full((rows, tokens), speller.padding or 0)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        # A row is filled with texts, so that few rows see much of the language.
        found = list(speller.front)
        for text in texts[row::rows] or texts:
            found += speller.ids(text)
        whole = torch.tensor(found[:tokens])
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    return {"input_ids": ids, "attention_mask": mask}


def _dynamic(inputs: dict[str, Tensor], max_rows: int | None, max_tokens: int | None) -> Any:
    sizes = {}
    if max_rows is not None:
        sizes[0] = Dim("rows", max=max_rows)
    if max_tokens is not None:
        sizes[1] = Dim("tokens", max=max_tokens)
    return dict.fromkeys(inputs, sizes) if sizes else None


def _described(program: Program, output: Path | None) -> dict[str, Any]:
    manifest = program.manifest
    return {
        "file": str(output) if output else None,
        "file_bytes": output.stat().st_size if output else None,
        "backend": manifest.backend,
        "loss": manifest.loss,
        "quantization": manifest.quantization,
        "lanes": manifest.zo.lanes,
        "eps": manifest.eps,
        "parameters": program.parameters,
        "sites": [site.fqn for site in program.sites],
        # A program out of the cache has no graphs to estimate from.
        "estimate": dataclasses.asdict(estimate(program)) if program.methods else None,
    }


def _show(program: Program, described: dict[str, Any], dry_run: bool) -> None:
    manifest, needs = program.manifest, described["estimate"]
    rows = {
        "file": "none: this was a dry run"
        if dry_run
        else f"{described['file']}, {megabytes(described['file_bytes'] or 0)}",
        "backend": manifest.backend,
        "loss": manifest.loss,
        "estimator": f"{manifest.zo.estimator}, {manifest.zo.queries} queries, {manifest.zo.lanes} lanes; "
        f"eps {manifest.eps:g}; {manifest.rule['rule']}",
        "adapters": f"{program.parameters:,} parameters in {len(program.sites)} layers",
    }
    if dry_run:
        named = [site.fqn for site in program.sites]
        rows["layers"] = ", ".join(named[:6]) + (f", ... and {len(named) - 6} more" if len(named) > 6 else "")
    if needs:
        ratio = needs["step_multiply_adds"] / max(1, needs["inference_multiply_adds"])
        rows["weights"] = f"{megabytes(needs['weight_bytes'])}, state {megabytes(needs['state_bytes'])}"
        rows["activations"] = (
            f"about {megabytes(needs['step_activation_bytes'])} in a step, "
            f"{megabytes(needs['inference_activation_bytes'])} in an evaluation of one batch"
        )
        rows["work"] = f"{needs['step_multiply_adds'] / 1e9:.3g} G multiply-adds in a step, {ratio:.3g} evaluations"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(text))
    Console().print(table)
