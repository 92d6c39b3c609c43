"""The client's side of a federation: it catches up, trains or measures on its own rows, and answers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from mobizo_compiler.device.batches import Batch, by_step
from mobizo_compiler.device.run import JOURNAL, step_seed
from mobizo_compiler.device.scalars import whole
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import JournalError, JournalLockedError
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
    decode_task,
    encode,
    program_digest,
)

RoundBatches = Callable[[int, int], Batch]


class Client:
    """One client: a folder, a session, and rows that never leave it.

    Args:
        folder: Keeps the rounds of every federation that the client took part in, and the steps of the round in hand.
            Without it the client catches up from the journals that the server sends.
        session: A session of the federation's program. Its state becomes that of the federation.
        number: 0..2^32-2, its own in the federation: its noise is a function of it.
        batches: (inputs, labels) of a round and a step (or a seed, where directions are shared), both from 0; a
            function of these two alone, so that a killed client repeats what it did.
        rows: How many rows it has, for a weighted average.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self, folder: str | PathLike[str], session: Session, number: int, batches: RoundBatches, rows: int = 1
    ) -> None:
        self._folder, self._session, self._batches = Path(folder), session, batches
        self._number = whole("number", number, 0, EVERYBODY - 1)
        self._rows = whole("rows", rows, 1, 2**32 - 1)

    def answer(self, data: bytes) -> bytes:
        """Do what a task asks; the same task, given again, has the same answer.

        A kill in between loses nothing: steps that are on the disk are not made again.

        Args:
            data: The task as it came.

        Raises:
            DamagedMessageError: The task is damaged. Nothing has changed.
            ForeignMessageError: It is of another program or version, or contradicts the rounds that are kept here.
            OutOfRoundError: It is of a round that is over.
            JournalLockedError: Another process is this client.
            InputError: The batches do not suit the program.
        """
        where = f"task for client {self._number}"
        task, session = decode_task(data, where), self._session
        if task.head.program != program_digest(session.program):
            raise ForeignMessageError(
                "the task is for another program", where=where, hint="give server and clients the same program file"
            )
        home = self._folder / f"{task.head.federation:08x}"
        with Ledger(home / "rounds", session.program, repair=True) as ledger:
            ledger.restore(session)
            if task.first <= ledger.rounds:
                self._catch_up(task, ledger, where)
            head = Head(task.head.program, task.head.federation, task.head.round, self._number, state_checksum(session))
            if ledger.rounds > task.head.round:
                raise OutOfRoundError(
                    f"the task is of round {task.head.round}, and round {ledger.rounds - 1} is over",
                    where=where,
                    hint="none is needed if it was late; if the server lost rounds, restore its folder",
                )
            if task.kind == Kind.CATCH_UP or ledger.rounds < task.head.round:
                return encode(HaveAnswer(head, ledger.rounds))
            start = session.state()
            try:
                answer = self._trained(task, head, home) if task.kind == Kind.TRAIN else self._measured(task, head)
            finally:
                session.load_state(start)
            return encode(answer)

    def _catch_up(self, task: Task, ledger: Ledger, where: str) -> None:
        behind = ledger.rounds
        for number, sent in enumerate(task.rounds, task.first):
            try:
                records = ledger.received(sent, number)
            except JournalError as error:
                raise DamagedMessageError(error.problem, where=where, hint="have it sent again") from None
            if number < ledger.rounds:
                if not ledger.confirms(number, records):
                    raise ForeignMessageError(
                        f"round {number} is not the one that this client has: the federation has two histories",
                        where=where,
                        hint=f"if the server's is right, remove {str(ledger.folder)!r}; the client catches up from it",
                    )
                continue
            apply(self._session, records)
            ledger.append(records)
        if ledger.rounds > behind:
            ledger.save_snapshot(self._session)

    def _trained(self, task: Task, head: Head, home: Path) -> Answer:
        run = home / f"round-{task.head.round:05d}"
        for left in home.glob("round-*"):
            if left != run:
                shutil.rmtree(left)
        try:
            self._finetune(task, run)
        except JournalLockedError:
            raise
        except JournalError:  # steps of this round alone: they are made again from the same batches and seeds
            shutil.rmtree(run)
            self._finetune(task, run)
        return JournalAnswer(head, self._rows, (run / JOURNAL).read_bytes())

    def _finetune(self, task: Task, run: Path) -> None:
        self._session.finetune(
            lambda step: self._batches(task.head.round, step),
            steps=task.count,
            learning_rate=task.learning_rate,
            seed=step_seed(task.seed, self._number),
            eps=task.eps,
            run=run,
        )

    def _measured(self, task: Task, head: Head) -> Answer:
        batch = by_step(lambda step: self._batches(task.head.round, step))
        losses: list[float] = []
        gradients: list[tuple[float, ...]] = []
        for position in range(task.count):
            inputs, labels = batch(position)
            seed = step_seed(task.seed, position)
            found = self._session.train_step(inputs, labels, seed=seed, learning_rate=0.0, eps=task.eps)
            gradient = tuple(found.projected_gradient.tolist())
            void = not (math.isfinite(found.loss) and all(map(math.isfinite, gradient)))
            losses.append(math.nan if void else found.loss)
            gradients.append((0.0,) * len(gradient) if void else gradient)
        return GradientsAnswer(head, self._rows, tuple(losses), tuple(gradients))
