"""The rounds of a federation on disk: the same files at the server and at every client.

    00000.journal, ...     what everybody replays, a round in a file; each is a journal as `Session.merge` takes it
    snapshot.safetensors   the state after some round, only a shortcut

A round's file is written to another name, flushed and renamed, so it is there whole or not at all. The state is the
program's initial one and the replay of all rounds; it comes back bit for bit from the journals alone.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

from mobizo_compiler.device.journal import (
    JournalWarning,
    Record,
    pack_journal,
    read_journal,
    replayed,
    unpack_journal,
)
from mobizo_compiler.device.run import SNAPSHOT, all_or_none, read_state, write_state
from mobizo_compiler.device.session import Session
from mobizo_compiler.errors import JournalError
from mobizo_compiler.format.files import hold, raw_bytes, sync_folder, whole_file
from mobizo_compiler.format.program import Program


def state_checksum(session: Session) -> int:
    """CRC-32 of the flat state, by which two sides see that they have the same one."""
    return zlib.crc32(raw_bytes(session.state()))


def apply(session: Session, records: Sequence[Record]) -> None:
    """Replay the steps of a round, all or none.

    Raises:
        StateError: A sum of steps is too large for float32. The state is what it was.
        InputError: A projected gradient is not finite. The state is what it was.
    """
    with all_or_none(session):
        for seed, gradient, learning_rate in replayed(records):
            session.replay(seed, gradient, learning_rate)


class Ledger:
    """The rounds in a folder; nobody else has it open meanwhile.

    Args:
        folder: Made if there is none.
        program: The program that is trained.
        repair: Drop a damaged round and all after it, with a `JournalWarning`: for clients, who get them again.

    Raises:
        JournalLockedError: Another process has it open.
    """

    def __init__(self, folder: Path, program: Program, *, repair: bool = False) -> None:
        self.folder, self._program, self._repair = folder, program, repair
        folder.mkdir(parents=True, exist_ok=True)
        self._empty = pack_journal((), program)  # the header that every round of this program has
        self._lock = hold(
            folder / "rounds", "another process has this federation open", "wait for it to end, or give each a folder"
        )
        self.rounds = 0
        while self._path(self.rounds).exists():
            self.rounds += 1

    def append(self, records: Sequence[Record]) -> None:
        """Write the next round and wait until it is on the disk.

        Raises:
            JournalError: The records are not steps 0, 1, 2, ...
            OSError: It could not be written; the ledger is what it was.
        """
        self._write(self.rounds, records)
        self.rounds += 1

    def records(self, number: int) -> list[Record]:
        """The steps of a round.

        Raises:
            JournalError: Its file is damaged.
        """
        path = self._path(number)
        records = read_journal(path, self._program)
        if path.stat().st_size != len(pack_journal(records, self._program)):
            raise JournalError("the round is cut off", where=str(path), hint="restore the file from a backup")
        return records

    def sent(self, number: int) -> bytes:
        """A round as messages have it: its journal without the header, which the other side knows."""
        return self._bare(self.records(number))

    def received(self, data: bytes, number: int) -> list[Record]:
        """The steps of a round that a message brought.

        Raises:
            JournalError: They are not of this program, or damaged.
        """
        return unpack_journal(self._empty + data, self._program, f"round {number} of the message")

    def confirms(self, number: int, records: Sequence[Record]) -> bool:
        """Whether a round that is here already is that; a damaged file is written again."""
        try:
            return self.sent(number) == self._bare(records)
        except JournalError:
            self._write(number, records)
            return True

    def restore(self, session: Session) -> None:
        """Set the state to the end of the last round, bit for bit.

        Raises:
            JournalError: A round is damaged, and this ledger does not repair.
        """
        start, done = self._program.initial_state(), 0
        if (self.folder / SNAPSHOT).exists():
            try:
                state, step = read_state(self.folder / SNAPSHOT, session)
                if step <= self.rounds:
                    start, done = state, step
            except JournalError as error:
                warnings.warn(f"{error.problem} ({error.where}); replaying all rounds", JournalWarning, stacklevel=2)
        session.load_state(start)
        for number in range(done, self.rounds):
            try:
                records = self.records(number)
            except JournalError as error:
                if not self._repair:
                    raise
                warnings.warn(f"{error.problem} ({error.where}); dropped from there", JournalWarning, stacklevel=2)
                return self._drop(number)
            apply(session, records)

    def save_snapshot(self, session: Session) -> None:
        """Keep the state, which must be that after the last round, so that `restore` replays less."""
        write_state(self.folder / SNAPSHOT, session, self.rounds)

    def close(self) -> None:
        """Let others open it."""
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, number: int, records: Sequence[Record]) -> None:
        with whole_file(self._path(number)) as file:
            file.write(pack_journal(records, self._program))
        sync_folder(self.folder)

    def _bare(self, records: Sequence[Record]) -> bytes:
        return pack_journal(records, self._program)[len(self._empty) :]

    def _drop(self, first: int) -> None:
        for number in reversed(range(first, self.rounds)):  # so that a kill leaves no gap
            self._path(number).unlink()
        sync_folder(self.folder)
        self.rounds = first

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.journal"
