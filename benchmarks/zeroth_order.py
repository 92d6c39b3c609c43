"""Ways to learn more from the same lanes, compared on the last block of SmolLM2.

    python -m benchmarks.zeroth_order [--variant kaiming rows ...] [--queries 16] [--seed 0 1 2] [--steps 600]

Adapters, lanes, rows of a step and loss are those of the demo's `last-block`, on review sentences with prompt A. Of
every row the loss reads one position, and the adapters are behind the last attention: what that position has there is
computed once for every sentence and kept in `rows.safetensors`; a step is then a few products in eager PyTorch. Before
the file is written, the lane losses of some rows are compared with those of `ReferenceStep` on the whole model.

The learning rate of a variant is looked for with the first seed on a grid of thirds, from .1 on, until both neighbours
have a lower AUC on validation sentences. The other seeds take that rate, and the table is about held-out sentences. A
run is a record of its own, and is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import mobizo_compiler as mobizo
from benchmarks.machine import describe
from benchmarks.tasks import TASKS, Choice, Options
from examples.demo import SETUPS
from examples.record import write_json
from examples.rotten_tomatoes import Sentence, accuracy_and_auc, balanced, in_turns, load_sentences, split_by_movie
from examples.smollm2 import load_smollm2
from mobizo_compiler.passes.insert_mp_lora import initial_lora_a
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.step.estimators import get_estimator, scaled

SETUP = SETUPS["last-block"]
EPS = 1e-2  # what a program of float32 has
TRAIN_ROWS, MEASURED_ROWS = 2000, 400
ROWS_OF_A = SETUP.rows  # whose activations A is taken from: as many as a step has
RATES = tuple(round(3**exponent / 10, 4) for exponent in range(-6, 5))  # the grid
FIRST_RATE = 0.1  # where the search begins: the demo's
SIGNS_SEED = 1 << 30  # seeds of signs lie behind those of directions: words of the same seed are the same
LAYERS = ("gate", "up", "down")
Rows = tuple[Tensor, Tensor]  # what the block is given, [N, F], and labels, [N]
Signs = dict[str, tuple[Tensor, Tensor]]  # of every row for the rank, [N, R], and for the outputs, [N, O]


@dataclasses.dataclass(frozen=True)
class Variant:
    """How A is made, and what a step does with as many forward rows as the two-sided estimate has.

    Args:
        a: "kaiming", as the library does, or "eva", as peft does: the first principal directions of the layer's inputs,
            here at all tokens of 64 sentences.
        estimate: One of `ESTIMATES`.
    """

    a: Literal["kaiming", "eva"] = "kaiming"
    estimate: str = "two-sided"


VARIANTS = {
    "kaiming": Variant(),
    "eva": Variant("eva"),
    "rows": Variant(estimate="rows"),
    "guiding vector": Variant(estimate="guiding vector"),
}


class LastBlock:
    """The last block's feed-forward part with adapters, and all behind it, for one position of every row.

    Args:
        weights: Of the layers by name, of the two norms, and `answers`: the head's rows for the two answers.
        norm_eps: Of the norms.
    """

    def __init__(self, weights: Mapping[str, Tensor], norm_eps: float) -> None:
        self.weights, self.norm_eps = weights, norm_eps
        self.sites: tuple[mobizo.Site, ...] = ()
        for name in LAYERS:
            out_features, in_features = weights[name].shape
            offset, lora = sum(site.size for site in self.sites), SETUP.lora
            self.sites += (mobizo.Site(name, offset, lora.r, in_features, out_features, lora.scaling),)
        self.lora_a = initial_lora_a(self.sites, SETUP.lora.init_seed)
        self.parameters = sum(site.size for site in self.sites)

    @staticmethod
    def weights_of(model: Any, answers: Sequence[int]) -> dict[str, Tensor]:
        """The weights out of a Llama."""
        block, weight = model.model.layers[-1], model.lm_head.weight
        layers = {name: getattr(block.mlp, f"{name}_proj").weight for name in LAYERS}
        norms = {"norm": block.post_attention_layernorm.weight, "last_norm": model.model.norm.weight}
        return {key: value.detach() for key, value in {**layers, **norms, "answers": weight[list(answers)]}.items()}

    def scores(
        self, x_NF: Tensor, lanes_GP: Tensor, step_GP: Tensor | None = None, signs: Signs | None = None
    ) -> Tensor:
        """How much more likely the second answer is, [G, N]; `step_GP` is added with the signs of every row."""

        def layer(name: str, inputs: Tensor) -> Tensor:
            site = self.sites[LAYERS.index(name)]
            h = inputs @ self.lora_a[name].t()
            found = h @ site.lora_b(lanes_GP)
            if step_GP is not None and signs is not None:
                of_rank_NR, of_output_NO = signs[name]
                found = found + (h * of_rank_NR) @ site.lora_b(step_GP) * of_output_NO
            return found.mul_(site.scaling).add_(inputs @ self.weights[name].t())

        normed_NF = self._normed(x_NF, "norm")
        inner_GNF = F.silu(layer("gate", normed_NF), inplace=True).mul_(layer("up", normed_NF))
        out_GNF = layer("down", inner_GNF).add_(x_NF)
        answers = self.weights["answers"]
        return self._normed(out_GNF, "last_norm") @ (answers[1] - answers[0])

    def losses(self, rows: Rows, *lanes: Any) -> Tensor:
        """Of every lane and row, [G, N]: what `ChoiceLoss` of two answers is."""
        return F.softplus((1 - 2 * rows[1]) * self.scores(rows[0], *lanes))

    def inputs(self, x_NF: Tensor) -> dict[str, Tensor]:
        """What every layer is given while B is zero."""
        normed_NF = self._normed(x_NF, "norm")
        inner = F.silu(normed_NF @ self.weights["gate"].t()) * (normed_NF @ self.weights["up"].t())
        return {"gate": normed_NF, "up": normed_NF, "down": inner}

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm_eps) * self.weights[name]


def made_a(block: LastBlock, kind: str, tokens_TF: Tensor) -> dict[str, Tensor]:
    """A of every layer; see `Variant`."""
    if kind == "kaiming":
        return initial_lora_a(block.sites, SETUP.lora.init_seed)
    centred = {name: x_TF - x_TF.mean(0) for name, x_TF in block.inputs(tokens_TF).items()}
    return {name: torch.linalg.svd(x, full_matrices=False).Vh[: SETUP.lora.r].clone() for name, x in centred.items()}


class Estimate:
    """The direction that a step moves against, [P].

    Args:
        block: What is trained.
        queries: Of the two-sided estimate; the others have as many lanes.
    """

    def __init__(self, block: LastBlock, queries: int) -> None:
        self.block, self.queries = block, queries

    def __call__(self, rows: Rows, trained_P: Tensor, seed: int) -> Tensor:
        """Of a step."""
        raise NotImplementedError

    def directions(self, seed: int, count: int) -> Tensor:
        """Those of a step with this seed."""
        return mobizo.noise(seed, count, self.block.parameters)


class TwoSided(Estimate):
    """What the library does."""

    def __call__(self, rows: Rows, trained_P: Tensor, seed: int) -> Tensor:
        """The mean of the directions times their slopes."""
        return self.with_losses(rows, trained_P, seed)[0]

    def with_losses(self, rows: Rows, trained_P: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The same, and the losses of the lanes, [G]."""
        z_QP, two_sided, eps_1 = self.directions(seed, self.queries), get_estimator("two-sided"), torch.tensor([EPS])
        loss_G = self.block.losses(rows, two_sided.perturbed(trained_P, EPS * z_QP)).mean(1)
        slope_Q = scaled(two_sided.projected_gradient(loss_G, eps_1), loss_G, eps_1, True, None)
        return slope_Q @ z_QP / self.queries, loss_G


class OfRows(Estimate):
    """A direction of its own for every row of every lane, by signs (GRZO, 2606.02857; Flipout).

    With U of a lane, row n has U times the outer product of its signs for the rank and for the outputs. Its slope is
    that of its own loss along it, over the standard deviation of the slopes of all rows and lanes. The mean is taken
    times the root of the number of rows, so that learning rates mean what they mean without signs.
    """

    def __call__(self, rows: Rows, trained_P: Tensor, seed: int) -> Tensor:
        """The mean of the rows' own directions times their slopes."""
        block, count, z_QP = self.block, len(rows[1]), self.directions(seed, self.queries)
        widths = [width for site in block.sites for width in (site.r, site.out_features)]
        drawn = mobizo.noise(seed + SIGNS_SEED, 1, count * sum(widths), "rademacher")
        parts_of_rows = drawn.reshape(count, -1).split(widths, dim=1)
        signs = {site.fqn: (parts_of_rows[2 * i], parts_of_rows[2 * i + 1]) for i, site in enumerate(block.sites)}
        loss_GN = block.losses(rows, trained_P[None], torch.cat((EPS * z_QP, -EPS * z_QP)), signs)
        slope_QN = loss_GN[: self.queries] - loss_GN[self.queries :]
        slope_QN = slope_QN / slope_QN.std()
        parts = []
        for site in block.sites:
            of_rank_NR, of_output_NO = signs[site.fqn]
            together_QRO = (slope_QN[:, :, None] * of_rank_NR).transpose(1, 2) @ of_output_NO
            parts.append((together_QRO * site.lora_b(z_QP)).mean(0).reshape(-1))
        return torch.cat(parts) / count**0.5


class GuidingVector(Estimate):
    """MeZO-GV (2601.04710): all lanes but two are candidates B + eps z; the step is along what tells them apart.

    The mean of the half of the candidates with the lowest losses, less that of the other half, is the guiding vector;
    the two lanes left measure the slope along it. That slope over eps / the standard deviation of the candidates'
    losses is what takes the place of `normalize`.
    """

    def __call__(self, rows: Rows, trained_P: Tensor, seed: int) -> Tensor:
        """The guiding vector times its slope."""
        z_MP = self.directions(seed, 2 * self.queries - 2)
        loss_M = self.block.losses(rows, trained_P + EPS * z_MP).mean(1)
        order, half = loss_M.argsort(), len(loss_M) // 2
        guide_P = z_MP[order[:half]].mean(0) - z_MP[order[half:]].mean(0)
        ends_2 = self.block.losses(rows, trained_P + EPS * torch.stack((guide_P, -guide_P))).mean(1)
        return (ends_2[0] - ends_2[1]) / 2 / loss_M.std() * guide_P


ESTIMATES: dict[str, type[Estimate]] = {
    "two-sided": TwoSided,
    "rows": OfRows,
    "guiding vector": GuidingVector,
}


def precompute(path: Path) -> None:
    """What the last block's feed-forward part is given, and its weights, into a file.

    `train`, `validation` and `test`, each with `_label`, are the positions that the loss reads; `tokens` are all tokens
    of the first sentences that are trained on.
    """
    tokenizer, model = load_smollm2()
    task = TASKS["A"](tokenizer, Options(TRAIN_ROWS, MEASURED_ROWS))
    assert isinstance(task, Choice)
    validation = balanced(split_by_movie(load_sentences())["validation"], MEASURED_ROWS, seed=0)
    parts, kept = {"train": task.train, "validation": validation, "test": task.held_out}, dict[str, Tensor]()
    inputs, labels, last = task.prompter.encode(task.train[:4])
    difference = difference_from_reference(model, inputs, labels, last, task.loss)
    print(f"largest difference of a lane's loss from that of the whole model: {difference:.1e}", flush=True)
    assert difference < 1e-5, "what is measured here is not what the library does"
    for name, sentences in parts.items():
        inputs, _, last = task.prompter.encode(sentences)
        found = torch.empty(len(sentences), model.config.hidden_size)
        for rows in torch.split(last.argsort(), 32):  # rows of a length: little padding
            end = int(last[rows].max()) + 1
            given = before_last_block(model, {key: value[rows, :end] for key, value in inputs.items()})
            found[rows] = given[torch.arange(len(rows)), last[rows]]
        kept |= {name: found, f"{name}_label": torch.tensor([sentence.label for sentence in sentences])}
    inputs, _, last = task.prompter.encode(task.train[:ROWS_OF_A])
    tokens = before_last_block(model, inputs)
    kept["tokens"] = tokens[torch.arange(tokens.shape[1]) <= last[:, None]]
    weights = LastBlock.weights_of(model, task.prompter.answers)
    kept |= weights | {"norm_eps": torch.tensor(model.config.rms_norm_eps, dtype=torch.float64)}
    save_file({key: value.contiguous() for key, value in kept.items()}, path)


@torch.no_grad()
def before_last_block(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the last block's feed-forward part and its norm are given, [rows, tokens, F]."""
    seen: list[Tensor] = []
    norm = model.model.layers[-1].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model.model(**inputs)
    handle.remove()
    return seen[0]


def difference_from_reference(model: Any, inputs: Any, labels: Tensor, last: Tensor, loss: mobizo.ChoiceLoss) -> float:
    """The largest difference of a lane loss here from one of `ReferenceStep`, in two steps with learning rate .1."""
    block = LastBlock(LastBlock.weights_of(model, loss.choices), model.config.rms_norm_eps)
    path = f"model.layers.{len(model.model.layers) - 1}.mlp."
    sites = [dataclasses.replace(site, fqn=f"{path}{site.fqn}_proj") for site in block.sites]
    lora_a = {site.fqn: block.lora_a[name] for site, name in zip(sites, LAYERS, strict=True)}
    given = before_last_block(model, inputs)[torch.arange(len(last)), last]
    rows = given, (labels.max(1).values == loss.choices[1]).float()
    reference = ReferenceStep(model, sites, lora_a, zo=dataclasses.replace(SETUP.zo, queries=2), loss=loss)
    estimate, trained_P, differences = TwoSided(block, 2), torch.zeros(block.parameters), []
    for seed in range(2):
        wanted = reference.train_step(inputs, labels, seed=seed, learning_rate=0.1, eps=EPS)
        direction_P, loss_G = estimate.with_losses(rows, trained_P, seed)
        trained_P = trained_P - 0.1 * direction_P
        differences.append(float((loss_G - wanted.lane_losses).abs().max()))
    reference.remove()
    return max(differences)


@dataclasses.dataclass(frozen=True)
class Bench:
    """The block and the rows of a file, and runs on them.

    Args:
        block: With the A of the library.
        kept: What `precompute` wrote.
        options: Of the command.
    """

    block: LastBlock
    kept: dict[str, Tensor]
    options: argparse.Namespace

    @classmethod
    def of(cls, path: Path, options: argparse.Namespace) -> Bench:
        """The bench of a file."""
        kept = load_file(path)
        return cls(LastBlock(kept, float(kept["norm_eps"])), kept, options)

    def estimate(self, name: str, queries: int) -> Estimate:
        """The estimate of a variant, which has the block with its A."""
        variant = VARIANTS[name]
        self.block.lora_a = made_a(self.block, variant.a, self.kept["tokens"])
        return ESTIMATES[variant.estimate](self.block, queries)

    def batches(self, seed: int) -> Iterator[Rows]:
        """As `Choice.batches`: each row of a label comes up once before any does again."""
        labels = self.kept["train_label"].tolist()
        turns = in_turns([Sentence(str(row), label, "") for row, label in enumerate(labels)], random.Random(seed))
        while True:
            rows = torch.tensor([int(sentence.text) for sentence in itertools.islice(turns, SETUP.rows)])
            yield self.kept["train"][rows], self.kept["train_label"][rows].float()

    def scores(self, part: str, trained_P: Tensor) -> dict[str, float]:
        """Accuracy and AUC on the sentences of a split."""
        found = self.block.scores(self.kept[part], trained_P[None])[0]
        accuracy, auc = accuracy_and_auc(found, self.kept[f"{part}_label"])
        return {"accuracy": accuracy, "auc": auc}

    def run(self, name: str, queries: int, rate: float, seed: int) -> dict[str, Any]:
        """Train once, or read what that gave."""
        words = (name.replace(" ", "-"), f"q{queries}", f"{rate:g}", f"seed{seed}", f"{self.options.steps}steps")
        path = self.options.output / f"{'-'.join(words)}.json"
        if path.exists():
            known: dict[str, Any] = json.loads(path.read_text())
            return known
        estimate, batches = self.estimate(name, queries), self.batches(seed)
        trained_P, schedule = torch.zeros(self.block.parameters), mobizo.schedule("linear", rate, self.options.steps)
        began = time.perf_counter()
        for step in range(self.options.steps):
            trained_P -= schedule(step) * estimate(next(batches), trained_P, seed * 1_000_003 + step)
        seconds = time.perf_counter() - began
        record = {"variant": name, "queries": queries, "rate": rate, "seed": seed, "steps": self.options.steps}
        record |= {"seconds": round(seconds, 1), "machine": describe()}
        record |= {part: self.scores(part, trained_P) for part in ("validation", "test")}
        write_json(path, record)
        print({key: value for key, value in record.items() if key != "machine"}, flush=True)
        return record

    def best_rate(self, name: str, queries: int, seed: int) -> float:
        """The rate of the grid whose neighbours have no higher AUC on validation sentences."""
        best, before = RATES.index(FIRST_RATE), -1
        auc = self._validation_auc(name, queries, best, seed)
        for step in (-1, 1):
            while 0 <= best + step < len(RATES) and best + step != before:
                found = self._validation_auc(name, queries, best + step, seed)
                if found <= auc:
                    break
                best, before, auc = best + step, best, found
        return RATES[best]

    def _validation_auc(self, name: str, queries: int, index: int, seed: int) -> float:
        return float(self.run(name, queries, RATES[index], seed)["validation"]["auc"])

    def step_seconds(self, names: Sequence[str], queries: int, turns: int = 15) -> dict[str, float]:
        """The median time of a step of each, taken in turns."""
        estimates, rows = {name: self.estimate(name, queries) for name in names}, next(self.batches(0))
        trained_P, seconds = torch.zeros(self.block.parameters), dict[str, list[float]]()
        for turn in range(turns):
            for name, estimate in estimates.items():
                began = time.perf_counter()
                estimate(rows, trained_P, turn)
                seconds.setdefault(name, []).append(time.perf_counter() - began)
        return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@torch.no_grad()
def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--queries", type=int, default=SETUP.zo.queries)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the rate")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/zeroth_order"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.safetensors"
    if not path.exists():
        precompute(path)
    bench, found = Bench.of(path, options), list[dict[str, Any]]()
    zero = torch.zeros(bench.block.parameters)
    print({part: bench.scores(part, zero) for part in ("validation", "test")}, flush=True)
    for name in options.variant:
        rate = bench.best_rate(name, options.queries, options.seed[0])
        found += [bench.run(name, options.queries, rate, seed) for seed in options.seed]
    seconds = bench.step_seconds(options.variant, options.queries)
    show(found, seconds, f"{options.queries} directions, {options.steps} steps, {len(options.seed)} seeds")


def show(records: Sequence[dict[str, Any]], seconds: Mapping[str, float], title: str) -> None:
    """A row per variant: mean, least and most on held-out sentences."""
    table = Table("variant", "rate", "accuracy", "AUC", "AUC, validation", "ms a step", title=title)
    for name, spent in seconds.items():
        of_variant = [record for record in records if record["variant"] == name]
        cells = []
        for part, key in (("test", "accuracy"), ("test", "auc"), ("validation", "auc")):
            values = [record[part][key] for record in of_variant]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        table.add_row(name, f"{of_variant[0]['rate']:g}", *cells, f"{1e3 * spent:.0f}")
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
