"""What a program's `prefix` made of training rows, kept in a file so that later epochs start from it.

Records have one size, because shapes are fixed: 32 bytes of key, the values of one row, and a CRC-32 of both. They are
appended as rows are seen for the first time. The file only saves work: a record that is damaged is computed again, a
file of another program is begun anew, and where no more can be written, the run goes on without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from mobizo_compiler.device.scalars import whole
from mobizo_compiler.errors import InputError
from mobizo_compiler.format.files import hold, raw_bytes
from mobizo_compiler.format.manifest import TensorSpec
from mobizo_compiler.format.program import Program

MAGIC = b"MBZPRFX1"
_CHECKSUM = struct.Struct("<I")
_KEY = 32
_HEADER = len(MAGIC) + _KEY


class PrefixCacheWarning(UserWarning):
    """Rows cannot be kept any more; the run goes on, and computes them each time."""


class PrefixCache:
    """Rows of one program on disk; nobody else can open the file meanwhile.

    Args:
        path: The file, made if there is none.
        program: A program that was compiled with `split_prefix=True`.
        max_bytes: The file does not grow beyond this; rows that do not fit are computed each time. None for no limit.

    Raises:
        InputError: The program has no prefix, or one whose rows cannot be told apart, or the limit is no number.
        JournalLockedError: Another session has the file open.
    """

    def __init__(self, path: str | PathLike[str], program: Program, max_bytes: int | None = None) -> None:
        specs = program.manifest.prefix
        rows = program.manifest.labels.shape[0]
        if not specs:
            raise InputError("the program has no prefix to keep", hint="compile(..., split_prefix=True)")
        if any(not spec.shape or spec.shape[0] != rows for spec in specs):
            raise InputError(
                "values before the first adapter do not have rows in the first axis, and cannot be kept apart",
                hint="leave the prefix cache out",
            )
        self.path, self._specs = Path(path), specs
        self._max_bytes = None if max_bytes is None else whole("prefix_cache_bytes", max_bytes, 0)
        self._row_bytes = sum(_row_bytes(spec) for spec in specs)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.path, "another session has this prefix cache open", "give this one a file of its own")
        header = MAGIC + _identity(program)
        try:
            self._file = self.path.open("a+b", buffering=0)
            self._file.seek(0)
            if self._file.read(_HEADER) != header:
                self._file.truncate(0)
                self._file.write(header)
            self._places = self._read_keys()
        except BaseException:
            self._lock.release()
            raise

    @property
    def rows(self) -> int:
        """How many rows are kept."""
        return len(self._places)

    def values(
        self, inputs: Sequence[Tensor], per_row: Sequence[bool], compute: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """The values of a batch, from the file if all of its rows are there.

        Args:
            inputs: The model's inputs and the labels.
            per_row: Which of them have rows, in their first axis.
            compute: Computes the values of the batch.
        """
        keys = _keys(inputs, per_row, int(self._specs[0].shape[0]))
        found = [self._read(key) for key in keys]
        if all(row is not None for row in found):
            return self._values(b"".join(row for row in found if row is not None))
        values = compute()
        for position, (key, row) in enumerate(zip(keys, found, strict=True)):
            if row is None:
                self._write(key, [value[position] for value in values])
        return values

    def close(self) -> None:
        """Close the file and let others open it."""
        self._file.close()
        self._lock.release()

    @property
    def _record(self) -> int:
        return _KEY + self._row_bytes + _CHECKSUM.size

    def _read_keys(self) -> dict[bytes, int]:
        size = self._file.seek(0, 2)
        count = (size - _HEADER) // self._record
        self._file.truncate(_HEADER + count * self._record)
        places = {}
        for index in range(count):
            place = _HEADER + index * self._record
            self._file.seek(place)
            places[self._file.read(_KEY)] = place
        return places

    def _read(self, key: bytes) -> bytes | None:
        """The record of a row, or None if it is not there or damaged."""
        place = self._places.get(key)
        if place is None:
            return None
        self._file.seek(place)
        data = self._file.read(self._record)
        body = memoryview(data)[: -_CHECKSUM.size]
        if len(data) < self._record or _CHECKSUM.pack(zlib.crc32(body)) != data[-_CHECKSUM.size :]:
            del self._places[key]
            return None
        return data

    def _values(self, records: bytes) -> list[Tensor]:
        """The values of all rows from their records, one after the other."""
        table = torch.frombuffer(bytearray(records), dtype=torch.uint8).reshape(-1, self._record)
        values, start = [], _KEY
        for spec in self._specs:
            part = table[:, start : start + _row_bytes(spec)].clone(memory_format=torch.contiguous_format)
            values.append(part.view(getattr(torch, spec.dtype)).reshape([int(n) for n in spec.shape]))
            start += _row_bytes(spec)
        return values

    def _write(self, key: bytes, values: Sequence[Tensor]) -> None:
        place = self._file.seek(0, 2)
        if key in self._places or (self._max_bytes is not None and place + self._record > self._max_bytes):
            return
        body = key + b"".join(bytes(raw_bytes(value)) for value in values)
        try:
            if self._file.write(body + _CHECKSUM.pack(zlib.crc32(body))) != self._record:
                raise OSError("the disk is full")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(place)  # half a record would shift all that come after it
            self._max_bytes = place
            warnings.warn(
                f"{self.path}: {error}; {self.rows} rows are kept, and no more from here on",
                PrefixCacheWarning,
                stacklevel=2,
            )
            return
        self._places[key] = place


def _keys(inputs: Sequence[Tensor], per_row: Sequence[bool], rows: int) -> list[bytes]:
    digests = [hashlib.sha256() for _ in range(rows)]
    for value, has_rows in zip(inputs, per_row, strict=True):
        data = raw_bytes(value)
        size = len(data) // rows if has_rows else 0
        for row, digest in enumerate(digests):
            digest.update(data[row * size : (row + 1) * size] if has_rows else data)
    return [digest.digest() for digest in digests]


def _identity(program: Program) -> bytes:
    """Programs that share it make the same values of a row, up to the engine's rounding."""
    manifest = program.manifest
    loss = json.dumps(manifest.loss, sort_keys=True)
    text = repr([manifest.model, manifest.backend, manifest.quantization, manifest.prefix, manifest.lora, loss])
    return hashlib.sha256(text.encode()).digest()


def _row_bytes(spec: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return math.prod(int(size) for size in spec.shape[1:]) * dtype.itemsize
