"""A tiny program, clients with rows of their own, and a server: what the tests of this package share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from mobizo_flower import Client, Outcome, Plan, Protocol, Server
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import Session

RATE = 0.05


@functools.cache
def program(seed: int = 0, rule: str = "sgd", estimator: str = "two-sided") -> mobizo.Program:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16)).eval()
    lora = mobizo.LoraConfig(r=3, target_modules=("1",))
    zo = mobizo.ZOConfig(queries=2, estimator=estimator)
    return mobizo.compile(model, (torch.zeros(2, 5, dtype=torch.int64),), lora, zo, rule=rule, backend="eager")


def batches(client: int) -> Any:
    def batch(number: int, step: int) -> tuple[tuple[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(1000 * client + 10 * number + step)
        tokens = torch.randint(0, 16, (2, 5), generator=generator)
        return (tokens,), tokens

    return batch


def make_client(folder: Path, number: int, rows: int = 1) -> Client:
    return Client(folder / f"client{number}", Session(program()), number, batches(number), rows)


def make_server(folder: Path, protocol: Protocol = Protocol.JOURNALS, **options: Any) -> Server:
    plan = Plan(protocol, **{"steps": 3, "learning_rate": RATE, "eps": 0.01, **options})
    return Server(folder / "server", Session(program()), plan)


def rounds(server: Server, clients: list[Client], number: int) -> None:
    for _ in range(number):
        task = server.task(max(server.round - 1, 0))
        for client in clients:
            assert server.accept(client.answer(task)).outcome == Outcome.ACCEPTED
        server.close_round()


def replayed(folder: Path) -> Session:
    """Nothing but the journals that the server keeps, replayed one after the other."""
    session = Session(program())
    for path in sorted((folder / "server" / "rounds").glob("*.journal")):
        session.merge([path], weight=1.0)
    return session
