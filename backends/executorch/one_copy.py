"""One copy of a tensor in a program file that a delegate and a kernel both use, as an embedding tied to the head.

ExecuTorch writes what kernels read into one segment of the file and what delegates read into segments of their own. A
segment is an offset and a size, so a delegate's segment may lie inside the kernels' one.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from mobizo_compiler.backends.executorch.head import HEAD_BYTES, Head, read_head, read_header, write_offsets
from mobizo_compiler.format import checksum

SMALLEST_BYTES = 1 << 16
_MOST_ALIGNED = 4096
_FIRST = 1 << 12  # bytes that are compared before all are read


def share_equal_data(path: Path) -> int:
    """Let delegates read what the constant segment holds already, and leave their copies out.

    Returns:
        How many bytes smaller the file is. It is replaced by a smaller one, or left as it is.
    """
    sealed = checksum.is_sealed(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = read_header(data[:HEAD_BYTES])
        if header is None:
            return 0
        base, found = header.segment_base_offset, read_head(data[: header.program_size])
        inside = _equal_to_constants(data, base, found)
        if not inside:
            return 0
        head, offsets, end = bytearray(data[:base]), [0] * len(found.segments), 0
        smaller = path.with_name(path.name + ".smaller")
        with smaller.open("wb") as out:
            out.write(head)
            for index, segment in sorted(enumerate(found.segments), key=lambda item: item[1].offset):
                if index not in inside:
                    offsets[index] = _aligned(end, segment.offset)
                    out.write(bytes(offsets[index] - end))
                    out.write(data[base + segment.offset : base + segment.offset + segment.size])
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


def _equal_to_constants(data: mmap.mmap, base: int, head: Head) -> dict[int, int]:
    """For segments of delegates that are in the constant segment too, the byte of it where they begin."""
    inside: dict[int, int] = {}
    if head.constant is None:
        return inside
    constant = head.segments[head.constant]
    ends = [*head.constants[1:], constant.size]
    for index in sorted(head.named):
        segment = head.segments[index]
        if segment.size < SMALLEST_BYTES:
            continue
        for start, end in zip(head.constants, ends, strict=True):
            at, other = base + constant.offset + start, base + segment.offset
            large_enough = end - start >= segment.size
            if (
                large_enough
                and data[at : at + _FIRST] == data[other : other + _FIRST]
                and data[at : at + segment.size] == data[other : other + segment.size]
            ):
                inside[index] = start
                break
    return inside


def _aligned(position: int, like: int) -> int:
    """The next position that is as aligned as another one is, up to a page."""
    alignment = min(like & -like, _MOST_ALIGNED) if like else _MOST_ALIGNED
    return -(-position // alignment) * alignment
