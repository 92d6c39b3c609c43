"""Clients that come late, processes that end, files that are lost: the next round has the right state."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import batches, make_client, make_server, program, rounds
from mobizo_flower import (
    Client,
    Outcome,
    Protocol,
)

from mobizo_compiler import JournalWarning, Session
from mobizo_compiler.device.run import SNAPSHOT
from mobizo_compiler.errors import JournalError, JournalLockedError, StateError

both = pytest.mark.parametrize("protocol", list(Protocol))


@both
def test_a_late_client_catches_up_from_the_journals(protocol: Protocol, tmp_path: Path) -> None:
    early, late = make_client(tmp_path, 1), make_client(tmp_path, 2)
    with make_server(tmp_path, protocol) as server:
        rounds(server, [early], 3)
        verdict = server.accept(late.answer(server.task(2)))  # it is sent the last round, and lacks two more
        assert (verdict.outcome, verdict.rounds, verdict.client) == (Outcome.BEHIND, 0, 2)
        verdict = server.accept(late.answer(server.task(0)))
        assert (verdict.outcome, verdict.same_state) == (Outcome.ACCEPTED, True)


@both
def test_server_and_clients_that_are_made_anew_go_on(protocol: Protocol, tmp_path: Path) -> None:
    """In mid-round, with and without snapshots; compared with a federation that nothing happened to."""
    with make_server(tmp_path / "calm", protocol) as server:
        rounds(server, [make_client(tmp_path / "calm", number) for number in (1, 2)], 4)
        wanted = server.session.state()
    for turn in range(4):
        with make_server(tmp_path, protocol) as server:
            make_client(tmp_path, 1).answer(server.task(max(turn - 1, 0)))
            server.accept(make_client(tmp_path, 2).answer(server.task()))  # is lost with the server
        if turn % 2:
            for path in tmp_path.rglob(SNAPSHOT):
                path.unlink()
        with make_server(tmp_path, protocol) as server:
            assert server.round == turn and not server.answered
            rounds(server, [make_client(tmp_path, number) for number in (1, 2)], 1)
    with make_server(tmp_path, protocol) as server:
        assert torch.equal(server.session.state(), wanted)


def test_a_client_that_is_killed_in_a_round_repeats_no_step(tmp_path: Path) -> None:
    seen: list[int] = []

    def batch(number: int, step: int) -> Any:
        seen.append(step)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return batches(1)(number, step)

    client = Client(tmp_path / "client1", Session(program()), 1, batch)
    with make_server(tmp_path, steps=4) as server:
        with pytest.raises(KeyboardInterrupt):
            client.answer(server.task())
        answer = client.answer(server.task())
        assert seen == [0, 1, 2, 2, 3]
        assert answer == make_client(tmp_path / "other", 1).answer(server.task())


def test_damaged_files_of_a_client_are_made_good(tmp_path: Path) -> None:
    """Whatever happens to one of its files, the next answers are the right ones."""
    calm = make_client(tmp_path / "calm", 1)
    with make_server(tmp_path, least_answers=1) as server:
        rounds(server, [make_client(tmp_path, 1)], 3)
        task, behind = server.task(0), server.task(2)
        wanted = calm.answer(task)
        make_client(tmp_path, 1).answer(task)
        files = sorted(
            path for path in (tmp_path / "client1").rglob("*") if path.suffix in (".journal", ".safetensors")
        )
        files += list((tmp_path / "client1").rglob("journal"))
        assert len(files) == 3 + 1 + 2 + 1
        original = {path: path.read_bytes() for path in files}
        rng = random.Random(0)
        for turn in range(60):
            for path, data in original.items():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            victims = rng.sample(files, 1 + turn % 2)
            for victim in victims:
                data = bytearray(original[victim])
                if turn % 3 == 0:
                    victim.unlink()
                    continue
                if turn % 3 == 1:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                else:
                    del data[rng.randrange(len(data)) :]
                victim.write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", JournalWarning)
                client = make_client(tmp_path, 1)
                verdict = server.accept(client.answer(behind))
                answer = client.answer(task)
            assert verdict.outcome in (Outcome.ACCEPTED, Outcome.REPEATED, Outcome.BEHIND), (victims, verdict)
            assert verdict.outcome != Outcome.REPEATED or "the same" in verdict.reason, (victims, verdict)
            assert answer == wanted, victims


def test_damaged_rounds_of_the_server_are_an_error(tmp_path: Path) -> None:
    with make_server(tmp_path) as server:
        rounds(server, [make_client(tmp_path, 1)], 3)
    for path in (tmp_path / "server" / "rounds").glob("*.safetensors"):
        path.unlink()
    file = tmp_path / "server" / "rounds" / "00001.journal"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:70], b"", whole[:80] + b"\0" + whole[81:]):
        file.write_bytes(damaged)
        with pytest.raises(JournalError, match=r"00001\.journal"), warnings.catch_warnings():
            warnings.simplefilter("ignore", JournalWarning)
            make_server(tmp_path)
    file.write_bytes(whole)
    with make_server(tmp_path) as server:
        assert server.round == 3
        with pytest.raises(JournalLockedError, match="another process has this federation open"):
            make_server(tmp_path)


@both
def test_an_update_that_is_too_large_leaves_the_round_open(protocol: Protocol, tmp_path: Path) -> None:
    with make_server(tmp_path, protocol, steps=1, learning_rate=3e38, eps=1e-3) as server:
        client = make_client(tmp_path, 1)
        data = client.answer(server.task()) if protocol == Protocol.DIRECTIONS else None
        if data is None:
            with pytest.raises(StateError):
                client.answer(server.task())
            return
        server.accept(data)
        with pytest.raises(StateError, match="too large for float32"):
            server.close_round()
        assert server.round == 0 and not server.session.state().any() and not list(tmp_path.rglob("*.journal"))
