"""The protocol without a network: whatever arrives, or does not, server and clients have one state, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from mobizo_flower import (
    Client,
    DamagedMessageError,
    ForeignMessageError,
    Ledger,
    Outcome,
    OutOfRoundError,
    Plan,
    Protocol,
    Server,
)
from mobizo_flower.ledger import apply, state_checksum
from mobizo_flower.messages import (
    EVERYBODY,
    VERSION,
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
from torch import Tensor, nn

import mobizo_compiler as mobizo
from mobizo_compiler import JournalWarning, Session
from mobizo_compiler.device.journal import pack_journal, read_journal, unpack_journal
from mobizo_compiler.device.run import SNAPSHOT, step_seed
from mobizo_compiler.errors import ConfigError, JournalError, JournalLockedError, RunMismatchError, StateError

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


# -- answers that do not count ----------------------------------------------------------------------------------------


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
        assert report.clients == (1,) and report.answer_bytes == len(first)
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


# -- clients that come late, processes that end, files that are lost --------------------------------------------------


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


# -- plans and programs -----------------------------------------------------------------------------------------------


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
