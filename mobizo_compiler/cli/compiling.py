"""`mobizo compile`: a model of transformers as a program file."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from torch.export import Dim

from mobizo_compiler.api import compile
from mobizo_compiler.backends import Backend, get_backend
from mobizo_compiler.cli.app import (
    AsJson,
    Encoding,
    Quiet,
    Remarks,
    TrustRemoteCode,
    app,
    print_json,
)
from mobizo_compiler.cli.classes import recommended
from mobizo_compiler.cli.classify import ClassTable, check_free, completed
from mobizo_compiler.cli.compiled import description, say_new, say_rank, show_program
from mobizo_compiler.cli.losses import LOSSES, LossChoice, loss_kind, loss_of, unescaped
from mobizo_compiler.cli.model_inputs import check_room, example_inputs
from mobizo_compiler.cli.options import ConfigFile, Section, chosen, with_sections
from mobizo_compiler.cli.tasks import PaperProgram, check_alone
from mobizo_compiler.compiling.dry_run import DryRun
from mobizo_compiler.compiling.model_config import words_of
from mobizo_compiler.compiling.options import Options
from mobizo_compiler.config import GenerateConfig, LoraConfig, ZOConfig
from mobizo_compiler.drawing import check_format
from mobizo_compiler.errors import AdapterError, BackendUnavailableError, ConfigError
from mobizo_compiler.format.peft import read_peft
from mobizo_compiler.format.vocabulary import vocabulary_of
from mobizo_compiler.inspection.figures import draw_program
from mobizo_compiler.quantization.weights import ROUND_ACTIVATIONS, QuantizationConfig
from mobizo_compiler.step.rules import RULES
from mobizo_compiler.text.hub import TASKS, load_model, load_tokenizer
from mobizo_compiler.text.paper_tasks import get_task
from mobizo_compiler.text.prompts import Piece, PromptConfig, read_label_words
from mobizo_compiler.text.rows import TEXT, UTF8, read_rows
from mobizo_compiler.text.speller import Speller

_NOT_DRY = ("lower", "check")  # phases that a dry run leaves out
ROWS, TOKENS = 2, 64  # of a batch, where nothing else is said


@dataclasses.dataclass(frozen=True)
class RuleChoice:
    """Which update rule.

    Args:
        rule: sgd, momentum, sign, adam, scalar-adam, or an installed one.
        options: Options of a rule of another package, as JSON.
    """

    rule: str = "sgd"
    options: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class EstimatorChoice:
    """Which estimator.

    Args:
        estimator: two-sided, one-sided, or an installed one; mobizo extensions lists them.
        estimator_options: Options of an estimator of another package, as JSON.
    """

    estimator: str = "two-sided"
    estimator_options: dict[str, Any] | None = None


_RULES = tuple(map(RULES.class_of, RULES.built_in))
SECTIONS = (
    Section("lora", (LoraConfig,), "lora", "Adapters"),
    Section("zo", (EstimatorChoice, ZOConfig), "zo", "Gradient estimate", alone=("estimator", "estimator_options")),
    Section("rule", (RuleChoice, *_RULES), "rule", "Update rule", head="rule"),
    Section("loss", (LossChoice, *LOSSES.values()), "loss", "Loss", head="kind", text=("choices",)),
    Section("generate", (GenerateConfig,), "generate", "Generation with a cache of keys and values"),
    Section("quantization", (QuantizationConfig,), "quantization", "Quantization of the frozen weights", head="recipe"),
)


@app.command("compile")
@with_sections(*SECTIONS)
def compile_model(
    lora: dict[str, Any],
    zo: dict[str, Any],
    rule: dict[str, Any],
    loss: dict[str, Any],
    generate: dict[str, Any],
    quantization: dict[str, Any],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a model of transformers, a .gguf checkpoint, or a name on the hub (then it is downloaded).",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The program file to write.", show_default=False)
    ] = None,
    task: Annotated[str, typer.Option(help=f"What to load the model for: {' or '.join(TASKS)}.")] = "causal-lm",
    rows: Annotated[
        int | None, typer.Option(min=1, help=f"Rows of a batch; every lane has as many. [default: {ROWS}]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens of a row; shorter ones are padded. [default: {TOKENS}]")
    ] = None,
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
    activation_memory_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most that --estimator exact keeps of a step's values; what does not fit is computed again.",
            show_default=False,
        ),
    ] = None,
    own_passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", help="A pass of an installed package; may be given again. See mobizo passes.", show_default=False
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="Real text for what is measured on examples (quantization that rounds activations): lines, CSV or "
            "JSON lines.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help='Prompt of an example, and what choices follow: "Review: {text}".', show_default=False),
    ] = None,
    label_words: Annotated[
        str | None,
        typer.Option(
            help='Words of one token for answers, in place of --loss-choices: "account_access=Account,billing=Bill".',
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            "--classify",
            help="Rows with classes: loss, words, prompt, adapters, estimate, rows and tokens are chosen for "
            "them; what is given goes first.",
            show_default=False,
        ),
    ] = None,
    answer_column: Annotated[
        str | None,
        typer.Option(help="Column of the classes in the rows of --classify. [default: answer]", show_default=False),
    ] = None,
    encoding: Encoding = UTF8,
    paper_task: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TASK",
            help="A task of the paper: adapters, estimate, loss, rows and tokens are the paper's; what is given goes "
            "first. mobizo finetune --task names them.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="A LoRA of peft (a folder) or of llama.cpp (.gguf), whose layers, rank and A are taken.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name of the tokenizer; the model's if left out.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    init_missing: Annotated[
        bool, typer.Option("--init-missing", help="Draw weights that the folder lacks, from a fixed seed.")
    ] = False,
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
    """Compile a model into a program that fine-tunes itself in an inference engine.

    The same input gives the same file, byte for byte. With --dry-run everything is checked, captured and rewritten, but
    not lowered.
    """
    remark = Remarks(quiet)
    words = read_label_words(label_words.split(",")) if label_words else {}
    if paper_task is not None:
        check_alone(task, classes, adapter, template, label_words)
        paper = PaperProgram.of(
            get_task(paper_task), lora, zo, loss, generate, rows, tokens, max_tokens, split_prefix=split_prefix
        )
        lora, zo, loss, generate, words = paper.lora, paper.zo, paper.loss, paper.generate, paper.words
        rows, tokens, max_tokens, template = paper.rows, paper.tokens, paper.max_tokens, paper.template
    _check(task, output, dry_run, graph, tokens, max_tokens, rows, max_rows)
    table, recipe = None, None
    if classes is not None:
        head = task != "causal-lm"
        table = ClassTable.read(classes, answer_column or "answer", template, encoding, head)
        check_free(table, task, loss, words, adapter)
        recipe = table.recipe(zo, dynamic=max_rows is not None or max_tokens is not None)
        lora, zo, rule = {**recipe.lora, **lora}, {**recipe.zo, **zo}, {"rule": recipe.rule, **rule}
        split_prefix, rows = split_prefix or recipe.split_prefix, rows or recipe.rows
        template, loss = table.config.template, loss if head else {**loss, "kind": "choice"}
    elif answer_column is not None:
        raise ConfigError("the answer column is that of --classify, which is not given")
    kind = loss_kind(loss, task, words, table is not None and task == "causal-lm")
    options = Options.from_json(
        {
            "lora": lora,
            "zo": _with_estimator(zo),
            "rule": chosen("rule", rule.pop("rule", "sgd"), rule),
            "quantization": _quantization(quantization),
            "state": state,
            "split_prefix": split_prefix,
            "activation_memory_bytes": activation_memory_bytes,
            "passes": own_passes or [],
            "generate": generate or None,
        }
    )
    target: Backend = get_backend(backend)
    if reason := target.unavailable():
        raise BackendUnavailableError(f"backend {target.name!r} cannot be used on this machine: {reason}")
    if adapter is not None:
        if lora:
            raise ConfigError("lora and adapter are both given", hint="the adapter says which layers, and how")
        if adapter.suffix != ".gguf":
            read_peft(adapter)
        elif not adapter.is_file():
            raise AdapterError("there is no such file", where=str(adapter))
    texts = table.prompts if table is not None and examples is None else _texts(examples, template, encoding, kind)
    started = time.monotonic()

    def say(line: str) -> None:
        remark(f"{time.monotonic() - started:6.0f} s  {line}")

    new: list[str] = []
    loaded = load_model(
        model,
        task,
        trust_remote_code=trust_remote_code,
        init_missing=init_missing,
        classes=tuple(table.counts) if table is not None and task != "causal-lm" else (),
        on_new=new.extend,
    )
    if new:
        say_new(remark, new)
    if output is not None and not dry_run:
        check_room(output, loaded, options.quantization)
    needed = bool(texts) or kind == "choice" or tokenizer is not None
    spelling = _tokenizer(tokenizer or model, needed, trust_remote_code, loaded)
    speller = Speller(spelling) if texts or kind == "choice" else None
    if table is not None and speller is not None and rows is not None:
        words, options, tokens = completed(
            remark, table, words, options, rows, tokens, model=loaded, speller=speller, task=task
        )
    rows, tokens = rows or ROWS, tokens or TOKENS
    inputs = example_inputs(loaded, task, speller, texts, rows, tokens)
    if not texts and options.quantization is not None and _measures(options.quantization):
        remark(
            "smoothing is measured on random tokens: --examples FILE with real text suits the model better", "yellow"
        )
    program = compile(
        loaded,
        inputs,
        options=dataclasses.replace(options, loss=loss_of(kind, loss, words, template, speller)),
        backend=DryRun(target) if dry_run else target,
        dynamic_shapes=_dynamic(inputs, max_rows, max_tokens),
        adapter=adapter,
        answers=tuple(words) or None,
        prompt=None if table is None else table.config.to_json(),
        new_weights=tuple(name for name, _ in loaded.named_parameters() if name in new),
        base_model=str(Path(model).resolve()) if Path(model).exists() else model,
        tokenizer=spelling,
        dump_dir=None if dry_run else dump_dir,
        cache_dir=None if dry_run else cache_dir,
        progress=lambda line: None if dry_run and line in _NOT_DRY else say(line),
    )
    say_rank(remark, program)
    if output is not None and not dry_run:
        program.save(output)
    if graph is not None and not dry_run:
        draw_program(program.manifest, graph)
    described = description(program, None if dry_run else output)
    if as_json:
        print_json(described)
    elif dry_run or not quiet:
        show_program(program, described, dry_run)
        if output is not None and not dry_run:
            data, training = (table.file, table.training(recipe.steps)) if table and recipe else (None, "")
            of_task = f"next: mobizo finetune {output} --task {paper_task} --data FOLDER --run RUN"
            typer.echo(of_task if paper_task else recommended(program.manifest, output, data, training))


def _check(
    task: str,
    output: Path | None,
    dry_run: bool,
    graph: Path | None,
    tokens: int | None,
    max_tokens: int | None,
    rows: int | None,
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
    for name, size, most in (("tokens", tokens or TOKENS, max_tokens), ("rows", rows or ROWS, max_rows)):
        if most is not None and size > most:
            raise ConfigError(f"--{name} is {size}, which is more than --max-{name} {most}")


def _tokenizer(source: str, needed: bool, trust_remote_code: bool, model: Any) -> Any:
    """The tokenizer, or None where there is none and the program can be made without; GGUF files take long for it.

    Of a folder without one, transformers makes some tokenizers of a few words, which are those of no model.
    """
    if needed:
        return load_tokenizer(source, trust_remote_code=trust_remote_code)
    if source.endswith(".gguf"):
        return None
    try:
        found = load_tokenizer(source, trust_remote_code=trust_remote_code)
        words = words_of(model) or 0
        return found if 2 * vocabulary_of(found)[0] >= words else None
    except Exception:  # whatever is wrong with it, nothing here reads with it
        return None


def _quantization(given: dict[str, Any]) -> QuantizationConfig | None:
    if given and "recipe" not in given:
        raise ConfigError(f"quantization has {', '.join(given)}, but no recipe", hint="--quantization 8da4w")
    return QuantizationConfig.from_json(given) if given else None


def _measures(quantization: QuantizationConfig) -> bool:
    return quantization.recipe in ROUND_ACTIVATIONS and quantization.smoothing != 0


def _with_estimator(zo: dict[str, Any]) -> dict[str, Any]:
    name, options = zo.pop("estimator", "two-sided"), zo.pop("estimator_options", None)
    return {**zo, "estimator": name if options is None else {"name": name, **options}}


def _texts(examples: Path | None, template: str | None, encoding: str, kind: str) -> list[list[Piece]]:
    """Prompts to measure on."""
    if examples is None:
        if template is not None and kind != "choice":
            raise ConfigError("the template is for the rows of --examples, which is not given")
        return []
    prompt = PromptConfig(template=unescaped(template), prompt_column=TEXT)
    rows = read_rows(examples, encoding)
    return [prompt.pieces({name: row.cell(name, "--template chooses") for name in prompt.columns}) for row in rows]


def _dynamic(inputs: dict[str, Tensor], max_rows: int | None, max_tokens: int | None) -> Any:
    sizes = {}
    if max_rows is not None:
        sizes[0] = Dim("rows", max=max_rows)
    if max_tokens is not None:
        sizes[1] = Dim("tokens", max=max_tokens)
    return dict.fromkeys(inputs, sizes) if sizes else None
