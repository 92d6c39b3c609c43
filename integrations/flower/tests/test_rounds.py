"""Rounds over a network that does what it likes: all have the state that the journals give."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from federation import make_client, make_server, program, replayed
from mobizo_flower import Client, Protocol, Reply, RoundReport, Traffic, run_rounds
from mobizo_flower.messages import HaveAnswer, decode_answer

from mobizo_compiler import Session
from mobizo_compiler.errors import MobizoError


class BadNetwork:
    """Loses, delays, repeats and damages messages, and its nodes come, go and come again under other numbers.

    Args:
        folder: Of the clients.
        seed: Of what happens.
        trouble: How likely each of it is, for every message.
    """

    def __init__(self, folder: Path, seed: int, trouble: float) -> None:
        self.folder, self.rng, self.trouble = folder, random.Random(seed), trouble
        self.there: dict[int, Client] = {node: make_client(folder, node) for node in (1, 2, 3)}
        self.due: list[tuple[int, Reply]] = []
        self.time = self.sends = 0
        self.last: dict[int, bytes] = {}

    def nodes(self) -> Sequence[int]:
        return list(self.there)

    def send(self, tasks: Sequence[tuple[int, bytes]], number: int) -> Sequence[str | None]:
        names: list[str | None] = []
        for node, task in tasks:
            self.sends += 1
            if node not in self.there or self._happens():
                names.append(None if node not in self.there else f"lost {self.sends}")
                continue
            names.append(f"{self.sends}")
            try:
                answer: bytes | None = self.there[node].answer(self._damaged(task))
            except MobizoError as error:
                self.due.append((self.time, Reply(f"{self.sends}", node, None, str(error))))
                continue
            assert answer is not None
            self.last[node] = answer
            for _ in range(1 + self._happens()):
                when = self.time + (self.rng.randrange(40) if self._happens() else 0)
                self.due.append((when, Reply(f"{self.sends}", node, self._damaged(answer))))
        return names

    def receive(self, sent: Sequence[str]) -> Sequence[Reply]:
        self.time += 1
        if self._happens():  # a node is killed and started again, or loses its disk, or a new one comes
            node = self.rng.choice(list(self.there))
            number = self.there.pop(node)._number
            self.there[max([*self.there, 100]) + 1] = make_client(self.folder, number)
            if self._happens():
                self.there[max(self.there) + 1] = make_client(self.folder, 9)
        come = [reply for when, reply in self.due if when <= self.time and reply.sent in sent]
        self.due = [(when, reply) for when, reply in self.due if when > self.time]
        return come

    def _happens(self) -> bool:
        return self.rng.random() < self.trouble

    def _damaged(self, data: bytes) -> bytes:
        if not self._happens():
            return data
        changed = bytearray(data)
        changed[self.rng.randrange(len(changed))] ^= 1 << self.rng.randrange(8)
        return bytes(changed)


@pytest.mark.parametrize("protocol", list(Protocol))
@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_network_does(protocol: Protocol, seed: int, tmp_path: Path) -> None:
    network, seen = BadNetwork(tmp_path, seed, 0.2), []

    def on_round(report: RoundReport, traffic: Traffic) -> None:
        assert len(report.clients) >= 2
        seen.append(traffic)

    for until in (3, 6):  # the server ends in between
        with make_server(tmp_path, protocol, least_answers=2) as server:
            run_rounds(network, server, until, timeout_s=0.05, poll_s=0.001, on_round=on_round)
            assert torch.equal(replayed(tmp_path).state(), server.session.state())
    outcomes = {name for traffic in seen for name in traffic.outcomes}
    assert {"accepted", "damaged"} <= outcomes and len(seen) == 6
    network.trouble = 0.0
    with make_server(tmp_path, protocol, least_answers=2) as server:
        run_rounds(network, server, 6, timeout_s=5, poll_s=0.001)  # over already: the rounds are handed on
        for node in network.nodes():
            answer = decode_answer(network.last[node], "answer")
            assert isinstance(answer, HaveAnswer) and answer.rounds == 6
            assert server.accept(network.last[node]).same_state


def test_too_few_answers_are_waited_for(tmp_path: Path) -> None:
    """All are asked again until there are enough, in the same round."""

    class OneComesLate(BadNetwork):
        def nodes(self) -> Sequence[int]:
            return [1] if self.time < 30 else [1, 2]

    network, seen = OneComesLate(tmp_path, 0, 0.0), []
    with make_server(tmp_path, least_answers=2) as server:
        options = {"timeout_s": 0.005, "poll_s": 0.001}
        run_rounds(network, server, 2, on_round=lambda *line: seen.append(line), **options)
    report, traffic = seen[0]
    assert report.clients == (1, 2) and traffic.tasks > 2 and traffic.outcomes["repeated"] >= 1
    assert torch.equal(Session(program()).state(), torch.zeros(program().parameters))


def test_no_more_than_so_many_at_once(tmp_path: Path) -> None:
    """All are asked in the end, a few at a time."""

    class Counting(BadNetwork):
        most = on_their_way = 0

        def send(self, tasks: Sequence[tuple[int, bytes]], number: int) -> Sequence[str | None]:
            self.on_their_way += len(tasks)
            self.most = max(self.most, self.on_their_way)
            return super().send(tasks, number)

        def receive(self, sent: Sequence[str]) -> Sequence[Reply]:
            come = super().receive(sent)
            self.on_their_way -= len(come)
            return come

    network, seen = Counting(tmp_path, 0, 0.0), []
    with make_server(tmp_path) as server:
        run_rounds(network, server, 2, at_once=2, poll_s=0.001, on_round=lambda *line: seen.append(line))
    assert [report.clients for report, _ in seen] == [(1, 2, 3), (1, 2, 3)] and network.most == 2
