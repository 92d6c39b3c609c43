"""The checksum at the end of a file: damage is noticed before anything in the file is mapped, parsed or run.

    trailer, 40 bytes    "MBZSHA2\\n", then SHA-256 of everything before the trailer [32]

Programs (`.pte`) and data files (`.ptd`) of ExecuTorch say in their header where they end, and the runtime reads no
further. In a package (`.pt2`) the trailer is the comment of the zip archive, which is the archive's end. A checksum is
there against accidents, not against forgery: who changes a file on purpose can write another one.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mobizo_compiler.errors import ArtifactError
from mobizo_compiler.format.files import raw_bytes

MAGIC = b"MBZSHA2\n"
SIZE = len(MAGIC) + hashlib.sha256().digest_size
PLACEHOLDER = MAGIC.ljust(SIZE, b"\0")
_BLOCK_BYTES = 1 << 20


class Digest:
    """A file to write to that keeps nothing but the checksum."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Take more bytes."""
        self._sha.update(data)
        return len(data)

    def trailer(self) -> bytes:
        """The trailer for what was written."""
        return MAGIC + self._sha.digest()


def sealed(data: bytes) -> bytes:
    """The contents of a file, with their trailer.

    >>> len(sealed(b"content")) - len(b"content") == SIZE
    True
    """
    digest = Digest()
    digest.write(data)
    return data + digest.trailer()


def seal(path: Path) -> None:
    """Write the trailer of a file, in place of the one that is there if there is one."""
    with path.open("r+b") as file:
        trailer = _trailer_of(file)
        file.write(trailer)


def is_sealed(path: Path) -> bool:
    """Whether a file ends with a trailer; `check` says whether it is the right one."""
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END) != _end_of_content(file)


def check(path: Path) -> None:
    """Compare a file with its trailer; it is read once, in blocks.

    Raises:
        ArtifactError: There is none, or the file is not what it was when it was written.
    """
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == _end_of_content(file):
            raise ArtifactError(
                "the file has no checksum at its end, so it was cut off, or this version of mobizo_compiler did not "
                "write it",
                where=str(path),
                hint="copy or make it again; verify=False takes the file as it is, and damage may crash the process",
            )
        if file.read(SIZE) != _trailer_of(file):
            raise ArtifactError(
                "the file is damaged: its checksum is not that of its contents",
                where=str(path),
                hint="copy or make it again",
            )


def of_file(path: Path) -> str:
    """SHA-256 of the content of a sealed file, in hexadecimal, as its trailer has it; `check` says whether it is so."""
    with path.open("rb") as file:
        file.seek(-SIZE + len(MAGIC), os.SEEK_END)
        return file.read().hex()


def of_tensors(described: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in hexadecimal; for formats that have no room for a trailer."""
    digest = hashlib.sha256(repr(sorted(described.items())).encode())
    for name, tensor in sorted(tensors.items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def add_tensor(digest: hashlib._Hash, name: str, tensor: Tensor, *, values: bool = True) -> None:
    """Add name, type, shape and, unless they are in it already, values of a tensor."""
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    if values:
        digest.update(raw_bytes(tensor))


def of_values(tensor: Tensor) -> int:
    """CRC-32 of the values of a tensor, those of floating point as float32: a copy in a wider type has the same."""
    values = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
    return zlib.crc32(raw_bytes(values), zlib.crc32(str(list(tensor.shape)).encode()))


def _end_of_content(file: IO[bytes]) -> int:
    """Where the trailer begins, or the file ends if it has none; the file is then there."""
    size = file.seek(0, os.SEEK_END)
    end = max(0, size - SIZE)
    file.seek(end)
    return file.seek(end if file.read(len(MAGIC)) == MAGIC and size >= SIZE else size)


def _trailer_of(file: IO[bytes]) -> bytes:
    """The trailer that a file should have; afterwards the file is where it begins."""
    left = _end_of_content(file)
    file.seek(0)
    digest, block = Digest(), memoryview(bytearray(_BLOCK_BYTES))
    while left:
        count = file.readinto(block[:left])  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file became shorter while it was read")
        digest.write(block[:count])
        left -= count
    return digest.trailer()
