"""What SmolLM2 learns by fine-tuning, against forward rows, minutes and memory.

python -m benchmarks.accuracy train --method library --seed 0 1 2 [--task A] [--steps 6000] [--backend xnnpack]
python -m benchmarks.accuracy publish runs/accuracy

`train` fine-tunes once for every method and seed and writes a record; `publish` adds the records of a folder to
docs/accuracy.json, of which docs/generate.py makes the page, and plots them.

Methods of this library adapt the head, or the feed-forward layers of the last block if the name begins so; they start
from the prefix, and keep it on disk. The others are what they are compared with: `backpropagation` is LoRA on every
`q_proj` and `v_proj` with AdamW, or on the head or the last block as above; `mezo` the same adapters with the two-sided
estimate, one lane after the other; `mobizo` all lanes as one batch. All of these run in eager PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mobizo_compiler as mobizo
from benchmarks.machine import alone, describe, memory_mb, set_threads
from benchmarks.tasks import TASKS, Evaluate, Options, Task
from examples.demo import SETUPS, Setup
from examples.record import write_json
from examples.smollm2 import cache_folder, load_smollm2, load_tokenizer
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.step.rules import UpdateRule, get_rule

HEAD, LAST, EVERYWHERE = SETUPS["head"], SETUPS["last-block"], SETUPS["all-blocks"]
IDENTITY = ("task", "method", "backend", "steps", "seed", "train_rows", "held_out")  # of a run
Step = Callable[[dict[str, Tensor], Tensor, int, float], float]


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: an estimator and a rule with the adapters of a setup of the demo, or a method of PyTorch.

    Args:
        learning_rate: At the start; it falls to zero linearly.
        zo: The estimator.
        rule: The update rule.
        rows: Texts of a step.
        setup: Where the adapters are.
        pytorch: In eager PyTorch, not in a program.
    """

    learning_rate: float
    zo: mobizo.ZOConfig
    rule: str | UpdateRule = "sgd"
    rows: int = HEAD.rows
    setup: Setup = HEAD
    pytorch: bool = False


def _in_last_block(
    learning_rate: float, zo: mobizo.ZOConfig, rule: str | UpdateRule = "sgd", rows: int = LAST.rows
) -> Method:
    return Method(learning_rate, zo, rule, rows, LAST)


# One direction tells two answers apart; seven need more.
_EXACT = SETUPS["exact"].zo
# 36 rows a step, where two-sided has 32; a gradient has more of other rows than slopes have of other directions.
_HYBRID = mobizo.ZOConfig(queries=1, estimator={"name": "hybrid", "exact_from": -4, "measured_rate": 0.004})
_RANK_8 = dataclasses.replace(HEAD, lora=dataclasses.replace(HEAD.lora, r=8, lora_alpha=16))
_PLAIN = mobizo.ZOConfig(queries=32)
_PLAIN_LAST = mobizo.ZOConfig(queries=16)
_NO_LANES = mobizo.ZOConfig(queries=1)  # backpropagation: a row is a row
# One clean lane and 63 others are as many forward rows as 32 pairs.
_ONE_SIDED = mobizo.ZOConfig(queries=63, normalize=True, estimator="one-sided", noise="rademacher")
_ONE_SIDED_LAST = dataclasses.replace(_ONE_SIDED, queries=31)
_ADAM, _SCALAR_ADAM = (
    get_rule({"name": name, "beta2": beta}) for name, beta in (("adam", 0.999), ("scalar-adam", 0.99))
)
METHODS = {
    "library": Method(HEAD.learning_rate, HEAD.zo),
    "library, rank 8": Method(HEAD.learning_rate, HEAD.zo, setup=_RANK_8),
    **{f"sgd {rate:g}": Method(rate, _PLAIN) for rate in (0.001, 0.003, 0.01, 0.03, 0.1)},
    "one-sided": Method(HEAD.learning_rate, _ONE_SIDED),
    "momentum": Method(HEAD.learning_rate, HEAD.zo, "momentum"),
    "adam": Method(3e-3, _PLAIN, _ADAM),
    "scalar-adam": Method(1e-2, _PLAIN, _SCALAR_ADAM),
    "sign": Method(3e-4, _PLAIN, "sign"),
    "last block": _in_last_block(LAST.learning_rate, LAST.zo),
    **{
        f"last block, small {rate:g}": _in_last_block(rate, mobizo.ZOConfig(queries=4, normalize=True), rows=4)
        for rate in (0.01, 0.1)
    },
    **{f"last block, sgd {rate:g}": _in_last_block(rate, _PLAIN_LAST) for rate in (0.03, 0.1, 0.3, 1.0, 3.0)},
    "last block, one-sided": _in_last_block(0.1, _ONE_SIDED_LAST),
    "last block, momentum": _in_last_block(0.1, LAST.zo, "momentum"),
    "last block, adam": _in_last_block(3e-3, _PLAIN_LAST, get_rule({"name": "adam", "beta2": 0.99})),
    "last block, scalar-adam": _in_last_block(1e-2, _PLAIN_LAST, _SCALAR_ADAM),
    "last block, sign": _in_last_block(3e-4, _PLAIN_LAST, "sign"),
    "mezo": Method(1e-2, mobizo.ZOConfig(queries=4), rows=4, setup=EVERYWHERE, pytorch=True),
    "mobizo": Method(1e-2, mobizo.ZOConfig(queries=4), rows=4, setup=EVERYWHERE, pytorch=True),
    "two-sided": Method(8e-2, mobizo.ZOConfig(queries=4), rows=4, setup=EVERYWHERE),
    "hybrid": Method(0.1, _HYBRID, "adamw", rows=12, setup=EVERYWHERE),
    "exact": Method(1e-3, _EXACT, "adamw", rows=16, setup=SETUPS["exact"]),
    "exact, B alone": Method(1e-3, _EXACT, "adamw", rows=16, setup=EVERYWHERE),
    "backpropagation": Method(1e-3, _NO_LANES, rows=16, setup=EVERYWHERE, pytorch=True),
    "backpropagation, last block": Method(3e-3, _NO_LANES, rows=16, setup=LAST, pytorch=True),
    "backpropagation, head": Method(3e-2, _NO_LANES, rows=16, pytorch=True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    train_parser = commands.add_parser("train")
    train_parser.add_argument("--method", choices=METHODS, required=True, nargs="+")
    train_parser.add_argument("--task", choices=TASKS, default="A")
    train_parser.add_argument("--seed", type=int, default=[0], nargs="+")
    train_parser.add_argument("--steps", type=int, default=6000)
    train_parser.add_argument("--train-rows", type=int, help="texts to train on; all of the split if left out")
    train_parser.add_argument("--held-out", type=int, default=400)
    train_parser.add_argument("--measure-every", type=int, default=0, help="steps between measurements on the way")
    train_parser.add_argument("--backend", default="xnnpack")
    train_parser.add_argument("--threads", type=int, default=2)
    train_parser.add_argument("--output", type=Path, default=Path("runs/accuracy"))
    train_parser.set_defaults(run=train)
    publish_parser = commands.add_parser("publish")
    publish_parser.add_argument("folder", type=Path)
    publish_parser.set_defaults(run=publish)
    options = parser.parse_args(arguments)
    options.run(options)


def train(options: argparse.Namespace) -> None:
    """One record for every method and seed. What compiles and what trains are processes of their own."""
    for name in options.method:
        with tempfile.TemporaryDirectory() as folder:
            path = None if METHODS[name].pytorch else Path(folder) / "program.pte"
            start = time.monotonic()
            if path is not None:
                alone(compile_method, name, options, path)
            compile_seconds = round(time.monotonic() - start, 1)
            before = alone(zero_shot, name, options, path)
            for seed in options.seed:
                record = alone(train_once, name, options, seed, path, before) | {"compile_seconds": compile_seconds}
                words = (name, options.task, record["backend"], str(options.steps), str(seed))
                write_json(options.output / ("-".join(words).replace(" ", "-").replace(",", "") + ".json"), record)
                shown = {key: value for key, value in record.items() if key not in ("machine", "options")}
                print(json.dumps(shown), flush=True)


def compile_method(name: str, options: argparse.Namespace, path: Path) -> None:
    """Write the program of a method; it comes from the cache where it was compiled before."""
    set_threads(options.threads)
    method, (tokenizer, model) = METHODS[name], load_smollm2()
    task = TASKS[options.task](tokenizer, Options(options.train_rows, options.held_out))
    mobizo.compile(
        model,
        next(task.batches(method.rows, seed=0))[0],
        method.setup.lora_of(model),
        method.zo,
        task.loss,
        backend=options.backend,
        rule=method.rule,
        split_prefix=method.setup.split_prefix,
        cache_dir=cache_folder() / "programs",
        progress=lambda line: print(line, flush=True),
    ).save(path)


def zero_shot(name: str, options: argparse.Namespace, path: Path | None) -> dict[str, float]:
    """Adapters that are zero change nothing: the scores before the first step, whatever the seed."""
    with loaded(name, options, path) as (task, _, evaluate):
        return {"step": 0, "forward_rows": 0, "minutes": 0.0, **task.scores(evaluate, METHODS[name].rows)}


def train_once(
    name: str, options: argparse.Namespace, seed: int, path: Path | None, before: dict[str, float]
) -> dict[str, Any]:
    """Fine-tune with one seed; the memory in the record is that of this process."""
    method = METHODS[name]
    with loaded(name, options, path) as (task, step, evaluate):
        record = run(options, method, task, seed, step, evaluate, before)
    described = dataclasses.asdict(method)
    del described["setup"], described["pytorch"]
    return record | {
        "method": name,
        "options": described | {"rule": repr(method.rule)},
        "backend": "PyTorch" if path is None else options.backend,
        "machine": describe(),
    }


@contextmanager
def loaded(name: str, options: argparse.Namespace, path: Path | None) -> Iterator[tuple[Task, Step, Evaluate]]:
    """The task, a step of the method, and what it trains."""
    set_threads(options.threads)
    task = TASKS[options.task](load_tokenizer(), Options(options.train_rows, options.held_out))
    if path is None:
        yield task, *pytorch_step(name, METHODS[name], load_smollm2()[1], task)
        return
    setup = METHODS[name].setup
    cache = options.output / f"prefix-{options.task}-{options.backend}-{'last-block' if setup.last_block else 'head'}"
    with closing(
        mobizo.Session(path, prefix_cache=cache if setup.split_prefix and task.rows_are_small else None)
    ) as session:
        yield task, library_step(session, setup.eps), session.evaluate


def library_step(session: mobizo.Session, eps: float | None) -> Step:
    """A step of `Session`, from the prefix of its rows where they were seen before."""

    def step(inputs: dict[str, Tensor], labels: Tensor, seed: int, rate: float) -> float:
        return session.train_step(inputs, labels, seed=seed, learning_rate=rate, eps=eps).loss

    return step


def pytorch_step(name: str, method: Method, model: Any, task: Task) -> tuple[Step, Evaluate]:
    """A step of a method in eager PyTorch, and the model it trains."""
    loss = task.loss
    if name.startswith("backpropagation"):
        from peft import LoraConfig, get_peft_model

        lora = method.setup.lora_of(model)
        fields = ("r", "lora_alpha", "target_modules", "layers_to_transform")
        adapted = get_peft_model(model, LoraConfig(**{field: _listed(getattr(lora, field)) for field in fields}))
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

        return step, torch.no_grad()(lambda inputs: adapted(**inputs))
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

    return (sequential if name == "mezo" else parallel), reference.evaluate


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _everywhere(model: Any) -> tuple[dict[str, Tensor], tuple[mobizo.Site, ...]]:
    """Sites and A on every `q_proj` and `v_proj`, as the compiler would lay them out."""
    from mobizo_compiler.passes.insert_mp_lora import initial_lora_a

    lora = EVERYWHERE.lora
    sites: list[mobizo.Site] = []
    for name, module in model.named_modules():
        if lora.matches(name):
            offset = sites[-1].offset + sites[-1].size if sites else 0
            site = mobizo.Site(name, offset, lora.r, module.in_features, module.out_features, lora.scaling)
            sites.append(site)
    return initial_lora_a(tuple(sites), lora.init_seed), tuple(sites)


def run(
    options: argparse.Namespace,
    method: Method,
    task: Task,
    seed: int,
    step: Step,
    evaluate: Evaluate,
    before: dict[str, float],
) -> dict[str, Any]:
    """Fine-tune, and measure on the way and after; measuring is neither in the minutes nor in the peak of memory."""
    batches = task.batches(method.rows, seed)
    lanes = method.zo.lanes if method.zo is not _NO_LANES else 1
    rate = mobizo.schedule("linear", method.learning_rate, options.steps)
    losses, seconds, history, peak = list[float](), 0.0, [before], 0.0
    for number in range(options.steps):
        inputs, labels = next(batches)
        start = time.perf_counter()
        losses.append(step(inputs, labels, seed * 1_000_003 + number, rate(number)))
        seconds += time.perf_counter() - start
        done = number + 1
        if done == options.steps or (options.measure_every and done % options.measure_every == 0):
            peak = peak or memory_mb()["VmHWM"]
            rows, minutes = done * method.rows * lanes, round(seconds / 60, 3)
            found = task.scores(evaluate, method.rows)
            history.append({"step": done, "forward_rows": rows, "minutes": minutes, **found})
            print(history[-1], flush=True)
    return {
        "task": options.task,
        "seed": seed,
        "steps": options.steps,
        "train_rows": options.train_rows,
        "held_out": options.held_out,
        "forward_rows": history[-1]["forward_rows"],
        "minutes": history[-1]["minutes"],
        "peak_mb": peak,
        "last_loss": statistics.mean(losses[-50:]),
        "history": history,
    }


def publish(options: argparse.Namespace) -> None:
    """The records of a folder in docs/accuracy.json, in place of those of the same runs, and the plot of the page."""
    path = Path("docs/accuracy.json")
    known = json.loads(path.read_text()) if path.exists() else []
    found = [json.loads(record.read_text()) for record in sorted(options.folder.glob("*.json"))]
    records = {tuple(record[name] for name in IDENTITY): record for record in [*known, *found]}
    write_json(path, list(records.values()))
    plot(list(records.values()), Path("docs/accuracy.png"))


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy on review sentences over forward rows and over minutes: a line per method, its seeds as points.

    Methods with one seed are left to the table, but for those of PyTorch. A line's minutes are the median of its seeds,
    of which one may have had to compute the prefix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs_of: dict[tuple[str, str, int], list[Any]] = {}
    for record in records:
        if record["task"] == "A":
            group = record["method"], record["backend"], record["steps"]
            runs_of.setdefault(group, []).append(record["history"])
    groups = sorted(group for group, runs in runs_of.items() if len(runs) > 1 or group[1] == "PyTorch")
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True, sharey=True)
    for axes, key, title in zip(panels, ("forward_rows", "minutes"), ("forward rows", "minutes of steps"), strict=True):
        for index, group in enumerate(groups):
            colour, shape = f"C{index % 10}", "os^D"[index // 10 % 4]
            points = [[(p[key], p["accuracy"]) for p in history if p[key] > 0] for history in runs_of[group]]
            for each in points:
                axes.plot(*zip(*each, strict=True), ".", color=colour, alpha=0.4)
            same = [column for column in zip(*points, strict=False)]
            line = [(statistics.median(p[0] for p in column), statistics.mean(p[1] for p in column)) for column in same]
            axes.plot(*zip(*line, strict=True), color=colour, marker=shape, label=f"{group[0]}, {group[2]} steps")
        axes.set(xscale="log", xlabel=title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="accuracy on held-out sentences, prompt A")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
