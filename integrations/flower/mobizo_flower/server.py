"""The server's side of a federation: it opens rounds, judges answers, and closes a round by merging what came.

    federation.json   the number of the federation, its plan, and its program, written once
    rounds/           the rounds that are over (`ledger.py`)

A round that is over is on the disk before anybody hears of it. A server that is killed loses the answers of the round
that was open, and nothing else: it asks for the same round again, and clients give the answers that they gave.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import secrets
from os import PathLike
from pathlib import Path
from typing import Any

from mobizo_compiler.device.journal import Record, fingerprint, pack_journal, unpack_journal
from mobizo_compiler.device.run import all_or_none, step_seed
from mobizo_compiler.device.scalars import float32
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import ConfigError, JournalError, RunMismatchError
from mobizo_compiler.format.files import sync_folder, whole_file
from mobizo_compiler.options import MAX_SEED, check_int
from mobizo_flower.errors import DamagedMessageError, ForeignMessageError, OutOfRoundError
from mobizo_flower.ledger import Ledger, apply, state_checksum
from mobizo_flower.messages import (
    EVERYBODY,
    Answer,
    GradientsAnswer,
    HaveAnswer,
    Head,
    JournalAnswer,
    Kind,
    Task,
    decode_answer,
    encode,
    program_digest,
)

FEDERATION = "federation.json"


class Protocol(enum.StrEnum):
    """What a round is.

    JOURNALS: every client makes steps of its own, the server merges their journals (federated averaging).
    DIRECTIONS: every client measures along the same directions, the server averages what they found. It is one step
    on the rows of all (as in FedKSeed, arXiv 2312.06353, DeComFL, arXiv 2405.15861, and FeedSign, arXiv 2501.17610).
    """

    JOURNALS = "journals"
    DIRECTIONS = "directions"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all rounds of a federation have in common.

    Args:
        protocol: What a round is.
        steps: Of every client in a round; or seeds, each of them q directions, whose mean makes the round's step.
        learning_rate: Of a step of a client, or of the round's step.
        seed: 0..2^31-1; with the round's number it gives the seed of the round.
        eps: Size of the perturbation; None for what suits the program.
        least_answers: A round with fewer is opened again.
        by_rows: Weigh clients by their rows, so that the sum is that of all rows; if False, equally.

    Raises:
        ConfigError: A value is out of range.
    """

    protocol: Protocol = Protocol.JOURNALS
    steps: int = 5
    learning_rate: float = 0.01
    seed: int = 0
    eps: float | None = None
    least_answers: int = 1
    by_rows: bool = False

    def __post_init__(self) -> None:
        if self.protocol not in list(Protocol):
            raise ConfigError(f"protocol is {self.protocol!r}; it must be one of {', '.join(Protocol)}")
        check_int("steps", self.steps, 1, 2**31 - 1)
        check_int("seed", self.seed, 0, MAX_SEED)
        check_int("least_answers", self.least_answers, 1, 2**31 - 1)


class Outcome(enum.StrEnum):
    """What became of an answer."""

    ACCEPTED = "accepted"
    BEHIND = "behind"  # the client lacks rounds that it was not sent
    UP_TO_DATE = "up to date"
    REPEATED = "repeated"
    LATE = "late"
    FOREIGN = "foreign"
    DAMAGED = "damaged"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of an answer, and why.

    Args:
        outcome: Only `ACCEPTED` answers count in their round.
        client: Whose it is; None where that cannot be read.
        reason: In words.
        rounds: Rounds that the client has without a gap.
        same_state: Whether the client's state is the server's, bit for bit. Engines may add in other orders.
    """

    outcome: Outcome
    client: int | None
    reason: str
    rounds: int = 0
    same_state: bool = True


@dataclasses.dataclass(frozen=True)
class RoundReport:
    """A round that is over.

    Args:
        number: From 0.
        clients: Whose answers count.
        loss: Mean of their losses that are finite; NaN if there are none.
        steps: Steps that everybody replays.
        state: CRC-32 of the state after it.
        counted_bytes: Of the answers that count, together.
    """

    number: int
    clients: tuple[int, ...]
    loss: float
    steps: int
    state: int
    counted_bytes: int


class Server:
    """A federation in a folder. It knows no network: it makes tasks, and is handed answers, as bytes.

    Args:
        folder: Made if there is none; a federation that is there is taken up where it was.
        session: A session of the federation's program; its state becomes that after the last round.
        plan: What a round is.

    Raises:
        RunMismatchError: The folder has a federation with another plan or program.
        JournalLockedError: Another process has it open.
        JournalError: A round is damaged.
        ConfigError: Steps of the program cannot be replayed, or not merged.
        InputError: The learning rate or eps is no number that float32 can hold.
    """

    def __init__(self, folder: str | PathLike[str], session: Session, plan: Plan) -> None:
        self.session, self.plan, self._folder = session, plan, Path(folder)
        manifest = session.program.manifest
        if manifest.zo.differentiates:
            raise ConfigError(
                f"steps of the {manifest.zo.estimator} estimator are no scalars that clients could exchange",
                hint='compile with estimator="two-sided"',
            )
        if manifest.memory and plan.protocol == Protocol.JOURNALS:
            raise ConfigError(
                f"the rule {manifest.rule['name']!r} remembers its steps; those of others cannot be put between",
                hint='share directions (Protocol.DIRECTIONS), or compile with rule="sgd"',
            )
        self._learning_rate = float32("learning_rate", plan.learning_rate)
        self._eps = float32("eps", manifest.eps if plan.eps is None else plan.eps, above=0)
        self._ledger = Ledger(self._folder / "rounds", session.program)
        try:
            self.federation = self._begun()
            self._ledger.restore(session)
        except BaseException:
            self._ledger.close()
            raise
        self._open()

    @property
    def round(self) -> int:
        """The number of the round that is open."""
        return self._ledger.rounds

    @property
    def answered(self) -> frozenset[int]:
        """Clients whose answers count in the round that is open."""
        return frozenset(self._answers)

    def task(self, have: int = 0, kind: Kind | None = None) -> bytes:
        """What to send to a client.

        Args:
            have: Rounds that it has; it is sent those after them. If it has less, it says so (`Outcome.BEHIND`).
            kind: `Kind.CATCH_UP` to hand on the rounds alone; if None, what the protocol asks for.
        """
        asked = Kind.TRAIN if self.plan.protocol == Protocol.JOURNALS else Kind.MEASURE
        rounds = tuple(self._ledger.sent(number) for number in range(have, self.round))
        numbers = self.plan.steps, self._seed, self._learning_rate, self._eps
        head = Head(program_digest(self.session.program), self.federation, self.round, EVERYBODY, self._state)
        return encode(Task(head, asked if kind is None else kind, *numbers, have, rounds))

    def accept(self, data: bytes) -> Verdict:
        """Judge an answer. Nothing that a client may send is an error here, and only what is accepted changes anything.

        Args:
            data: The answer as it came.
        """
        client = None
        try:
            answer = decode_answer(data, "answer")
            head, client = answer.head, answer.head.client
            where = f"answer of client {client}"
            self._check_head(head, where)
            same = head.state == self._state
            if isinstance(answer, HaveAnswer):
                outcome = Outcome.UP_TO_DATE if answer.rounds == self.round else Outcome.BEHIND
                return Verdict(outcome, client, f"it has {answer.rounds} rounds", answer.rounds, same)
            records = self._records(answer, where)
            if client in self._answers:
                packed = [pack_journal(r, self.session.program) for r in (self._answers[client][1], records)]  # NaN too
                again = "the same answer" if packed[0] == packed[1] else "another answer; the first counts"
                return Verdict(Outcome.REPEATED, client, again, self.round, same)
        except OutOfRoundError as error:
            return Verdict(Outcome.LATE, client, error.problem)
        except ForeignMessageError as error:
            return Verdict(Outcome.FOREIGN, client, error.problem)
        except (DamagedMessageError, JournalError) as error:
            return Verdict(Outcome.DAMAGED, client, error.problem)
        self._answers[client] = answer, records, len(data)
        return Verdict(Outcome.ACCEPTED, client, f"{len(records)} steps", self.round, same)

    def close_round(self) -> RoundReport:
        """Merge the answers, replay the result, write it, and open the next round.

        The result is a function of who answered what, not of the order.

        Raises:
            ConfigError: There are fewer answers than the plan asks for; the round stays open.
            StateError: The update is too large for float32. The round stays open, and the state is what it was.
            OSError: The round could not be written; likewise. If only the state could not, the round is over, and the
                next server replays the rounds.
        """
        if len(self._answers) < self.plan.least_answers:
            raise ConfigError(f"round {self.round} has {len(self._answers)} answers of {self.plan.least_answers}")
        clients, number = tuple(sorted(self._answers)), self.round
        merged = self._merged(clients)
        with all_or_none(self.session):
            apply(self.session, merged)
            self._ledger.append(merged)
        losses = [r.loss for client in clients for r in self._answers[client][1] if math.isfinite(r.loss)]
        size = sum(self._answers[client][2] for client in clients)
        self._open()
        self._ledger.save_snapshot(self.session)
        loss = sum(losses) / len(losses) if losses else math.nan
        return RoundReport(number, clients, loss, len(merged), self._state, size)

    def close(self) -> None:
        """Let other processes open the folder."""
        self._ledger.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begun(self) -> int:
        """The number of the federation, drawn and written when it begins."""
        path = self._folder / FEDERATION
        wanted = json.loads(json.dumps(dataclasses.asdict(self.plan)))
        if not path.exists():
            if self._ledger.rounds:
                raise JournalError(f"there are rounds without {FEDERATION}", where=str(path), hint="restore the file")
            found: dict[str, Any] = {"federation": secrets.randbits(32), "plan": wanted}
            found["program"] = fingerprint(self.session.program).hex()
            with whole_file(path) as file:
                file.write(json.dumps(found, indent=2).encode())
            sync_folder(self._folder)
        try:
            found = json.loads(path.read_text())
            federation, plan, program = int(found["federation"]), dict(found["plan"]), found["program"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JournalError(f"the file cannot be read: {error!r}", where=str(path)) from None
        if program != fingerprint(self.session.program).hex():
            raise RunMismatchError("the federation is of another program", where=str(path))
        if differs := [
            f"{name} is {plan.get(name)!r}, not {wanted[name]!r}" for name in wanted if plan.get(name) != wanted[name]
        ]:
            raise RunMismatchError(
                f"the federation was begun with another plan: {', '.join(differs)}",
                where=str(path),
                hint="give the same plan, or another folder",
            )
        return federation

    def _open(self) -> None:
        self._answers: dict[int, tuple[Answer, list[Record], int]] = {}
        self._seed = step_seed(self.plan.seed, self.round)
        self._state = state_checksum(self.session)

    def _check_head(self, head: Head, where: str) -> None:
        if head.program != program_digest(self.session.program):
            raise ForeignMessageError("the answer is of another program", where=where)
        if head.federation != self.federation:
            raise ForeignMessageError("the answer is of another federation", where=where)
        if head.client == EVERYBODY:
            raise ForeignMessageError("the answer is of no client", where=where)
        if head.round < self.round:
            raise OutOfRoundError(f"round {head.round} is over; round {self.round} is open", where=where)
        if head.round > self.round:
            raise ForeignMessageError(f"round {head.round} has not begun; round {self.round} is open", where=where)

    def _records(self, answer: Answer, where: str) -> list[Record]:
        """The steps of an answer, which must be those that were asked for.

        Raises:
            MessageError: They are others.
            JournalError: They are damaged, or of another program.
        """
        if isinstance(answer, JournalAnswer) and self.plan.protocol == Protocol.JOURNALS:
            records = unpack_journal(answer.journal, self.session.program, where)
            seed = step_seed(self._seed, answer.head.client)
        elif isinstance(answer, GradientsAnswer) and self.plan.protocol == Protocol.DIRECTIONS:
            seed, found = self._seed, zip(answer.losses, answer.gradients, strict=True)
            numbers = self._learning_rate, self._eps
            records = [Record(step, step_seed(seed, step), *numbers, *each) for step, each in enumerate(found)]
        else:
            raise ForeignMessageError(f"the answer is not of the protocol {self.plan.protocol}", where=where)
        asked = [(step_seed(seed, step), self._learning_rate, self._eps) for step in range(self.plan.steps)]
        if [(record.seed, record.learning_rate, record.eps) for record in records] != asked:
            raise ForeignMessageError("the steps are not those that were asked for", where=where)
        queries = self.session.program.manifest.zo.queries
        for record in records:
            gradient = record.projected_gradient
            if len(gradient) != queries or not all(map(math.isfinite, gradient)):
                raise DamagedMessageError(f"step {record.step} has not {queries} finite numbers", where=where)
        if not answer.rows:
            raise DamagedMessageError("the client says that it has no rows", where=where)
        return records

    def _merged(self, clients: tuple[int, ...]) -> list[Record]:
        """The steps that everybody replays: those of all clients one after the other, or the mean of each."""
        answers = [self._answers[client] for client in clients]
        rows = [
            answer.rows if self.plan.by_rows and not isinstance(answer, HaveAnswer) else 1 for answer, _, _ in answers
        ]
        if self.plan.protocol == Protocol.JOURNALS:
            scaled = [
                dataclasses.replace(record, learning_rate=self._scaled(weight / sum(rows)))
                for (_, records, _), weight in zip(answers, rows, strict=True)
                for record in records
            ]
            return [dataclasses.replace(record, step=step) for step, record in enumerate(scaled)]
        rate = self._scaled(1 / self.plan.steps)
        each = zip(*(records for _, records, _ in answers), strict=True)
        return [dataclasses.replace(_mean(found, rows), learning_rate=rate) for found in each]

    def _scaled(self, factor: float) -> float:
        return float32("learning_rate", self._learning_rate * factor)


def _mean(records: tuple[Record, ...], rows: list[int]) -> Record:
    """One seed, as all clients measured it; those with losses that are not finite do not count."""
    counted = [(record, weight) for record, weight in zip(records, rows, strict=True) if math.isfinite(record.loss)]
    total = sum(weight for _, weight in counted)
    if not total:
        return dataclasses.replace(
            records[0], loss=math.nan, projected_gradient=(0.0,) * len(records[0].projected_gradient)
        )
    columns = zip(*(record.projected_gradient for record, _ in counted), strict=True)
    weights = [weight / total for _, weight in counted]
    gradient = tuple(math.fsum(g * w for g, w in zip(column, weights, strict=True)) for column in columns)
    loss = math.fsum(record.loss * weight for (record, _), weight in zip(counted, weights, strict=True))
    return dataclasses.replace(records[0], loss=loss, projected_gradient=gradient)
