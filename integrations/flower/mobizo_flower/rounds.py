"""Rounds over any network that loses, delays, repeats and damages: send tasks, hand what comes to the server, go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING, getLogger
from typing import Protocol

from mobizo_flower.messages import Kind
from mobizo_flower.server import Outcome, RoundReport, Server, Verdict

LOG = getLogger("mobizo_flower")


@dataclass(frozen=True)
class Reply:
    """What came back.

    Args:
        sent: Which message it replies to, as `Network.send` named it.
        node: Whose it is.
        data: An answer, as bytes; None where the client failed.
        error: Why it failed.
    """

    sent: str
    node: int
    data: bytes | None
    error: str = ""


class Network(Protocol):
    """What rounds need of a network. Nodes may come, go, and come again under another number."""

    def nodes(self) -> Sequence[int]:
        """Those that are there."""

    def send(self, tasks: Sequence[tuple[int, bytes]], number: int) -> Sequence[str | None]:
        """Send tasks of a round to nodes; a name for each, None where it cannot be sent."""

    def receive(self, sent: Sequence[str]) -> Sequence[Reply]:
        """Replies to these that have come since the last call."""


@dataclass(frozen=True)
class Traffic:
    """What went over the network in a round, messages that did not count included.

    Args:
        tasks: Sent.
        task_bytes: Of them, without what the network adds.
        answers: That came.
        answer_bytes: Of them, without what the network adds.
        outcomes: How many answers became of what; clients that failed as "error".
        seconds: From the first task to the end of the round.
    """

    tasks: int
    task_bytes: int
    answers: int
    answer_bytes: int
    outcomes: dict[str, int]
    seconds: float


OnRound = Callable[[RoundReport, Traffic], object]


def run_rounds(
    network: Network,
    server: Server,
    rounds: int,
    *,
    clients: int = 1,
    at_once: int | None = None,
    timeout_s: float = 600.0,
    poll_s: float = 0.5,
    on_round: OnRound | None = None,
) -> None:
    """Run rounds until the federation has had so many, those before a restart included; then hand on the last one.

    A round ends when all nodes that were asked have answered, or at its timeout if enough have; if too few have, all
    are asked again. Nodes that come while a round is open are asked as well. A node that is new to this server is
    taken to have all rounds but the last; a client that lacks more says so, and is sent it in the same round.

    Args:
        network: Carries tasks and answers.
        server: The federation.
        rounds: How many it has in the end.
        clients: Nodes to wait for before the first round.
        at_once: Most tasks on their way, where nodes share a machine or a line; None for all nodes at once.
        timeout_s: When a round ends without those who have not answered.
        poll_s: Between two looks for answers.
        on_round: Called after a round is on the disk.

    Raises:
        StateError: An update is too large for float32.
        JournalError: A round that a client lacks is damaged on the server's disk.
    """
    post = _Post(network, server, at_once)
    began = time.monotonic()
    while len(network.nodes()) < clients and (server.round < rounds or time.monotonic() - began < timeout_s):
        time.sleep(poll_s)
    while server.round < rounds:
        number, began, tried = server.round, time.monotonic(), time.monotonic()
        while True:
            post.collect()
            post.ask_new_nodes(None)  # the last of the two: when nobody is waited for, all were asked
            late = time.monotonic() - tried > timeout_s
            enough = len(server.answered) >= server.plan.least_answers
            if enough and (late or not post.waiting):
                break
            if late:
                LOG.log(WARNING, "round %d: %d answers are too few; all are asked again", number, len(server.answered))
                post.ask_again()
                tried = time.monotonic()
            time.sleep(poll_s)
        report = server.close_round()
        LOG.log(INFO, "round %d: %d clients, loss %.4f", number, len(report.clients), report.loss)
        traffic = post.end_round(time.monotonic() - began)
        if on_round is not None:
            on_round(report, traffic)
    began = time.monotonic()
    post.ask_new_nodes(Kind.CATCH_UP)
    while post.waiting and time.monotonic() - began < timeout_s:
        time.sleep(poll_s)
        post.collect()
        post.ask_new_nodes(Kind.CATCH_UP)


class _Post:
    """Messages on their way, and what each node is known to have."""

    def __init__(self, network: Network, server: Server, at_once: int | None) -> None:
        self._network, self._server, self._at_once = network, server, at_once
        self.waiting: dict[str, int] = {}  # to node, of those who have not answered
        self._late: dict[str, int] = {}  # the same, of whom nobody waits for
        self._asked: set[int] = set()
        self._have: dict[int, int] = {}
        self._kind: Kind | None = None
        self._begin()

    def ask_new_nodes(self, kind: Kind | None) -> None:
        """Send the task of this round, or one of another kind, to nodes that were not asked yet, as many as may be."""
        self._kind = kind
        room = None if self._at_once is None else max(self._at_once - len(self.waiting), 0)
        self._ask([node for node in self._network.nodes() if node not in self._asked][:room])

    def ask_again(self) -> None:
        """Let all nodes be asked again; whatever they still answer to what they were asked is taken."""
        self._late |= self.waiting
        self.waiting, self._asked = {}, set()

    def collect(self) -> None:
        """Take what came, also for rounds that are over, and hand it to the server."""
        pending = [*self._late, *self.waiting]
        for reply in self._network.receive(pending) if pending else ():
            self.waiting.pop(reply.sent, None)
            self._late.pop(reply.sent, None)
            self._take(reply)

    def end_round(self, seconds: float) -> Traffic:
        """What went over the network since the last one; who has not answered is late from here on."""
        outcomes = dict(self._outcomes)
        traffic = Traffic(self._tasks, self._task_bytes, self._answers, self._answer_bytes, outcomes, seconds)
        self.ask_again()
        self._begin()
        return traffic

    def _begin(self) -> None:
        self._tasks = self._task_bytes = self._answers = self._answer_bytes = 0
        self._outcomes: Counter[str] = Counter()

    def _ask(self, nodes: Sequence[int]) -> None:
        usual = max(self._server.round - 1, 0)  # the last round comes with the task of the next one
        tasks = [(node, self._server.task(self._have.get(node, usual), self._kind)) for node in nodes]
        self._tasks += len(tasks)
        self._task_bytes += sum(len(task) for _, task in tasks)
        for node, sent in zip(nodes, self._network.send(tasks, self._server.round) if tasks else (), strict=True):
            self._asked.add(node)
            if sent is not None:
                self.waiting[sent] = node

    def _take(self, reply: Reply) -> None:
        if reply.data is None:
            self._outcomes["error"] += 1
            LOG.log(WARNING, "node %d: %s", reply.node, reply.error)
            return
        self._answers += 1
        self._answer_bytes += len(reply.data)
        verdict = self._server.accept(reply.data)
        self._outcomes[verdict.outcome] += 1
        if verdict.outcome in (Outcome.ACCEPTED, Outcome.BEHIND, Outcome.UP_TO_DATE, Outcome.REPEATED):
            self._have[reply.node] = verdict.rounds
        if verdict.outcome == Outcome.BEHIND:
            self._ask([reply.node])
        _tell(reply.node, verdict)


def _tell(node: int, verdict: Verdict) -> None:
    if verdict.outcome not in (Outcome.ACCEPTED, Outcome.UP_TO_DATE):
        LOG.log(WARNING, "node %d, client %s: %s: %s", node, verdict.client, verdict.outcome, verdict.reason)
    elif not verdict.same_state:
        LOG.log(WARNING, "node %d, client %s: its state differs in the last bits", node, verdict.client)
