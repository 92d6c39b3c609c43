"""Train on a reward that no graph can express: how well generated text matches an answer.

    python -m examples.reward [--steps 300] [--backend xnnpack]

Generating text, comparing words and scoring them is host code. So the program only runs forward, lane by lane
(`Session.lane`); the host turns the rewards of the 2q lanes into a projected gradient, and `Session.replay` makes the
update from it, with the same noise. Where the score follows from losses that the graph does compute, one call is
enough: `train_step` with learning rate 0 gives the losses of all lanes at once and changes nothing; rank or clip them,
and replay. The model is tiny and random, so that the whole loop takes seconds; any causal language model will do.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mobizo_compiler as mobizo
from mobizo_compiler.testing import TinyCausalLM

QUESTIONS = ((4, 9, 2), (7, 1, 15))
ANSWERS = ((12, 5, 20), (3, 18, 6))
TOKENS = len(QUESTIONS[0]) + len(ANSWERS[0])
ZO = mobizo.ZOConfig(queries=16)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Run the example and return the reward before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--backend", default="xnnpack")
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--eps", type=float, default=0.5, help="large: a reward that counts words moves in steps")
    options = parser.parse_args(arguments)
    console = Console()

    torch.manual_seed(0)
    model = TinyCausalLM().eval()
    example = {name: torch.ones(len(QUESTIONS), TOKENS, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    lora = mobizo.LoraConfig(r=8, target_modules=("q_proj", "v_proj", "down_proj", "lm_head"))
    program = mobizo.compile(model, example, lora, ZO, backend=options.backend)
    session = mobizo.Session(program)

    before = score(generate(session))
    for step in range(options.steps):
        rewards = []
        for lane in range(ZO.lanes):
            with session.lane(lane, seed=step, eps=options.eps):
                rewards.append(score(generate(session))[0])
        plus, minus = torch.tensor(rewards).split(ZO.queries)
        projected_gradient = (minus - plus) / (2 * options.eps)  # a reward is a loss with the other sign
        session.replay(step, projected_gradient, options.learning_rate * (1 - step / options.steps))
    after = score(generate(session))

    table = Table(title=f"{options.steps} steps of {ZO.queries} directions, {program.parameters} trained parameters")
    for column in ("", "reward", "exact match"):
        table.add_column(column, justify="right" if column else "left")
    for label, (reward, exact) in (("before", before), ("after", after)):
        table.add_row(label, f"{reward:.2f}", f"{exact:.2f}")
    console.print(table)
    return before[0], after[0]


def generate(session: mobizo.Session) -> list[tuple[int, ...]]:
    """Greedy continuation of every question."""
    ids = torch.zeros(len(QUESTIONS), TOKENS, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    given = len(QUESTIONS[0])
    ids[:, :given], mask[:, :given] = torch.tensor(QUESTIONS), 1
    for position in range(given, TOKENS):
        logits: Tensor = session.evaluate({"input_ids": ids, "attention_mask": mask})["logits"]
        ids[:, position], mask[:, position] = logits[:, position - 1].argmax(-1), 1
    return [tuple(row) for row in ids[:, given:].tolist()]


def score(texts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Reward and share of exact matches: half of a reward is token F1, half is for words in their place.

    >>> score(ANSWERS)
    (1.0, 1.0)
    """
    f1 = exact = 0.0
    for text, answer in zip(texts, ANSWERS, strict=True):
        words = sum((Counter(text) & Counter(answer)).values())
        places = sum(a == b for a, b in zip(text, answer, strict=True))
        f1 += (words + places) / (2 * len(answer))
        exact += text == answer
    return f1 / len(ANSWERS), exact / len(ANSWERS)


if __name__ == "__main__":
    main()
