"""The protocol without a network: whatever arrives, or does not, server and clients have one state, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from federation import RATE, batches, make_client, make_server, program, replayed, rounds
from mobizo_flower import (
    Client,
    Ledger,
    Outcome,
    Plan,
    Protocol,
    Server,
)
from mobizo_flower.ledger import apply, state_checksum
from mobizo_flower.messages import (
    GradientsAnswer,
    HaveAnswer,
    Head,
    JournalAnswer,
    Kind,
    Task,
    decode_answer,
    decode_task,
    encode,
)

from mobizo_compiler import Session
from mobizo_compiler.device.journal import read_journal
from mobizo_compiler.device.run import step_seed
from mobizo_compiler.errors import ConfigError, JournalError, RunMismatchError

both = pytest.mark.parametrize("protocol", list(Protocol))


@both
def test_server_and_clients_have_the_state_that_the_journals_give(protocol: Protocol, tmp_path: Path) -> None:
    clients = [make_client(tmp_path, number) for number in (7, 2, 5)]
    with make_server(tmp_path, protocol) as server:
        rounds(server, clients, 4)
        state = server.session.state()
        assert state.abs().sum() > 0 and torch.equal(replayed(tmp_path).state(), state)
        for client in clients:
            verdict = server.accept(client.answer(server.task(3, Kind.CATCH_UP)))
            assert (verdict.outcome, verdict.same_state, verdict.rounds) == (Outcome.UP_TO_DATE, True, 4)


def test_a_round_of_journals_is_what_merge_makes_of_them(tmp_path: Path) -> None:
    sent = []
    with make_server(tmp_path) as server:
        for number in (2, 5, 7):
            data = make_client(tmp_path, number).answer(server.task())
            answer = decode_answer(data, "answer")
            assert isinstance(answer, JournalAnswer)
            (tmp_path / f"{number}.journal").write_bytes(answer.journal)
            sent.append(tmp_path / f"{number}.journal")
            server.accept(data)
        report = server.close_round()
        merged = Session(program())
        assert merged.merge(sent) == report.steps == 9
        assert torch.equal(merged.state(), server.session.state())
    for path, number in zip(sent, (2, 5, 7), strict=True):  # and a client does what `finetune` does
        alone = Session(program())
        seed = step_seed(step_seed(0, 0), number)
        alone.finetune(
            lambda s, n=number: batches(n)(0, s),
            steps=3,
            learning_rate=RATE,
            eps=0.01,
            seed=seed,
            run=tmp_path / f"{number}",
        )
        assert (tmp_path / f"{number}" / "journal").read_bytes() == path.read_bytes()


def test_a_round_of_directions_is_a_step_on_the_rows_of_all(tmp_path: Path) -> None:
    """The projected gradient of the mean of all losses is the mean of theirs, along the same directions."""
    with make_server(tmp_path, Protocol.DIRECTIONS, by_rows=True) as server:
        weights = {1: 1, 2: 3}
        for number, rows in weights.items():
            server.accept(make_client(tmp_path, number, rows).answer(server.task()))
        server.close_round()
        session = Session(program())
        found = []
        for step in range(3):
            each = []
            for number in weights:
                inputs, labels = batches(number)(0, step)
                seed = step_seed(step_seed(0, 0), step)
                result = session.train_step(inputs, labels, seed=seed, learning_rate=0.0, eps=0.01)
                each.append(result.projected_gradient.double())
            found.append((seed, (each[0] * 0.25 + each[1] * 0.75).float()))
        for seed, gradient in found:
            session.replay(seed, gradient, RATE / 3)
        torch.testing.assert_close(session.state(), server.session.state(), rtol=1e-6, atol=1e-9)


def test_the_order_of_answers_does_not_matter(tmp_path: Path) -> None:
    states = []
    for order in ([1, 2, 3], [3, 1, 2]):
        folder = tmp_path / str(order[0])
        with make_server(folder) as server:
            rounds(server, [make_client(folder, number) for number in order], 2)
            states.append(server.session.state())
    assert torch.equal(*states)


@both
def test_rows_weigh(protocol: Protocol, tmp_path: Path) -> None:
    """A client with all rows but one is nearly alone."""
    with (
        make_server(tmp_path / "all", protocol, by_rows=True) as server,
        make_server(tmp_path / "one", protocol) as alone,
    ):
        task = server.task()
        server.accept(make_client(tmp_path / "all", 1, 10**6).answer(task))
        server.accept(make_client(tmp_path / "all", 2, 1).answer(task))
        alone.accept(make_client(tmp_path / "one", 1).answer(alone.task()))
        server.close_round(), alone.close_round()
        torch.testing.assert_close(server.session.state(), alone.session.state(), rtol=0, atol=1e-5)
        assert not torch.equal(server.session.state(), alone.session.state())


def test_a_folder_has_one_plan_and_one_program(tmp_path: Path) -> None:
    make_server(tmp_path).close()
    with pytest.raises(RunMismatchError, match=r"steps is 3, not 4, learning_rate is 0.05, not 0.1"):
        make_server(tmp_path, steps=4, learning_rate=0.1)
    with pytest.raises(RunMismatchError, match="another program"):
        Server(tmp_path / "server", Session(program(1)), Plan(Protocol.JOURNALS, 3, RATE, 0, 0.01))
    (tmp_path / "server" / "federation.json").write_text("{}")
    with pytest.raises(JournalError, match="cannot be read"):
        make_server(tmp_path)


def test_plans_are_checked(tmp_path: Path) -> None:
    for options, match in (
        ({"protocol": "gossip"}, "it must be one of journals, directions"),
        ({"steps": 0}, "steps is 0"),
        ({"least_answers": 0}, "least_answers is 0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ConfigError, match=match):
            Plan(**options)
    with make_server(tmp_path, least_answers=2) as server:
        server.accept(make_client(tmp_path, 1).answer(server.task()))
        with pytest.raises(ConfigError, match="round 0 has 1 answers of 2"):
            server.close_round()
        assert server.answered == {1}


def test_a_rule_that_remembers_shares_directions(tmp_path: Path) -> None:
    made = program(rule="momentum")
    with pytest.raises(ConfigError, match="remembers its steps"):
        Server(tmp_path / "journals", Session(made), Plan(Protocol.JOURNALS))
    with Server(tmp_path / "server", Session(made), Plan(Protocol.DIRECTIONS, 2, RATE, eps=0.01)) as server:
        client = Client(tmp_path / "client", Session(made), 0, batches(0))
        rounds(server, [client], 3)
        assert server.accept(client.answer(server.task(2))).same_state
    with pytest.raises(ConfigError, match="no scalars"):
        Server(tmp_path / "exact", Session(program(estimator="exact")), Plan())


def test_void_measurements_change_nothing(tmp_path: Path) -> None:
    with make_server(tmp_path, Protocol.DIRECTIONS) as server:
        good = make_client(tmp_path, 1).answer(server.task())
        answer = decode_answer(good, "answer")
        assert isinstance(answer, GradientsAnswer)
        void = dataclasses.replace(answer, losses=(math.nan,) * 3, gradients=((0.0, 0.0),) * 3)
        server.accept(encode(void))
        report = server.close_round()
        assert math.isnan(report.loss) and not server.session.state().any()
        task = server.task(0)
        good = make_client(tmp_path, 1).answer(task)
        void = dataclasses.replace(void, head=dataclasses.replace(decode_answer(good, "answer").head, client=2))
        assert server.accept(good).outcome == server.accept(encode(void)).outcome == Outcome.ACCEPTED
        server.close_round()
        with make_server(tmp_path / "alone", Protocol.DIRECTIONS) as alone:
            for _ in range(2):
                alone.accept(make_client(tmp_path / "alone", 1).answer(alone.task()))
                alone.close_round()
            assert server.session.state().any()
            records = read_journal(tmp_path / "server" / "rounds" / "00001.journal", program())
            assert all(record.projected_gradient != (0.0, 0.0) for record in records)


def test_messages_come_back() -> None:
    head = Head(b"abcdefgh", 1, 2, 3, 4)
    task = Task(head, Kind.TRAIN, 5, 6, 0.5, 0.25, 7, (b"one", b"", b"three"))
    assert decode_task(encode(task), "task") == task
    for answer in (
        JournalAnswer(head, 9, b"journal"),
        GradientsAnswer(head, 9, (0.5, 1.5), ((1.0, 2.0), (3.0, 4.0))),
        HaveAnswer(head, 9),
    ):
        assert decode_answer(encode(answer), "answer") == answer
    assert len(encode(HaveAnswer(head, 9))) == 40  # what docs/messages of the module say: 32 + 4 + 4


def test_what_two_ledgers_hold_is_replayed_alike(tmp_path: Path) -> None:
    with make_server(tmp_path) as server:
        rounds(server, [make_client(tmp_path, 1)], 2)
        records = [read_journal(path, program()) for path in sorted((tmp_path / "server").rglob("*.journal"))]
        with Ledger(tmp_path / "copy", program()) as ledger:
            session = Session(program())
            for each in records:
                apply(session, each)
                ledger.append(each)
            again = Session(program())
            ledger.restore(again)
        assert state_checksum(again) == state_checksum(session) == state_checksum(server.session)
