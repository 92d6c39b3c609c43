r"""What server and clients say to each other, as bytes. Nothing here knows Flower, and nothing is ever unpickled.

    head, 32 bytes   "MBZF", version u8, kind u8, zero u16, first 8 bytes of the program's fingerprint,
                     federation u32, round u32, client u32 (2^32-1 in what a server says), CRC-32 of the state u32
    body             as its kind has it
    checksum u32     CRC-32 of head and body

    kind 1, 2, 3     train, measure, catch up: count u32, seed u32, learning rate f32, eps f32, first u32, then rounds,
                     each its length u32 and a journal without its header (`docs/program_format.md`)
    kind 4           a journal: rows u32, then the journal with its header
    kind 5           gradients: rows u32, count u32, queries u32, then for every seed its loss f32 and gradients f32[q]
    kind 6           have: rounds u32 that a client has

All numbers are little-endian. Checksums are there against accidents, not against forgery.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass

from mobizo_compiler.device.journal import fingerprint
from mobizo_compiler.format.program import Program
from mobizo_flower.errors import DamagedMessageError, ForeignMessageError

MAGIC, VERSION = b"MBZF", 1
EVERYBODY = 2**32 - 1
_HEAD = struct.Struct("<4sBBH8sIIII")
_TASK = struct.Struct("<IIffI")
_U32 = struct.Struct("<I")


class Kind(enum.IntEnum):
    """What a message asks for or brings."""

    TRAIN = 1
    MEASURE = 2
    CATCH_UP = 3
    JOURNAL = 4
    GRADIENTS = 5
    HAVE = 6


@dataclass(frozen=True)
class Head:
    """Whose message it is, and of when.

    Args:
        program: First 8 bytes of the program's fingerprint (`docs/program_format.md`, Journal).
        federation: The number that the server drew when the federation began.
        round: From 0.
        client: 0..2^32-2; `EVERYBODY` in what a server says.
        state: CRC-32 of the flat state at the beginning of the round, as the sender has it.
    """

    program: bytes
    federation: int
    round: int
    client: int
    state: int


@dataclass(frozen=True)
class Task:
    """What a server asks of a client, and the rounds that the client lacks.

    Args:
        head: Whose and when.
        kind: `TRAIN`: make `count` steps of your own, answer with their journal. `MEASURE`: measure along `count`
            seeds, answer with projected gradients. `CATCH_UP`: take the rounds, answer with what you have.
        count: Steps, or seeds.
        seed: 0..2^31-1, of the round.
        learning_rate: As float32 holds it; 0 where nothing is trained.
        eps: Size of the perturbation, as float32 holds it.
        first: Number of the first of `rounds`.
        rounds: Journals without their headers.
    """

    head: Head
    kind: Kind
    count: int
    seed: int
    learning_rate: float
    eps: float
    first: int
    rounds: tuple[bytes, ...]


@dataclass(frozen=True)
class JournalAnswer:
    """The steps that a client made on its own.

    Args:
        head: Whose and when.
        rows: Rows that the client trains on, for a weighted average.
        journal: The bytes of its journal.
    """

    head: Head
    rows: int
    journal: bytes


@dataclass(frozen=True)
class GradientsAnswer:
    """What a client measured along the directions of the seeds that it was given.

    Args:
        head: Whose and when.
        rows: Rows that the client has, for a weighted average.
        losses: Of every seed; not finite if the measurement was void.
        gradients: [seeds][q], projected; zeros if the measurement was void.
    """

    head: Head
    rows: int
    losses: tuple[float, ...]
    gradients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HaveAnswer:
    """How many rounds a client has: less than it was sent the rest for, or all of them.

    Args:
        head: Whose and when.
        rounds: Rounds from the beginning, without a gap.
    """

    head: Head
    rounds: int


Answer = JournalAnswer | GradientsAnswer | HaveAnswer


def program_digest(program: Program) -> bytes:
    """The 8 bytes by which messages tell programs apart."""
    return fingerprint(program)[:8]


def encode(message: Task | Answer) -> bytes:
    """A message as bytes; `decode_task` or `decode_answer` takes them back."""
    match message:
        case Task():
            kind = message.kind
            body = _TASK.pack(message.count, message.seed, message.learning_rate, message.eps, message.first)
            body += b"".join(_U32.pack(len(each)) + each for each in message.rounds)
        case JournalAnswer():
            kind, body = Kind.JOURNAL, _U32.pack(message.rows) + message.journal
        case GradientsAnswer():
            queries = len(message.gradients[0]) if message.gradients else 0
            kind, body = Kind.GRADIENTS, struct.pack("<III", message.rows, len(message.losses), queries)
            for loss, gradient in zip(message.losses, message.gradients, strict=True):
                body += struct.pack(f"<{1 + queries}f", loss, *gradient)
        case HaveAnswer():
            kind, body = Kind.HAVE, _U32.pack(message.rounds)
    head = message.head
    numbers = head.federation, head.round, head.client, head.state
    data = _HEAD.pack(MAGIC, VERSION, kind, 0, head.program, *numbers) + body
    return data + _U32.pack(zlib.crc32(data))


def decode_task(data: bytes, where: str) -> Task:
    """A task from bytes.

    Args:
        data: What `encode` made.
        where: What errors call it.

    Raises:
        DamagedMessageError: It was cut off, or bytes of it changed.
        ForeignMessageError: It is none, or of another version.
    """
    kind, head, body = _opened(data, where)
    if kind not in (Kind.TRAIN, Kind.MEASURE, Kind.CATCH_UP):
        raise ForeignMessageError(f"a server does not send messages of kind {kind}", where=where)
    try:
        count, seed, learning_rate, eps, first = _TASK.unpack_from(body)
        rounds, position = [], _TASK.size
        while position < len(body):
            (size,) = _U32.unpack_from(body, position)
            position += _U32.size + size
            if position > len(body):
                raise struct.error("a round is cut off")
            rounds.append(body[position - size : position])
    except struct.error as error:
        raise _damaged(where, error) from None
    return Task(head, Kind(kind), count, seed, learning_rate, eps, first, tuple(rounds))


def decode_answer(data: bytes, where: str) -> Answer:
    """An answer from bytes; arguments and errors as for `decode_task`."""
    kind, head, body = _opened(data, where)
    try:
        if kind == Kind.JOURNAL:
            (rows,) = _U32.unpack_from(body)
            return JournalAnswer(head, rows, body[_U32.size :])
        if kind == Kind.HAVE:
            (rounds,) = _U32.unpack(body)
            return HaveAnswer(head, rounds)
        if kind == Kind.GRADIENTS:
            rows, count, queries = struct.unpack_from("<III", body)
            if len(body) != 12 + 4 * count * (1 + queries):
                raise struct.error(f"{len(body)} bytes are not {count} seeds of {queries} queries")
            found = list(struct.iter_unpack(f"<{1 + queries}f", body[12:]))
            return GradientsAnswer(head, rows, tuple(f[0] for f in found), tuple(f[1:] for f in found))
    except struct.error as error:
        raise _damaged(where, error) from None
    raise ForeignMessageError(f"a client does not send messages of kind {kind}", where=where)


def _opened(data: bytes, where: str) -> tuple[int, Head, bytes]:
    if not data.startswith(MAGIC):
        raise ForeignMessageError("this is not a message of a federation", where=where)
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:  # another version may have its checksum elsewhere
        raise ForeignMessageError(
            f"the message has version {data[len(MAGIC)]}, this reads version {VERSION}",
            where=where,
            hint="give server and clients the same version of mobizo-flower",
        )
    if len(data) < _HEAD.size + _U32.size:
        raise _damaged(where, "it is cut off")
    if _U32.pack(zlib.crc32(data[: -_U32.size])) != data[-_U32.size :]:
        raise _damaged(where, "its checksum is another")
    _, _, kind, _, program, federation, number, client, state = _HEAD.unpack_from(data)
    return kind, Head(program, federation, number, client, state), data[_HEAD.size : -_U32.size]


def _damaged(where: str, why: object) -> DamagedMessageError:
    return DamagedMessageError(f"the message is damaged: {why}", where=where, hint="have it sent again")
