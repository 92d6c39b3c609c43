"""The journal of a training run: what every step did, in a few dozen bytes each.

A step is its seed, its projected gradients and its learning rate (`Session.replay`), so a list of them is the whole of
a training: it restores the state bit for bit without a forward pass, and it is what devices exchange in federated
training. Steps with the gradient itself are more than that: of them a journal keeps the loss and the gradient's length,
by which a step that is made again from its data is known to be the same. The layout, for hosts in other languages, is
in `docs/program_format.md`.

    header, 64 bytes    "MBZJRNL\\n", version u32, q u32, fingerprint of the program [32], P u64, zero u32, CRC-32 u32
    record, 24 + 4q     step u32, seed u32, learning rate f32, eps f32, loss f32, projected gradient f32[q], CRC-32 u32

All numbers are little-endian. A checksum covers what is before it in its header or record, and starts from the header's
in a record, so that records of another journal do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
import warnings
import zlib
from array import array
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import torch

from mobizo_compiler.errors import JournalError
from mobizo_compiler.format.files import hold, raw_bytes, sync_folder, whole_file
from mobizo_compiler.format.program import Program
from mobizo_compiler.step.noise import NOISE_VERSION

MAGIC, VERSION = b"MBZJRNL\n", 1
_HEADER = struct.Struct("<8sII32sQII")
_CHECKSUM = struct.Struct("<I")


class JournalWarning(UserWarning):
    """The end of a journal was torn, and was cut off."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One step.

    Args:
        step: Its number, from 0.
        seed: Seed of its noise.
        learning_rate: As float32 holds it.
        eps: Size of the perturbation.
        loss: Mean loss of all lanes; not finite if, and only if, the step was void.
        projected_gradient: [q]; zeros if the step was void.
    """

    step: int
    seed: int
    learning_rate: float
    eps: float
    loss: float
    projected_gradient: tuple[float, ...]


def fingerprint(program: Program) -> bytes:
    """32 bytes that two programs share if a step of one is a step of the other: same model, sites, A, noise and rule.

    Backend, quantization, loss and shapes may differ: devices of a federation need not be alike.
    """
    manifest = program.manifest
    zo = manifest.zo
    identity = [
        manifest.model,
        [dataclasses.asdict(site) for site in manifest.sites],
        *([["differentiates", zo.clip]] if zo.differentiates else []),
        [zo.queries, zo.noise, NOISE_VERSION],
        dict(manifest.rule),
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for site in manifest.sites:
        digest.update(raw_bytes(program.lora_a_by_fqn[site.fqn]))
    return digest.digest()


class Journal:
    """A journal that is open for appending; nobody else can open it meanwhile. `losses` are those of its steps.

    Args:
        path: Its file, made if there is none.
        program: The program that is trained.

    Raises:
        JournalLockedError: Another session has it open, in this process or another.
        JournalError: The file is no journal, a journal of another program, or damaged before its end.

    A record at the end that is not whole, as a kill during writing leaves it, is cut off with a `JournalWarning`, and
    an empty file is begun anew with one.
    """

    def __init__(self, path: str | PathLike[str], program: Program) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise JournalError(f"there is no folder {str(self.path.parent)!r}", where=str(self.path))
        self._lock = hold(
            self.path,
            "another session is training with this journal",
            "wait for it to end, or give this one a folder of its own",
        )
        try:
            self._header = _header(program)
            self._layout = _record(program.manifest.zo.queries)
            if not self.path.exists():
                self._begin()
            elif not self.path.stat().st_size:  # the system lost what was in it, or another host died making it
                warnings.warn(f"{self.path}: the journal is empty, and is begun anew", JournalWarning, stacklevel=2)
                self._begin()
            records, whole = _read(self.path, self._header, self._layout)
            self.losses = array("f", (record.loss for record in records))
            self._file = self.path.open("r+b", buffering=0)
            size = self.path.stat().st_size
            if size > whole:
                self._file.truncate(whole)
                os.fsync(self._file.fileno())
                warnings.warn(
                    f"{self.path}: the last {size - whole} bytes were not a whole step and have been cut off; "
                    f"{len(self)} steps are left",
                    JournalWarning,
                    stacklevel=2,
                )
            self._end = whole
        except BaseException:
            self._lock.release()
            raise

    def append(self, record: Record) -> None:
        """Write a record and wait until it is on the disk.

        Raises:
            JournalError: It could not be written (the disk is full, say); the journal is what it was before.
        """
        if record.step != len(self):
            raise JournalError(f"step {record.step} does not follow {len(self)} steps", where=str(self.path))
        data = _packed(record, self._header, self._layout)
        try:
            self._file.seek(self._end)
            if self._file.write(data) != len(data):
                raise OSError("the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise JournalError(
                f"step {record.step} could not be written: {error}",
                where=str(self.path),
                hint=f"make room and go on: the journal is whole and holds {len(self)} steps",
            ) from error
        self._end += len(data)
        self.losses.append(record.loss)

    def __len__(self) -> int:
        """Steps that it has."""
        return len(self.losses)

    def records(self) -> list[Record]:
        """All steps, read from the file: a run of many steps would fill the memory with them."""
        return _read(self.path, self._header, self._layout)[0]

    def close(self) -> None:
        """Close the file and let others open it."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self) -> None:
        """The header appears whole or not at all."""
        with whole_file(self.path) as file:
            file.write(self._header)
        sync_folder(self.path.parent)


def read_journal(path: str | PathLike[str], program: Program) -> list[Record]:
    """The records of a journal, which may be open elsewhere; a torn end is left out with a `JournalWarning`.

    Raises:
        JournalError: There is no such file, or it is no journal, or of another program, or damaged before its end.
    """
    layout = _record(program.manifest.zo.queries)
    records, whole = _read(Path(path), _header(program), layout)
    if Path(path).stat().st_size > whole + layout.size:
        warnings.warn(f"{path}: bytes after the last whole step are left out", JournalWarning, stacklevel=2)
    return records


def pack_journal(records: Sequence[Record], program: Program) -> bytes:
    """A journal as bytes: what a file of these records holds, to be sent rather than kept.

    Args:
        records: Steps from 0 on.
        program: The program that made them.

    Raises:
        JournalError: They are not steps 0, 1, 2, ...
    """
    header, layout = _header(program), _record(program.manifest.zo.queries)
    for position, record in enumerate(records):
        if record.step != position:
            raise JournalError(f"record {position} says that it is step {record.step}")
    return header + b"".join(_packed(record, header, layout) for record in records)


def unpack_journal(data: bytes, program: Program, where: str) -> list[Record]:
    """The records of a journal that came as bytes; unlike a file's, they must be whole to the end.

    Args:
        data: What `pack_journal` made, or the bytes of a journal's file.
        program: A program with the same fingerprint.
        where: What errors call it.

    Raises:
        JournalError: It is no journal, or of another program, or damaged, or cut off.
    """
    records, whole = _parsed(data, _header(program), _record(program.manifest.zo.queries), where)
    if whole < len(data):
        raise JournalError(
            f"the journal is damaged: its last {len(data) - whole} bytes are not a whole step, after {len(records)}",
            where=where,
            hint="have it sent again",
        )
    return records


def _header(program: Program) -> bytes:
    fields = (MAGIC, VERSION, program.manifest.zo.queries, fingerprint(program), program.parameters, 0)
    body = _HEADER.pack(*fields, 0)[: -_CHECKSUM.size]
    return body + _CHECKSUM.pack(zlib.crc32(body))


def _record(queries: int) -> struct.Struct:
    return struct.Struct(f"<IIfff{queries}f")


def _packed(record: Record, header: bytes, layout: struct.Struct) -> bytes:
    numbers = record.learning_rate, record.eps, record.loss
    body = layout.pack(record.step, record.seed, *numbers, *record.projected_gradient)
    return body + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(header)))


def _unpacked(data: bytes, layout: struct.Struct) -> Record:
    step, seed, learning_rate, eps, loss, *gradient = layout.unpack_from(data)
    return Record(step, seed, learning_rate, eps, loss, tuple(gradient))


def _read(path: Path, header: bytes, layout: struct.Struct) -> tuple[list[Record], int]:
    """The whole records, and how many bytes of the file they and the header are."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(f"the journal cannot be read: {error}", where=str(path)) from None
    return _parsed(data, header, layout, str(path))


def _parsed(data: bytes, header: bytes, layout: struct.Struct, where: str) -> tuple[list[Record], int]:
    """The whole records, and how many of the bytes they and the header are."""
    _check_header(data[: _HEADER.size], header, where)
    size = layout.size + _CHECKSUM.size
    records: list[Record] = []
    start = zlib.crc32(header)

    def whole(position: int) -> bool:
        part = data[position : position + size]
        return len(part) == size and _CHECKSUM.unpack(part[layout.size :])[0] == zlib.crc32(part[: layout.size], start)

    position = _HEADER.size
    while position < len(data) and whole(position):
        records.append(_unpacked(data[position : position + size], layout))
        if records[-1].step != len(records) - 1:
            raise JournalError(f"record {len(records) - 1} says that it is step {records[-1].step}", where=where)
        position += size
    later = next((p for p in range(position + size, len(data), size) if whole(p)), None)
    if later is not None:
        raise JournalError(
            f"step {len(records)} is damaged, and steps after it are not: {(later - position) // size} in between",
            where=where,
            hint=f"what is left after step {len(records)} cannot be restored; truncate the file to {position} bytes to "
            "go on from there",
        )
    return records, position


def _check_header(found: bytes, wanted: bytes, where: str) -> None:
    if found == wanted:
        return
    if not found:
        raise JournalError("the journal is empty", where=where, hint="a run that is taken up begins it anew")
    body, checksum = found[: -_CHECKSUM.size], found[-_CHECKSUM.size :]
    if len(found) < _HEADER.size or not found.startswith(MAGIC):
        raise JournalError("this is not a journal", where=where)
    if checksum != _CHECKSUM.pack(zlib.crc32(body)):
        raise JournalError("the header of the journal is damaged", where=where)
    _, version, queries, _, parameters, _, _ = _HEADER.unpack(found)
    if version != VERSION:
        raise JournalError(f"the journal has version {version}, this reads version {VERSION}", where=where)
    raise JournalError(
        f"the journal is of another program: {queries} queries and {parameters:,} parameters, or other weights, sites "
        "or A",
        where=where,
        hint="give each program a folder of its own",
    )


def replayed(records: Sequence[Record]) -> Iterator[tuple[int, torch.Tensor, float]]:
    """Arguments of `Session.replay` for every step that was not void."""
    for record in records:
        if math.isfinite(record.loss):
            yield record.seed, torch.tensor(record.projected_gradient, dtype=torch.float32), record.learning_rate
