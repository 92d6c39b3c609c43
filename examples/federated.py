"""Three devices learn together, and only numbers about their steps ever leave them.

    python -m examples.federated [--rounds 6] [--steps 40] [--output runs/federated]

Each device has its own sentences (of its own movies), its own session and its own run folder. In a round it trains on
its own, from the state that all share, and sends its journal: for every step a seed, a learning rate and q projected
gradients. The server replays all journals onto the state of the last round, which gives the average of what the
devices have learned (`Session.merge`), and hands the journals on, so that every device does the same and ends, bit for
bit, with the same state. Sentences, weights and gradients stay where they are. A journal is not anonymous, though: a
projected gradient is a measurement on the data of its device.

Model and data are those of `examples/minilm.py`, in one process for the sake of the example.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import mobizo_compiler as mobizo
from examples.minilm import LAYERS, LORA, ROWS, ZO, before_after, encode, load_minilm, measure
from examples.rotten_tomatoes import Sentence, balanced, by_label, load_sentences, split_by_movie

LEARNING_RATE = 3e-2
Batch = Callable[[int], tuple[dict[str, Tensor], Tensor]]


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Run the example; returns accuracy and AUC before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="of every device in every round")
    parser.add_argument("--rows", type=int, default=400, help="held-out sentences, half of them fresh")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of the encoder (default {LAYERS}; 1 is quick)")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of the first round; falls to 0")
    parser.add_argument("--backend", default="xnnpack")
    parser.add_argument("--output", type=Path, default=Path("runs/federated"), help="emptied first")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)

    tokenizer, model = load_minilm(options.layers)
    parts = split_by_movie(load_sentences())
    shards = by_movie(parts["train"], options.devices)
    held_out = balanced(parts["test"], options.rows)
    with console.status("compiling"):
        example, _ = encode(tokenizer, shards[0][:ROWS])
        loss = mobizo.SequenceClassificationLoss()
        program = mobizo.compile(model, example, LORA, ZO, loss, backend=options.backend)
    server = mobizo.Session(program)
    devices = [mobizo.Session(program) for _ in shards]
    for number, shard in enumerate(shards):
        console.print(f"device {number}: {len(shard):,} sentences about {len({s.movie for s in shard})} movies")
    with console.status(f"measuring on {options.rows} sentences about movies that no device has"):
        before = measure(server, tokenizer, held_out)
    console.print(f"before: accuracy {before['accuracy']:.3f}, AUC {before['auc']:.3f}")

    shutil.rmtree(options.output, ignore_errors=True)
    sent = 0
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("steps", total=options.rounds * len(devices) * options.steps)
        for turn in range(options.rounds):
            journals, losses = [], []
            for number, session in enumerate(devices):
                seed = turn * len(devices) + number  # all steps of all devices need noise of their own
                folder = options.output / f"round{turn}" / f"device{number}"
                summary = session.finetune(
                    batches(tokenizer, shards[number], seed),
                    steps=options.steps,
                    learning_rate=options.learning_rate * (1 - turn / options.rounds),
                    seed=seed,
                    run=folder,
                    on_step=lambda step, result: progress.advance(bar),
                )
                journals.append(folder / "journal")
                losses.append(sum(summary.losses) / len(summary.losses))
            start = server.state()
            server.merge(journals)
            for session in devices:  # back to where the round began, then what the server did
                session.load_state(start)
                session.merge(journals)
                assert torch.equal(session.state(), server.state())
            size = sum(journal.stat().st_size for journal in journals)
            sent += size * len(devices)  # each device sends its own journal and gets those of the others
            found = measure(server, tokenizer, held_out)
            each = " ".join(f"{loss:.3f}" for loss in losses)
            console.print(
                f"round {turn + 1}: losses {each}; accuracy {found['accuracy']:.3f}, AUC {found['auc']:.3f}; "
                f"{size:,} bytes"
            )

    after = measure(server, tokenizer, held_out)
    console.print(before_after(before, after, len(held_out)))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    console.print(
        f"{options.rounds} rounds of {options.steps} steps on {len(devices)} devices. "
        f"{sent:,} bytes of journals went to the server and to the other devices.\n"
        f"All have the same state to the last bit. "
        f"The adapter ({server.state().nbytes:,} bytes) and the model ({weights:,}) were not sent.\n"
        f"Every journal is in {options.output}."
    )
    return before, after


def by_movie(sentences: Sequence[Sentence], count: int) -> list[list[Sentence]]:
    """The sentences in `count` shards, such that no movie is in two of them."""
    movies = sorted({sentence.movie for sentence in sentences})
    shard = {movie: position % count for position, movie in enumerate(movies)}
    return [[s for s in sentences if shard[s.movie] == number] for number in range(count)]


def batches(tokenizer: Any, sentences: Sequence[Sentence], seed: int) -> Batch:
    """For every step a batch, half of it fresh."""
    classes = by_label(sentences)

    def batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = random.Random(f"{seed} {step}")
        return encode(tokenizer, [s for members in classes for s in generator.sample(members, ROWS // 2)])

    return batch


if __name__ == "__main__":
    main()
