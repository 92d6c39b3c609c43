"""A tiny classifier and its rows: every client sees mostly two of eight classes, so that none can learn alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import mobizo_compiler as mobizo

INPUTS, HIDDEN, CLASSES, BATCH = 16, 64, 8, 16
OTHERS = 0.1  # share of a client's rows that are of any class


def tiny_model() -> nn.Module:
    """A frozen network with random weights, float32 [rows, 16] to [rows, 8]."""
    torch.manual_seed(0)
    layers = nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)
    return nn.Sequential(*layers).eval()


def compile_tiny(file: Path, queries: int = 8, backend: str = "portable") -> mobizo.Program:
    """The program that server and clients share, also written to a file."""
    example = (torch.zeros(BATCH, INPUTS),)
    lora = mobizo.LoraConfig(r=4, target_modules=("0", "2", "4"))
    zo = mobizo.ZOConfig(queries=queries, normalize=True)
    program = mobizo.compile(tiny_model(), example, lora, zo, mobizo.SequenceClassificationLoss(), backend=backend)
    program.save(file)
    return program


def rows(seed: int, count: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows around the centre of their class, float32 [count, 16], and labels int64 [count] drawn from `labels`."""
    centres = torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    chosen = labels[torch.randint(0, len(labels), (count,), generator=generator)]
    return centres[chosen] + 0.7 * torch.randn(count, INPUTS, generator=generator), chosen


def client_rows(client: int, count: int = 200) -> tuple[Tensor, Tensor]:
    """The rows of a client."""
    own = torch.tensor([client % CLASSES, (client + 1) % CLASSES])
    few = int(OTHERS * count)
    parts = rows(100 + client, count - few, own), rows(10_000 + client, few, torch.arange(CLASSES))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def client_batch(x: Tensor, y: Tensor, number: int, step: int) -> tuple[tuple[Tensor], Tensor]:
    """The batch of a round and a step: a function of these two alone."""
    generator = torch.Generator().manual_seed(1_000_003 * number + step)
    chosen = torch.randint(0, len(x), (BATCH,), generator=generator)
    return (x[chosen],), y[chosen]


def accuracy(session: mobizo.Session) -> float:
    """On 800 rows of all classes that no client has."""
    x, y = rows(7, 800, torch.arange(CLASSES))
    logits = torch.cat([session.evaluate((part,)) for part in torch.split(x, BATCH)])
    return float((logits.argmax(1) == y).double().mean())
