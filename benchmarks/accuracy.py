"""Accuracy of SmolLM2 on review sentences after fine-tuning, against forward rows, minutes and memory.

python -m benchmarks.accuracy train --method library --seed 0 [--prompt A] [--steps 4000] [--backend xnnpack]
python -m benchmarks.accuracy table runs/accuracy

`train` fine-tunes once and writes a record; `table` prints all records of a folder, with means over seeds, as Markdown.

Methods of this library adapt the feed-forward block of the last layer, start from the prefix, and keep it on disk. The
others are what they are compared with: `backpropagation` is LoRA on every `q_proj` and `v_proj` with AdamW; `mezo` the
same adapters with the two-sided estimate, one lane after the other; `mobizo` all lanes as one batch. All three run in
eager PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mobizo_compiler as mobizo
from benchmarks.machine import describe, memory_mb
from benchmarks.record import write_json
from examples.demo import score
from examples.rotten_tomatoes import Prompter, balanced, load_sentences, split_by_movie
from examples.smollm2 import cache_folder, load_smollm2
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.rules import UpdateRule, get_rule

ROWS, TOKENS = 16, 48
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
LAST = mobizo.LoraConfig(r=8, lora_alpha=16, target_modules=FEED_FORWARD, layers_to_transform=29)
EVERYWHERE = mobizo.LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
PROMPTS = {
    "A": ("{text} It was", (" terrible", " great")),
    "B": ("Review: {text}\nSentiment:", (" negative", " positive")),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: an estimator and a rule on the last feed-forward block, or a method of PyTorch.

    Args:
        learning_rate: At the start; it falls to zero linearly.
        zo: The estimator.
        rule: The update rule.
        rows: Sentences of a step.
    """

    learning_rate: float
    zo: mobizo.ZOConfig
    rule: str | UpdateRule = "sgd"
    rows: int = ROWS


_PLAIN = mobizo.ZOConfig(queries=16)
_NORMALIZED = mobizo.ZOConfig(queries=16, normalize=True)
# One clean lane and 31 others are as many forward rows as 16 pairs.
_ONE_SIDED = mobizo.ZOConfig(queries=31, normalize=True, estimator="one-sided", noise="rademacher")
METHODS = {
    "library": Method(0.1, _NORMALIZED),
    **{f"sgd {rate:g}": Method(rate, _PLAIN) for rate in (0.03, 0.1, 0.3, 1.0, 3.0)},
    "one-sided": Method(0.1, _ONE_SIDED),
    "momentum": Method(0.1, _NORMALIZED, "momentum"),
    "adam": Method(3e-3, _PLAIN, get_rule({"rule": "adam", "beta2": 0.99})),
    "scalar-adam": Method(1e-2, _PLAIN, get_rule({"rule": "scalar-adam", "beta2": 0.99})),
    "sign": Method(3e-4, _PLAIN, "sign"),
    "mezo": Method(1e-2, mobizo.ZOConfig(queries=4), rows=4),
    "mobizo": Method(1e-2, mobizo.ZOConfig(queries=4), rows=4),
    "backpropagation": Method(1e-3, _PLAIN),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    train_parser = commands.add_parser("train")
    train_parser.add_argument("--method", choices=METHODS, required=True, nargs="+")
    train_parser.add_argument("--prompt", choices=PROMPTS, default="A")
    train_parser.add_argument("--seed", type=int, default=[0], nargs="+")
    train_parser.add_argument("--steps", type=int, default=4000)
    train_parser.add_argument("--train-rows", type=int, help="sentences to train on; all of the split if left out")
    train_parser.add_argument("--held-out", type=int, default=400)
    train_parser.add_argument("--measure-every", type=int, default=0, help="steps between measurements on the way")
    train_parser.add_argument("--backend", default="xnnpack")
    train_parser.add_argument("--output", type=Path, default=Path("runs/accuracy"))
    train_parser.set_defaults(run=train)
    table_parser = commands.add_parser("table")
    table_parser.add_argument("folder", type=Path)
    table_parser.set_defaults(run=lambda options: print(table(options.folder)))
    options = parser.parse_args(arguments)
    options.run(options)


def train(options: argparse.Namespace) -> None:
    """One record for every method and seed."""
    parts = split_by_movie(load_sentences())
    held_out = balanced(parts["test"], options.held_out, seed=0)
    sentences = parts["train"]
    if options.train_rows:
        sentences = balanced(sentences, options.train_rows, seed=5)
    for name in options.method:
        method = METHODS[name]
        tokenizer, model = load_smollm2()
        prompter = Prompter(tokenizer, TOKENS, *PROMPTS[options.prompt])
        start = time.monotonic()
        program = None
        if name not in ("mezo", "mobizo", "backpropagation"):
            program = compile_method(method, model, prompter, sentences, options.backend)
            del model
        compile_seconds = time.monotonic() - start
        for seed in options.seed:
            if program is not None:
                cache = options.output / f"prefix-{options.prompt}-{options.backend}"
                step, evaluated = library_steps(program, method, prompter, cache)
            else:
                step, evaluated = pytorch_steps(name, method, load_smollm2()[1], prompter)
            record = run(options, method, sentences, held_out, seed, step, evaluated, prompter)
            record |= {
                "method": name,
                "options": dataclasses.asdict(method) | {"rule": repr(method.rule)},
                "backend": options.backend if program is not None else "PyTorch",
                "trained": program.parameters if program is not None else None,
                "compile_seconds": round(compile_seconds, 1),
                "peak_mb": memory_mb()["VmHWM"],
                "machine": describe(),
            }
            place = options.output / f"{name.replace(' ', '-')}-{options.prompt}-{record['backend']}-{seed}.json"
            write_json(place, record)
            print(json.dumps({k: v for k, v in record.items() if k not in ("machine", "options")}), flush=True)
            if isinstance(evaluated, mobizo.Session):
                evaluated.close()


def compile_method(method: Method, model: Any, prompter: Any, sentences: Any, backend: str) -> mobizo.Program:
    """The program, from the cache where it was compiled before."""
    inputs, _, _ = prompter.encode(sentences[: method.rows])
    return mobizo.compile(
        model,
        inputs,
        LAST,
        method.zo,
        mobizo.ChoiceLoss(prompter.answers),
        backend=backend,
        rule=method.rule,
        split_prefix=True,
        cache_dir=None if backend == "eager" else cache_folder() / "programs",
        progress=lambda line: print(line, flush=True),
    )


Step = Callable[[dict[str, Tensor], Tensor, int, float], float]


def library_steps(program: mobizo.Program, method: Method, prompter: Any, cache: Path) -> tuple[Step, mobizo.Session]:
    """A step of `Session`, from the prefix of its rows where they were seen before."""
    session = mobizo.Session(program, prefix_cache=cache)

    def step(inputs: dict[str, Tensor], labels: Tensor, seed: int, rate: float) -> float:
        return session.train_step(inputs, labels, seed=seed, learning_rate=rate).loss

    return step, session


class _Model:
    """A PyTorch model with what `score` calls on a session."""

    def __init__(self, evaluate: Callable[[dict[str, Tensor]], Any]) -> None:
        self.evaluate = evaluate


def pytorch_steps(name: str, method: Method, model: Any, prompter: Any) -> tuple[Step, _Model]:
    """A step of a method in eager PyTorch."""
    loss = mobizo.ChoiceLoss(prompter.answers)
    if name == "backpropagation":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=EVERYWHERE.r, lora_alpha=EVERYWHERE.lora_alpha, target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=method.learning_rate)

        def step(inputs: dict[str, Tensor], labels: Tensor, seed: int, rate: float) -> float:
            for group in optimizer.param_groups:
                group["lr"] = rate
            row_loss, weight = loss(adapted(**inputs), labels)
            total = row_loss.sum() / weight.sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            return float(total)

        return step, _Model(torch.no_grad()(lambda inputs: adapted(**inputs)))
    matrices, sites = _everywhere(model)
    reference = ReferenceStep(model, sites, matrices, zo=method.zo, loss=loss)

    def parallel(inputs: dict[str, Tensor], labels: Tensor, seed: int, rate: float) -> float:
        return reference.train_step(inputs, labels, seed=seed, learning_rate=rate, eps=1e-2).loss

    @torch.no_grad()
    def sequential(inputs: dict[str, Tensor], labels: Tensor, seed: int, rate: float) -> float:
        z_QP = mobizo.noise(seed, method.zo.queries, reference.state.numel(), method.zo.noise)
        begin, losses = reference.state.clone(), []
        for sign in (1, -1):
            for z_P in z_QP:
                reference.state = begin + sign * 1e-2 * z_P
                row_loss, weight = loss(reference.evaluate(inputs), labels)
                losses.append(float(row_loss.sum() / weight.sum()))
        values = torch.tensor(losses)
        gradient = (values[: len(z_QP)] - values[len(z_QP) :]) / 2e-2
        reference.state = begin - rate / len(z_QP) * (gradient @ z_QP)
        return float(values.mean())

    return (sequential if name == "mezo" else parallel), _Model(reference.evaluate)


def _everywhere(model: Any) -> tuple[dict[str, Tensor], tuple[mobizo.Site, ...]]:
    """Sites and A on every `q_proj` and `v_proj`, as the compiler would lay them out."""
    from mobizo_compiler.passes.insert_mp_lora import initial_lora_a

    sites: list[mobizo.Site] = []
    for name, module in model.named_modules():
        if EVERYWHERE.matches(name):
            offset = sites[-1].offset + sites[-1].size if sites else 0
            site = mobizo.Site(name, offset, EVERYWHERE.r, module.in_features, module.out_features, EVERYWHERE.scaling)
            sites.append(site)
    return initial_lora_a(tuple(sites), EVERYWHERE.init_seed), tuple(sites)


def run(
    options: argparse.Namespace,
    method: Method,
    sentences: Sequence[Any],
    held_out: Sequence[Any],
    seed: int,
    step: Step,
    evaluated: Any,
    prompter: Any,
) -> dict[str, Any]:
    """Fine-tune, and measure before, on the way and after; measuring is not counted in the minutes."""
    batches = _balanced_batches(sentences, method.rows, seed)
    before = score(evaluated, prompter, held_out, method.rows)
    history, losses, seconds = [], [], 0.0
    rate = mobizo.schedule("linear", method.learning_rate, options.steps)
    for number in range(options.steps):
        inputs, labels, _ = prompter.encode(next(batches))
        start = time.perf_counter()
        losses.append(step(inputs, labels, seed * 1_000_003 + number, rate(number)))
        seconds += time.perf_counter() - start
        if options.measure_every and (number + 1) % options.measure_every == 0 and number + 1 < options.steps:
            found = score(evaluated, prompter, held_out, method.rows)
            history.append({"step": number + 1, "minutes": round(seconds / 60, 3), **found})
            print(f"step {number + 1}: {found}, {seconds / 60:.1f} minutes", flush=True)
    return {
        "prompt": options.prompt,
        "seed": seed,
        "steps": options.steps,
        "train_rows": len(sentences),
        "held_out_rows": len(held_out),
        "forward_rows": options.steps * method.rows * (1 if method is METHODS["backpropagation"] else method.zo.lanes),
        "minutes": round(seconds / 60, 3),
        "before": before,
        "after": score(evaluated, prompter, held_out, method.rows),
        "last_loss": statistics.mean(losses[-50:]),
        "history": history,
    }


def _balanced_batches(sentences: Sequence[Any], rows: int, seed: int) -> Any:
    """Batches with as many fresh as rotten sentences, each of which comes up once in an epoch of its class."""
    generator = random.Random(seed)
    classes = [[s for s in sentences if s.fresh == fresh] for fresh in (0, 1)]
    queues: list[list[Any]] = [[], []]
    while True:
        batch = []
        for members, queue in zip(classes, queues, strict=True):
            for _ in range(rows // 2):
                if not queue:
                    queue.extend(generator.sample(members, len(members)))
                batch.append(queue.pop())
        yield batch


def table(folder: Path) -> str:
    """All records of a folder: mean over seeds, and in brackets the lowest and the highest."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        groups[record["prompt"], record["method"], record["backend"], record["steps"]].append(record)
    lines = [
        "| prompt | method | engine | steps | forward rows | minutes | peak MB | seeds | accuracy | AUC |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (prompt, method, backend, steps), records in sorted(groups.items(), key=str):

        def spread(key: str, records: list[dict[str, Any]] = records) -> str:
            values = [record["after"][key] for record in records]
            ends = "" if len(values) == 1 else f" ({min(values):.3f} to {max(values):.3f})"
            return f"{statistics.mean(values):.3f}{ends}"

        minutes = statistics.mean(record["minutes"] for record in records)
        memory = max(record["peak_mb"] for record in records)
        cells = [prompt, method, backend, steps, f"{records[0]['forward_rows']:,}", f"{minutes:.1f}", f"{memory:.0f}"]
        cells += [len(records), spread("accuracy"), spread("auc")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
