"""The protocol over Flower, whose messages have one record, a `ConfigRecord` "mobizo" that holds one of ours.

It needs flwr. `client_app` answers tasks, `server_app` makes an app of a function that calls `run_rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from mobizo_flower.client import Client
from mobizo_flower.errors import ForeignMessageError
from mobizo_flower.rounds import Reply

RECORD, MESSAGE, TYPE = "mobizo", "message", "train"


def packed(data: bytes) -> RecordDict:
    """One of our messages as the content of one of Flower's."""
    return RecordDict({RECORD: ConfigRecord({MESSAGE: data})})


def unpacked(content: RecordDict) -> bytes:
    """Our message in the content of one of Flower's.

    Raises:
        ForeignMessageError: There is none.
    """
    record = content.config_records.get(RECORD)
    data = None if record is None else record.get(MESSAGE)
    if not isinstance(data, bytes):
        raise ForeignMessageError(
            f"the message has no bytes {RECORD!r}/{MESSAGE!r}", hint="server and clients need apps of mobizo_flower"
        )
    return data


class FlowerNetwork:
    """Flower's grid, as rounds take a network."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> Sequence[int]:
        """The SuperNodes whose heartbeat was heard."""
        return list(self._grid.get_node_ids())

    def send(self, tasks: Sequence[tuple[int, bytes]], number: int) -> Sequence[str | None]:
        """Push messages; Flower says None where a node is gone."""
        messages = [Message(packed(task), node, TYPE, group_id=str(number)) for node, task in tasks]
        return [sent or None for sent in self._grid.push_messages(messages)]

    def receive(self, sent: Sequence[str]) -> Sequence[Reply]:
        """Pull replies; a content that is not ours becomes an answer without bytes, which the server refuses."""
        return [_reply(message) for message in self._grid.pull_messages(list(sent))]


def _reply(message: Message) -> Reply:
    sent, node = message.metadata.reply_to_message_id, message.metadata.src_node_id
    if message.has_error():
        return Reply(sent, node, None, message.error.reason)
    try:
        return Reply(sent, node, unpacked(message.content))
    except ForeignMessageError:
        return Reply(sent, node, b"")


def client_app(client_of: Callable[[Context], Client]) -> ClientApp:
    """A Flower app that answers tasks. What goes wrong becomes a reply with an error, which the server logs.

    Args:
        client_of: Makes the client of a node, as `context.node_config` describes it. It is called for every message,
            since Flower may run each in a process of its own.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return Message(packed(client_of(context).answer(unpacked(message.content))), reply_to=message)

    app.train()(answer)
    return app


def server_app(main: Callable[[FlowerNetwork, Context], None]) -> ServerApp:
    """A Flower app whose server does `main`, which makes a `Server` and calls `run_rounds`."""
    app = ServerApp()

    def begin(grid: Grid, context: Context) -> None:
        main(FlowerNetwork(grid), context)

    app.main()(begin)
    return app
