"""Answers that are damaged, foreign, repeated or late, and tasks that are: none of them changes anything."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import batches, make_client, make_server, program, rounds
from mobizo_flower import (
    Client,
    DamagedMessageError,
    ForeignMessageError,
    Outcome,
    OutOfRoundError,
    Protocol,
)
from mobizo_flower.messages import (
    EVERYBODY,
    VERSION,
    GradientsAnswer,
    JournalAnswer,
    decode_answer,
    decode_task,
    encode,
)

from mobizo_compiler import Session
from mobizo_compiler.device.journal import pack_journal, unpack_journal

both = pytest.mark.parametrize("protocol", list(Protocol))


@both
def test_every_bit_of_an_answer_counts(protocol: Protocol, tmp_path: Path) -> None:
    with make_server(tmp_path, protocol) as server:
        whole = make_client(tmp_path, 1).answer(server.task())
        for bit in range(8 * len(whole)):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            assert server.accept(bytes(data)).outcome in (Outcome.DAMAGED, Outcome.FOREIGN)
        for length in range(len(whole)):
            assert server.accept(whole[:length]).outcome in (Outcome.DAMAGED, Outcome.FOREIGN)
        rng = random.Random(0)
        for _ in range(200):
            assert server.accept(rng.randbytes(rng.randrange(200))).outcome == Outcome.FOREIGN
        assert not server.answered
        assert server.accept(whole).outcome == Outcome.ACCEPTED


@both
def test_repeated_and_late_answers(protocol: Protocol, tmp_path: Path) -> None:
    one, two = make_client(tmp_path, 1), make_client(tmp_path, 2)
    with make_server(tmp_path, protocol) as server:
        task = server.task()
        first, late = one.answer(task), two.answer(task)
        assert server.accept(first).outcome == Outcome.ACCEPTED
        assert server.accept(first) == server.accept(one.answer(task))  # made again, it is the same
        assert server.accept(first).outcome == Outcome.REPEATED and "the same answer" in server.accept(first).reason
        impostor = Client(tmp_path / "other", Session(program()), 1, batches(9)).answer(task)
        assert "another answer" in server.accept(impostor).reason
        report = server.close_round()
        assert report.clients == (1,) and report.counted_bytes == len(first)
        state = server.session.state()
        assert server.accept(late) == dataclasses.replace(server.accept(late), outcome=Outcome.LATE, client=2)
        assert server.accept(first).outcome == Outcome.LATE
        assert not server.answered and torch.equal(server.session.state(), state)
        assert server.accept(two.answer(server.task())).outcome == Outcome.ACCEPTED  # it goes on


def forged(data: bytes, **changes: Any) -> bytes:
    """The answer with other fields, and checksums that fit."""
    answer = decode_answer(data, "answer")
    head = {name: changes.pop(name) for name in ("program", "federation", "round", "client") if name in changes}
    return encode(dataclasses.replace(answer, head=dataclasses.replace(answer.head, **head), **changes))


def test_foreign_answers(tmp_path: Path) -> None:
    client = make_client(tmp_path, 1)
    with make_server(tmp_path) as server, make_server(tmp_path / "shared", Protocol.DIRECTIONS) as other:
        data = client.answer(server.task())
        answer = decode_answer(data, "answer")
        assert isinstance(answer, JournalAnswer)
        records = unpack_journal(answer.journal, program(), "answer")
        of_another = pack_journal(records, program(1))
        theirs = forged(client.answer(other.task()), federation=server.federation)
        for wrong, reason in (
            (forged(data, program=b"12345678"), "of another program"),
            (forged(data, federation=server.federation ^ 1), "of another federation"),
            (forged(data, round=1), "round 1 has not begun"),
            (forged(data, client=EVERYBODY), "of no client"),
            (forged(data, client=2), "not those that were asked for"),  # its seeds are those of client 1
            (forged(data, journal=pack_journal(records[:2], program())), "not those that were asked for"),
            (theirs, "not of the protocol journals"),
            (data[:4] + bytes([VERSION + 1]) + data[5:], f"version {VERSION + 1}"),
            (server.task(), "a client does not send"),
        ):
            verdict = server.accept(wrong)
            assert verdict.outcome == Outcome.FOREIGN and reason in verdict.reason, verdict
        for wrong, reason in (
            (forged(data, journal=of_another), "of another program"),
            (forged(data, journal=answer.journal[:-1]), "not a whole step"),
            (forged(data, rows=0), "no rows"),
        ):
            verdict = server.accept(wrong)
            assert verdict.outcome == Outcome.DAMAGED and reason in verdict.reason, verdict
        shared = decode_answer(client.answer(other.task()), "answer")
        assert isinstance(shared, GradientsAnswer)
        for gradients in (((math.inf, 0.0),) * 3, ((1.0, 2.0, 3.0),) * 3):
            assert other.accept(encode(dataclasses.replace(shared, gradients=gradients))).outcome == Outcome.DAMAGED
        assert not server.answered and not other.answered


def test_a_foreign_or_damaged_task_changes_nothing(tmp_path: Path) -> None:
    client = make_client(tmp_path, 1)
    with make_server(tmp_path) as server:
        rounds(server, [client], 2)
        task = server.task(1)
        client.answer(task)
        kept = {path: path.read_bytes() for path in (tmp_path / "client1").rglob("*.journal")}
        for bit in range(0, 8 * len(task), 7):
            data = bytearray(task)
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises((DamagedMessageError, ForeignMessageError)):
                client.answer(bytes(data))
        for length in range(0, len(task), 5):
            with pytest.raises((DamagedMessageError, ForeignMessageError)):
                client.answer(task[:length])
        decoded = decode_task(task, "task")
        head = dataclasses.replace(decoded.head, program=b"12345678")
        with pytest.raises(ForeignMessageError, match=r"MBZF02(.|\n)*another program(.|\n)*task for client 1"):
            client.answer(encode(dataclasses.replace(decoded, head=head)))
        history = dataclasses.replace(decoded, first=0, rounds=(decoded.rounds[0],))
        with pytest.raises(ForeignMessageError, match="two histories"):
            client.answer(encode(history))
        with pytest.raises(ForeignMessageError, match="a server does not send"):
            client.answer(client.answer(task))
        assert kept == {path: path.read_bytes() for path in (tmp_path / "client1").rglob("*.journal")}
        assert server.accept(client.answer(task)).same_state


def test_a_client_refuses_a_round_that_is_over(tmp_path: Path) -> None:
    client = make_client(tmp_path, 1)
    with make_server(tmp_path) as server:
        old = server.task()
        rounds(server, [client], 1)
        client.answer(server.task())
        with pytest.raises(OutOfRoundError, match="round 0, and round 0 is over"):
            client.answer(old)
