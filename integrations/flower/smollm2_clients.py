"""What a client of `run_smollm2.py` is: a module of its own, because Ray imports it in the processes of clients."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from mobizo_flower import Client

import mobizo_compiler as mobizo
from examples.demo import SETUPS, TOKENS
from examples.federated import by_movie
from examples.rotten_tomatoes import Prompter, Sentence, balanced, by_label, load_sentences, split_by_movie
from examples.smollm2 import load_tokenizer

SETUP = SETUPS["head"]


def shards(clients: int, sentences: int) -> list[list[Sentence]]:
    """The sentences of every client, about movies that no other client has."""
    return [balanced(shard, sentences) for shard in by_movie(split_by_movie(load_sentences())["train"], clients)]


def batch(
    prompter: Prompter, sentences: Sequence[Sentence], who: object, number: int, step: int
) -> tuple[Any, torch.Tensor]:
    """Half fresh, half rotten; a function of who, the round and the step."""
    generator = random.Random(f"{who} {number} {step}")
    chosen = [s for members in by_label(sentences) for s in generator.sample(members, SETUP.rows // 2)]
    inputs, labels, _ = prompter.encode(chosen)
    return inputs, labels


def client_of(folder: Path, clients: int, sentences: int, context: Context) -> Client:
    """The client of a node of the simulation."""
    number = int(context.node_config["partition-id"])
    session, batches = _shared(folder, clients, sentences)
    return Client(folder / f"client{number}", session, number, batches(number), rows=sentences)


@functools.cache
def _shared(folder: Path, clients: int, sentences: int) -> tuple[mobizo.Session, Callable[[int], Any]]:
    """What clients of one process have in common: the model, and what comes before the adapter of every sentence."""
    parts, prompter = shards(clients, sentences), Prompter(load_tokenizer(), TOKENS)
    session = mobizo.Session(folder / "head.pte", prefix_cache=folder / "prefix")
    return session, lambda number: functools.partial(batch, prompter, parts[number], number)
