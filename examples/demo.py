"""Personalise SmolLM2-135M on review sentences inside the inference engine, and show the gain.

    python -m examples.demo [--seed 0] [--steps 100] [--adapters exact] [--output runs/demo]

Compiles the model to an ExecuTorch program (kept for the next run), measures it on sentences about movies that it
never trains on, fine-tunes the adapter inside the program, measures again, and leaves everything in one folder.

The adapters are in the attention of every block, and the program has their gradient: a backward pass is a graph of
products too, which the engine runs. The others use forward passes only: `--adapters head` learns to tell two answers
apart on the head, with all before it run once for every sentence and kept, so that a step is a few milliseconds;
`--adapters last-block` has adapters in the feed-forward layers of the last block, and `--adapters all-blocks` in the
attention of every block, as the paper does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import mobizo_compiler as mobizo
from examples.record import write_json
from examples.rotten_tomatoes import (
    Prompter,
    Sentence,
    accuracy_and_auc,
    balanced,
    by_label,
    in_turns,
    load_sentences,
    padded,
    split_by_movie,
)
from examples.smollm2 import cache_folder, load_smollm2
from mobizo_compiler.compiling.described import installed_versions
from mobizo_compiler.quantization.weights import RECIPES

TOKENS = 48


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Args:
        lora: The adapters.
        zo: The estimate.
        rows: Sentences of a step.
        steps: Of a run.
        learning_rate: At the start; it falls to 0.
        pool: How many sentences are trained on; None for all.
        split_prefix: Steps start from what is before the adapters.
        last_block: Adapters in the last block alone.
        eps: Size of the perturbation; None for what suits the program.
        rule: What a step does with the estimate.
    """

    lora: mobizo.LoraConfig
    zo: mobizo.ZOConfig
    rows: int
    steps: int
    learning_rate: float
    pool: int | None = None
    split_prefix: bool = False
    last_block: bool = False
    eps: float | None = None
    rule: str = "sgd"

    def lora_of(self, model: Any) -> mobizo.LoraConfig:
        """The adapters in this model."""
        last = model.config.num_hidden_layers - 1
        return dataclasses.replace(self.lora, layers_to_transform=last) if self.last_block else self.lora


SETUPS = {
    "exact": Setup(
        mobizo.LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"), train_a=True),
        mobizo.ZOConfig(estimator="exact"),
        rows=16,
        steps=100,
        learning_rate=1e-3,
        rule="adamw",
    ),
    "head": Setup(
        mobizo.LoraConfig(r=1, lora_alpha=2, target_modules=("lm_head",), train_a=True),
        mobizo.ZOConfig(queries=32, normalize=True),
        rows=32,
        steps=5000,
        learning_rate=0.01,
        pool=2000,
        split_prefix=True,
        eps=0.01,
    ),
    "last-block": Setup(
        mobizo.LoraConfig(r=16, lora_alpha=32, target_modules=("gate_proj", "up_proj", "down_proj")),
        mobizo.ZOConfig(queries=16, normalize=True),
        rows=64,
        steps=800,
        learning_rate=0.1,
        pool=2000,
        split_prefix=True,
        last_block=True,
    ),
    "all-blocks": Setup(
        mobizo.LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")),
        mobizo.ZOConfig(queries=8),
        rows=2,
        steps=300,
        learning_rate=2e-2,
    ),
}
BATCH_SEED = 1_000_003


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of batches and noise (default 0)")
    parser.add_argument("--steps", type=int, help="default 100; 5000 for the head, 800 for the last block, 300 for all")
    parser.add_argument("--adapters", choices=SETUPS, default="exact", help="which layers are trained, and how")
    parser.add_argument("--rows", type=int, default=400, help="held-out sentences, half of them fresh")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--backend", default="xnnpack")
    parser.add_argument("--quantization", choices=RECIPES, help="recipe of the frozen weights; float32 if left out")
    parser.add_argument(
        "--eps", type=float, help="size of the perturbation; by default what suits adapters and quantization"
    )
    parser.add_argument("--learning-rate", type=float, help="at the start; falls to 0")
    parser.add_argument(
        "--loss", choices=("choice", "causal-lm"), default="choice", help="between answers, or all words"
    )
    options = parser.parse_args(arguments)
    setup = SETUPS[options.adapters]
    for name in ("steps", "learning_rate", "eps"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(setup, name))
    console = Console()
    start = time.monotonic()

    console.rule("1. compile SmolLM2-135M-Instruct")
    tokenizer, program, compile_seconds = compile_program(
        console, options.backend, options.loss, options.quantization, setup
    )
    prompter = Prompter(tokenizer, TOKENS)
    parts = split_by_movie(load_sentences())
    held_out = balanced(parts["test"], options.rows, seed=0)
    options.output.mkdir(parents=True, exist_ok=True)
    session = mobizo.Session(program, prefix_cache=options.output / "prefix" if setup.split_prefix else None)
    training_start = time.monotonic()

    console.rule("2. measure before")
    before = measure(session, prompter, held_out, console, "zero-shot", setup.rows)
    how = f"{setup.zo.queries} directions, forward only" if setup.zo.measures else "with their gradient"
    console.rule(f"3. fine-tune: {options.steps} steps of {setup.rows} sentences, {how}")
    history = fine_tune(session, prompter, parts, options, setup, console)
    console.rule("4. measure after")
    after = measure(session, prompter, held_out, console, "fine-tuned", setup.rows)
    seconds = time.monotonic() - training_start

    record = {
        "model": "SmolLM2-135M-Instruct (Q4_1 weights dequantized to float32)",
        "data": "Rotten Tomatoes sentences, split by movie",
        "prompt": "{text} It was -> great / terrible",
        "seed": options.seed,
        "steps": options.steps,
        "adapters": options.adapters,
        "rows": setup.rows,
        "tokens": TOKENS,
        "held_out_rows": len(held_out),
        "truncated_share": truncated_share(prompter, held_out),
        "learning_rate": f"{options.learning_rate} falling linearly to 0",
        "eps": options.eps or program.manifest.eps,
        "quantization": program.manifest.quantization,
        "loss": program.manifest.loss,
        "lora": setup.lora.to_json(),
        "zo": setup.zo.to_json(),
        "rule": setup.rule,
        "backend": options.backend,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "before": before,
        "after": after,
        "compile_seconds": round(compile_seconds, 1),
        "seconds_after_compiling": round(seconds, 1),
        "history": history,
    }
    write_results(options.output, record, session)
    console.print(before_after(before, after))
    minutes = (time.monotonic() - start) / 60
    console.print(
        f"Compiled in {compile_seconds:.0f} s, the rest took {seconds / 60:.1f} minutes ({minutes:.1f} in all)."
    )
    if record["truncated_share"]:
        console.print(f"{record['truncated_share']:.1%} of the held-out sentences were cut to fit {TOKENS} tokens.")
    console.print(f"In {options.output}: adapter (for peft), plot.png, run.json.")
    console.print(
        "Next: train another seed with --seed 1; read README.md for the same in ten lines of your own Python; "
        "look at the program with MOBIZO_DUMP=folder."
    )


def compile_program(
    console: Console,
    backend: str,
    loss: str,
    quantization: str | None = None,
    setup: Setup = SETUPS["exact"],
) -> tuple[Any, mobizo.Program, float]:
    """Tokenizer, program, and the seconds it took."""
    start = time.monotonic()
    tokenizer, model = load_smollm2()
    prompter = Prompter(tokenizer, TOKENS)
    with console.status("loading") as status:

        def say(phase: str) -> None:
            console.print(f"{time.monotonic() - start:6.0f} s  {phase}", highlight=False)
            status.update(f"{phase} (a first compilation takes some minutes; the program is kept)")

        program = mobizo.compile(
            model,
            example_inputs(prompter, setup.rows),
            lora=setup.lora_of(model),
            zo=setup.zo,
            loss=mobizo.ChoiceLoss(prompter.answers) if loss == "choice" else mobizo.CausalLMLoss(max_labels=1),
            quantization=quantization,
            backend=backend,
            split_prefix=setup.split_prefix,
            rule=setup.rule,
            cache_dir=cache_folder() / "programs",
            progress=say,
        )
    console.print(f"{program.parameters:,} trained parameters; adapted layers: {len(program.sites)}")
    return tokenizer, program, time.monotonic() - start


def example_inputs(prompter: Prompter, rows: int) -> dict[str, Tensor]:
    """Real sentences, because quantization looks at what they do in the model."""
    return prompter.encode(split_by_movie(load_sentences())["train"][:rows])[0]


def fine_tune(
    session: mobizo.Session,
    prompter: Prompter,
    parts: dict[str, list[Sentence]],
    options: argparse.Namespace,
    setup: Setup,
    console: Console,
) -> list[dict[str, float]]:
    """Train with a falling learning rate; five times on the way, measure on a few validation sentences."""
    generator = random.Random(options.seed * BATCH_SEED)
    classes = by_label(parts["train"])
    # In turns, so that after one epoch everything before the adapters is known for every batch.
    kept = in_turns(balanced(parts["train"], setup.pool, seed=1), generator) if setup.pool else None
    validation = balanced(parts["validation"], 64, seed=1)
    often = max(50, -(-options.steps // 6))
    history = []
    smooth = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fine-tuning", total=options.steps, detail="")
        for step in range(options.steps):
            started = time.monotonic()
            if kept:
                batch = list(itertools.islice(kept, setup.rows))
            else:
                batch = [generator.choice(members) for members in classes for _ in range(setup.rows // 2)]
            inputs, labels, _ = prompter.encode(batch)
            result = session.train_step(
                inputs,
                labels,
                seed=options.seed * BATCH_SEED + step,
                learning_rate=options.learning_rate * (1 - step / options.steps),
                eps=options.eps,
            )
            seconds = time.monotonic() - started
            smooth = result.loss if smooth is None else 0.9 * smooth + 0.1 * result.loss
            entry = {"step": step + 1, "loss": result.loss, "seconds": seconds}
            if (step + 1) % often == 0 and step + 1 < options.steps:
                found = score(session, prompter, validation, setup.rows)
                entry |= {f"validation_{name}": value for name, value in found.items()}
                progress.console.print(
                    f"step {step + 1}: loss {smooth:.2f}, on {len(validation)} validation sentences accuracy "
                    f"{found['accuracy']:.2f}, AUC {found['auc']:.2f}",
                    highlight=False,
                )
            history.append(entry)
            progress.update(task, advance=1, detail=f"loss {smooth:.2f}  {seconds:.2f} s/step")
    return history


def score(session: mobizo.Session, prompter: Prompter, sentences: Sequence[Sentence], rows: int) -> dict[str, float]:
    """Accuracy and AUC; `rows` are those of the program."""
    scores: list[Tensor] = []
    for batch in padded(sentences, rows):
        inputs, _, last = prompter.encode(batch)
        scores.append(prompter.scores(session.evaluate(inputs).logits, last))
    accuracy, auc = accuracy_and_auc(torch.cat(scores)[: len(sentences)], torch.tensor([s.label for s in sentences]))
    return {"accuracy": accuracy, "auc": auc}


def measure(
    session: mobizo.Session, prompter: Prompter, sentences: Sequence[Sentence], console: Console, name: str, rows: int
) -> dict[str, float]:
    """Score the held-out sentences and say so."""
    with console.status(f"{name}: {len(sentences)} sentences about movies that are not trained on"):
        found = score(session, prompter, sentences, rows)
    console.print(f"{name}: accuracy {found['accuracy']:.3f}, AUC {found['auc']:.3f} on {len(sentences)} sentences")
    return found


def truncated_share(prompter: Prompter, sentences: Sequence[Sentence]) -> float:
    """Share of sentences that do not fit."""
    room = prompter.tokens - len(prompter.question) - 1
    lengths = [len(prompter.tokenizer(s.text, add_special_tokens=False).input_ids) for s in sentences]
    return sum(length > room for length in lengths) / len(lengths)


def before_after(before: dict[str, float], after: dict[str, float]) -> Table:
    """The table at the end."""
    table = Table(title="SmolLM2-135M on held-out movies")
    for column in ("", "zero-shot", "fine-tuned", "gain"):
        table.add_column(column, justify="left" if not column else "right")
    for key, name in (("accuracy", "accuracy"), ("auc", "AUC")):
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{after[key] - before[key]:+.3f}")
    return table


def write_results(folder: Path, record: dict[str, Any], session: mobizo.Session) -> None:
    """The adapter as peft stores it, a plot, and settings with the whole history."""
    session.export_adapter(folder / "adapter")
    plot(record, folder / "plot.png")
    write_json(folder / "run.json", record)


def plot(record: dict[str, Any], path: Path) -> None:
    """Loss over steps, and accuracy and AUC before, during and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    history = record["history"]
    steps = [entry["step"] for entry in history]
    losses = torch.tensor([entry["loss"] for entry in history])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.plot(steps, losses, color="#b8c8e0", linewidth=0.8, label="each step")
    window = min(max(20, len(losses) // 50), len(losses))
    means = losses.unfold(0, window, 1).mean(1)
    left.plot(steps[window - 1 :], means, color="#1f4e9c", linewidth=1.8, label=f"mean of {window}")
    left.set(xlabel="step", ylabel="loss of the answer (nats)", title="Training loss")
    left.legend(frameon=False)
    for key, name, colour in (("accuracy", "accuracy", "#1f4e9c"), ("auc", "AUC", "#c8641e")):
        inner = [(e["step"], e[f"validation_{key}"]) for e in history if f"validation_{key}" in e]
        right.plot(*zip(*inner, strict=True) if inner else ([], []), "o", color=colour, alpha=0.35, markersize=4)
        ends = [record["before"][key], record["after"][key]]
        right.plot([0, record["steps"]], ends, "--o", color=colour, label=f"{name}, {record['held_out_rows']} held out")
    right.plot([], [], "o", color="grey", alpha=0.35, markersize=4, label="64 validation sentences")
    right.set(xlabel="step", title="Sentences about unseen movies", ylim=(0.45, 1))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
