"""An epoch of Rotten Tomatoes sentences, each batch as long as its longest row, against one length for all.

    python -m benchmarks.lengths [--rows 4] [--samples 240] [--tokens 64] [--quantization 8da4w] [--out runs/lengths]

SmolLM2 with two-sided steps (q = 4) on XNNPACK, prompt A of the examples. Three ways to go through the same sentences
once: a program of a fixed length; one that takes every length, in the drawn order; and the same with batches of rows of
similar lengths (`group_by_length`). Programs are run in turns, batch by batch; the time of an epoch is the sum of the
medians of its batches over the rounds. Before that, every row's loss is compared between the two programs, and each
makes two steps in a process of its own, of which the peak is VmHWM.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from benchmarks.machine import alone, describe, memory_mb, set_threads
from examples.record import write_json
from examples.rotten_tomatoes import balanced, load_sentences, split_by_movie
from examples.smollm2 import load_smollm2, load_tokenizer

Batches = Callable[[int], tuple[dict[str, Tensor], Tensor]]


def main() -> None:
    """Measure, print, and leave lengths.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantization", choices=("8da4w", "8da8w"))
    parser.add_argument("--out", type=Path, default=Path("runs/lengths"))
    options = parser.parse_args()
    import mobizo_compiler as mobizo
    from mobizo_compiler.text.data import TextData
    from mobizo_compiler.text.prompts import PromptConfig, Sample

    options.out.mkdir(parents=True, exist_ok=True)
    threads = set_threads(options.threads)
    for name in ("fixed", "any"):
        compile_program(options, name == "any")
    peaks = {name: alone(peak_mb, options.out / f"{name}.pte", options) for name in ("fixed", "any")}
    sentences = balanced(split_by_movie(load_sentences())["train"], options.samples)
    config = PromptConfig(template="{text} It was", answer_column="answer")
    texts = [
        Sample({"text": s.text}, "great" if s.label else "terrible", f"sentence {number}")
        for number, s in enumerate(sentences)
    ]
    programs = {name: mobizo.load(options.out / f"{name}.pte") for name in ("fixed", "any")}
    sessions = {name: mobizo.Session(program) for name, program in programs.items()}
    tokenizer = load_tokenizer()
    data = {name: TextData.encode(texts, program.manifest, tokenizer, config) for name, program in programs.items()}
    ways: dict[str, tuple[mobizo.Session, Batches]] = {
        "fixed": (sessions["fixed"], data["fixed"].batches(0)),
        "any": (sessions["any"], data["any"].batches(0)),
        "any, grouped": (sessions["any"], data["any"].batches(0, group_by_length=True)),
    }
    steps = options.samples // options.rows
    worst = max(
        abs(float(a) - float(b))
        for step in range(min(steps, 20))
        for a, b in zip(*(losses(*ways[name], step) for name in ("fixed", "any")), strict=True)
    )
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(steps)] for name in ways}
    for turn in range(options.rounds + 1):
        for step in range(steps):
            for name, (session, batches) in ways.items():
                begun = time.perf_counter()
                session.train_step(*batches(step), seed=step, learning_rate=1e-4)
                if turn:
                    found[name][step].append(time.perf_counter() - begun)
    epochs = {name: sum(map(statistics.median, times)) for name, times in found.items()}
    for name, seconds in epochs.items():
        print(f"{name:14s} {seconds:7.2f} s an epoch, {seconds / epochs['fixed']:.2f} x")
    print(f"lane losses differ by at most {worst:.3g}")
    print(f"peak of a process that trains: {peaks['any'] / peaks['fixed']:.3f} x {peaks['fixed']:.0f} MB")
    write_json(
        options.out / "lengths.json",
        {
            "seconds": epochs,
            "losses_differ": worst,
            "peak_mb": peaks,
            "options": {**vars(options), "out": str(options.out)},
        }
        | {"machine": describe(), "threads": threads},
    )


def losses(session: Any, batches: Batches, step: int) -> Tensor:
    """Lane losses of a batch, without a change of the state."""
    result: Tensor = session.train_step(*batches(step), seed=step, learning_rate=0.0).lane_losses
    return result


def peak_mb(path: Path, options: argparse.Namespace) -> float:
    """The most memory of a process that makes a step at full length and one at a quarter, where that can be."""
    import mobizo_compiler as mobizo

    set_threads(options.threads)
    session = mobizo.Session(path)
    for tokens in (options.tokens, options.tokens if path.stem == "fixed" else options.tokens // 4):
        inputs = example(options, tokens)
        session.train_step(inputs, inputs["input_ids"], seed=0, learning_rate=0.0)
    return memory_mb()["VmHWM"]


def example(options: argparse.Namespace, tokens: int) -> dict[str, Tensor]:
    """Rows of random tokens."""
    ids = torch.randint(1000, 40000, (options.rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compile_program(options: argparse.Namespace, dynamic: bool) -> None:
    """The program of one length, or of every length up to it, kept in the output folder."""
    path = options.out / f"{'any' if dynamic else 'fixed'}.pte"
    if path.exists():
        return
    import mobizo_compiler as mobizo

    _, model = load_smollm2()
    inputs = example(options, options.tokens)
    sizes = {1: Dim("tokens", max=options.tokens)} if dynamic else {}
    mobizo.compile(
        model,
        inputs,
        mobizo.LoraConfig(),
        mobizo.ZOConfig(queries=4),
        quantization=options.quantization,
        dynamic_shapes=dict.fromkeys(inputs, sizes) if dynamic else None,
    ).save(path)


if __name__ == "__main__":
    main()
