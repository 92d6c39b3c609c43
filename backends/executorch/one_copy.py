"""One copy of a tensor in a program file that a delegate and a kernel both use, as an embedding tied to the head.

ExecuTorch writes what kernels read into one segment of the file and what delegates read into segments of their own. A
segment is an offset and a size, so a delegate's segment may lie inside the kernels' one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mobizo_compiler.backends.executorch.head import HEAD_BYTES, Head, read_head, read_header, write_offsets
from mobizo_compiler.format import checksum

SMALLEST_BYTES = 1 << 16
_MOST_ALIGNED = 4096
_FIRST = 1 << 12  # bytes that tell most tensors apart
_PIECE = 1 << 20  # bytes that are read at a time, so that a large file is never in memory


def share_equal_data(path: Path) -> int:
    """Let delegates read what the constant segment holds already, and leave their copies out.

    Returns:
        How many bytes smaller the file is. It is replaced by a smaller one, or left as it is.
    """
    sealed = checksum.is_sealed(path)
    with path.open("rb") as file:
        header = read_header(file.read(HEAD_BYTES))
        if header is None:
            return 0
        base = header.segment_base_offset
        file.seek(0)
        head = bytearray(file.read(base))
        found = read_head(bytes(head[: header.program_size]))
        inside = _equal_to_constants(file, base, found)
        if not inside:
            return 0
        offsets, end = [0] * len(found.segments), 0
        smaller = path.with_name(path.name + ".smaller")
        with smaller.open("wb") as out:
            out.write(head)
            for index, segment in sorted(enumerate(found.segments), key=lambda item: item[1].offset):
                if index not in inside:
                    offsets[index] = _aligned(end, segment.offset)
                    out.write(bytes(offsets[index] - end))
                    out.writelines(_pieces(file, base + segment.offset, segment.size))
                    end = offsets[index] + segment.size
            assert found.constant is not None
            for index, start in inside.items():
                offsets[index] = offsets[found.constant] + start
            write_offsets(head, found.segments, offsets, end)
            out.seek(0)
            out.write(head)
    if sealed:
        checksum.seal(smaller)
    os.replace(smaller, path)
    return header.segment_data_size - end


def _equal_to_constants(file: IO[bytes], base: int, head: Head) -> dict[int, int]:
    """For segments of delegates that are in the constant segment too, the byte of it where they begin."""
    inside: dict[int, int] = {}
    if head.constant is None:
        return inside
    constant = head.segments[head.constant]
    at, alike = base + constant.offset, dict[bytes, list[tuple[int, int]]]()
    for start, end in zip(head.constants, [*head.constants[1:], constant.size], strict=True):
        if end - start >= SMALLEST_BYTES:
            alike.setdefault(os.pread(file.fileno(), _FIRST, at + start), []).append((start, end))
    for index in sorted(head.named):
        segment = head.segments[index]
        if segment.size < SMALLEST_BYTES:
            continue
        other = base + segment.offset
        for start, end in alike.get(os.pread(file.fileno(), _FIRST, other), ()):
            if end - start >= segment.size and _equal(file, at + start, other, segment.size):
                inside[index] = start
                break
    return inside


def _equal(file: IO[bytes], at: int, other: int, size: int) -> bool:
    pieces = zip(_pieces(file, at, size), _pieces(file, other, size), strict=True)
    return all(one == another for one, another in pieces)


def _pieces(file: IO[bytes], at: int, size: int) -> Iterator[bytes]:
    """The bytes of a part of a file, in order."""
    for begin in range(at, at + size, _PIECE):
        yield os.pread(file.fileno(), min(_PIECE, at + size - begin), begin)


def _aligned(position: int, like: int) -> int:
    """The next position that is as aligned as another one is, up to a page."""
    alignment = min(like & -like, _MOST_ALIGNED) if like else _MOST_ALIGNED
    return -(-position // alignment) * alignment
