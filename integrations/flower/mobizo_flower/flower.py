"""The protocol over Flower: `client_app` answers tasks, `run_rounds` sends them and collects what comes.

A message of Flower has one record, a `ConfigRecord` named "mobizo" holding one of ours. It needs flwr.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from logging import INFO, WARNING, getLogger

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from mobizo_flower.client import Client
from mobizo_flower.errors import ForeignMessageError
from mobizo_flower.messages import Kind
from mobizo_flower.server import Outcome, RoundReport, Server

RECORD, MESSAGE, TYPE = "mobizo", "message", "train"
LOG = getLogger("flwr")


@dataclass(frozen=True)
class Traffic:
    """What went over Flower in a round, messages that did not count included.

    Args:
        tasks: Sent.
        task_bytes: Of them, without what Flower adds.
        answers: That came.
        answer_bytes: Of them, without what Flower adds.
        outcomes: How many answers became of what, errors of clients among them as "error".
        seconds: From the first task to the end of the round.
    """

    tasks: int
    task_bytes: int
    answers: int
    answer_bytes: int
    outcomes: dict[str, int]
    seconds: float


OnRound = Callable[[RoundReport, Traffic], object]


def packed(data: bytes) -> RecordDict:
    """One of our messages as the content of one of Flower's."""
    return RecordDict({RECORD: ConfigRecord({MESSAGE: data})})


def unpacked(message: Message) -> bytes:
    """Our message in one of Flower's.

    Raises:
        ForeignMessageError: There is none.
    """
    record = message.content.config_records.get(RECORD)
    data = None if record is None else record.get(MESSAGE)
    if not isinstance(data, bytes):
        raise ForeignMessageError(
            f"the message has no bytes {RECORD!r}/{MESSAGE!r}", hint="server and clients need apps of mobizo_flower"
        )
    return data


def client_app(client_of: Callable[[Context], Client]) -> ClientApp:
    """A Flower app that answers tasks. What goes wrong becomes a reply with an error, which the server logs.

    Args:
        client_of: Makes the client of a node, as `context.node_config` describes it. It is called for every message,
            since Flower may run each in a process of its own.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return Message(packed(client_of(context).answer(unpacked(message))), reply_to=message)

    app.train()(answer)
    return app


def server_app(main: Callable[[Grid, Context], None]) -> ServerApp:
    """A Flower app whose server does `main`, which makes a `Server` and calls `run_rounds`."""
    app = ServerApp()
    app.main()(main)
    return app


def run_rounds(
    grid: Grid,
    server: Server,
    rounds: int,
    *,
    clients: int = 1,
    timeout_s: float = 600.0,
    poll_s: float = 0.5,
    on_round: OnRound | None = None,
) -> None:
    """Run rounds until the federation has had so many, those before a restart included; then hand on the last one.

    A round ends when all nodes that were asked have answered, or at its timeout if enough have; nodes that come while
    it is open are asked as well. With fewer answers it goes on waiting. A client that says that it lacks rounds is sent
    all that it lacks, in the same round.

    Args:
        grid: Flower's.
        server: The federation.
        rounds: How many it has in the end.
        clients: Nodes to wait for before a round begins.
        timeout_s: When a round ends without those who have not answered.
        poll_s: Between two looks for answers.
        on_round: Called after a round is on the disk.

    Raises:
        StateError: An update is too large for float32.
        JournalError: A round that a client lacks is damaged on the server's disk.
    """
    post = _Post(grid, server, poll_s)
    while server.round < rounds:
        post.wait_for(clients)
        number, began = server.round, time.monotonic()
        while True:
            post.ask_new_nodes(None)
            post.collect()
            late = time.monotonic() - began > timeout_s
            if len(server.answered) >= server.plan.least_answers and (late or not post.waiting):
                break
            time.sleep(poll_s)
        report = server.close_round()
        LOG.log(INFO, "round %d: %d clients, loss %.4f", number, len(report.clients), report.loss)
        traffic = post.end_round(time.monotonic() - began)
        if on_round is not None:
            on_round(report, traffic)
    post.ask_new_nodes(Kind.CATCH_UP)
    began = time.monotonic()
    while post.waiting and time.monotonic() - began < timeout_s:
        time.sleep(poll_s)
        post.collect()


class _Post:
    """Messages on their way, and what each node is known to have."""

    def __init__(self, grid: Grid, server: Server, poll_s: float) -> None:
        self._grid, self._server, self._poll_s = grid, server, poll_s
        self.waiting: dict[str, int] = {}  # of this round: message to node
        self._late: dict[str, int] = {}  # of rounds before
        self._asked: set[int] = set()
        self._have: dict[int, int] = {}
        self._begin()

    def wait_for(self, clients: int) -> None:
        """Until so many nodes are there."""
        while len(list(self._grid.get_node_ids())) < clients:
            time.sleep(self._poll_s)

    def ask_new_nodes(self, kind: Kind | None) -> None:
        """Send the task of this round to all nodes that were not asked yet."""
        self._ask([node for node in self._grid.get_node_ids() if node not in self._asked], kind)

    def collect(self) -> None:
        """Take what came, also for rounds that are over, and hand it to the server."""
        pending = {**self._late, **self.waiting}
        if not pending:
            return
        for reply in self._grid.pull_messages(list(pending)):
            asked = reply.metadata.reply_to_message_id
            node = pending.get(asked, reply.metadata.src_node_id)
            self.waiting.pop(asked, None)
            self._late.pop(asked, None)
            self._take(reply, node)

    def end_round(self, seconds: float) -> Traffic:
        """What went over Flower since the last one; who has not answered is late from here on."""
        traffic = Traffic(
            self._tasks, self._task_bytes, self._answers, self._answer_bytes, dict(self._outcomes), seconds
        )
        self._late |= self.waiting
        self.waiting = {}
        self._asked = set()
        self._begin()
        return traffic

    def _begin(self) -> None:
        self._tasks = self._task_bytes = self._answers = self._answer_bytes = 0
        self._outcomes: Counter[str] = Counter()

    def _ask(self, nodes: Iterable[int], kind: Kind | None) -> None:
        asked = list(nodes)
        messages = []
        for node in asked:
            task = self._server.task(self._have.get(node, 0), kind)
            self._tasks += 1
            self._task_bytes += len(task)
            messages.append(Message(packed(task), node, TYPE, group_id=str(self._server.round)))
        for node, sent in zip(asked, self._grid.push_messages(messages) if messages else (), strict=True):
            self._asked.add(node)
            if sent:  # none where Flower could not take it: the node is gone
                self.waiting[sent] = node

    def _take(self, reply: Message, node: int) -> None:
        if reply.has_error():
            self._outcomes["error"] += 1
            LOG.log(WARNING, "node %d: %s", node, reply.error.reason)
            return
        try:
            data = unpacked(reply)
        except ForeignMessageError as error:
            data = b""
            LOG.log(WARNING, "node %d: %s", node, error.problem)
        self._answers += 1
        self._answer_bytes += len(data)
        verdict = self._server.accept(data)
        self._outcomes[verdict.outcome] += 1
        if verdict.outcome in (Outcome.ACCEPTED, Outcome.BEHIND, Outcome.UP_TO_DATE, Outcome.REPEATED):
            self._have[node] = verdict.rounds
        if verdict.outcome == Outcome.BEHIND:
            self._ask([node], None)
        if verdict.outcome not in (Outcome.ACCEPTED, Outcome.UP_TO_DATE):
            LOG.log(WARNING, "node %d, client %s: %s: %s", node, verdict.client, verdict.outcome, verdict.reason)
        elif not verdict.same_state:
            LOG.log(WARNING, "node %d, client %s: its state differs in the last bits", node, verdict.client)
