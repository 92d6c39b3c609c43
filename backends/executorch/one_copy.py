"""One copy of a tensor in a program file that a delegate and a kernel both use, as an embedding tied to the head.

ExecuTorch writes what kernels read into one segment of the file and what delegates read into segments of their own. A
segment is an offset and a size, so a delegate's segment may lie inside the kernels' one. The format is
`schema/program.fbs` of ExecuTorch: a flatbuffer behind an extended header, then the segments.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from pathlib import Path

from flatbuffers.table import Table

from mobizo_compiler.format import checksum

SMALLEST_BYTES = 1 << 16
HEADER = struct.Struct("<4s4s4sIQQQ")  # root offset, file identifier, then ExecuTorch's extended header
_SEGMENTS_SIZE_AT = HEADER.size - 8
_MOST_ALIGNED = 4096
# Positions of fields in the tables Program, DataSegment, SubsegmentOffsets and NamedData.
_SEGMENTS, _CONSTANT_SEGMENT, _NAMED_DATA = 4, 5, 7
_OFFSET, _SIZE = 0, 1
_SEGMENT_INDEX, _OFFSETS = 0, 1
_NAMED_SEGMENT_INDEX = 1


@dataclasses.dataclass
class _Segment:
    offset: int
    size: int
    offset_at: int  # where the offset is written; 0 if it is the default and not written
    inside: int | None = None  # the byte of the first segment where equal data begins


def share_equal_data(path: Path) -> int:
    """Let delegates read what the constant segment holds already, and leave their copies out.

    Returns:
        How many bytes smaller the file is. It is replaced by a smaller one, or left as it is.
    """
    sealed = checksum.is_sealed(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _, _, _, _, program_size, base, segments_size = HEADER.unpack(data[: HEADER.size])
        segments, constant, offsets, named = _parse(bytes(data[:program_size]))
        if constant is None:
            return 0
        _find_equal(data, base, segments, segments[constant], offsets, named)
        if all(segment.inside is None for segment in segments):
            return 0
        head = bytearray(data[:base])
        smaller = path.with_name(path.name + ".smaller")
        with smaller.open("wb") as out:
            out.write(head)
            end = 0
            for segment in sorted(segments, key=lambda segment: segment.offset):
                if segment.inside is None:
                    start = _aligned(end, segment.offset)
                    out.write(bytes(start - end))
                    out.write(data[base + segment.offset : base + segment.offset + segment.size])
                    end = start + segment.size
                    _write(head, segment, start)
                    segment.offset = start
            for segment in segments:
                if segment.inside is not None:
                    _write(head, segment, segments[constant].offset + segment.inside)
            struct.pack_into("<Q", head, _SEGMENTS_SIZE_AT, end)
            out.seek(0)
            out.write(head)
    if sealed:
        checksum.seal(smaller)
    os.replace(smaller, path)
    return int(segments_size) - end


def _parse(program: bytes) -> tuple[list[_Segment], int | None, list[int], set[int]]:
    """Segments, the index of the constant one, the offsets of constants in it, and the segments of named data."""
    root = Table(program, struct.unpack_from("<I", program)[0])
    segments = []
    for table in _tables(root, _SEGMENTS):
        offset_at = _field(table, _OFFSET)
        segments.append(_Segment(_u64(program, offset_at), _u64(program, _field(table, _SIZE)), offset_at))
    named = {_u32(program, _field(table, _NAMED_SEGMENT_INDEX)) for table in _tables(root, _NAMED_DATA)}
    at = _field(root, _CONSTANT_SEGMENT)
    if not at or not segments:
        return segments, None, [], named
    constants = Table(program, root.Indirect(at))
    vector = constants.Offset(4 + 2 * _OFFSETS)
    count, start = (constants.VectorLen(vector), constants.Vector(vector)) if vector else (0, 0)
    offsets = [_u64(program, start + 8 * index) for index in range(count)]
    return segments, _u32(program, _field(constants, _SEGMENT_INDEX)), offsets[1:], named


def _find_equal(
    data: mmap.mmap, base: int, segments: list[_Segment], constant: _Segment, offsets: list[int], named: set[int]
) -> None:
    ends = [*offsets[1:], constant.size]
    for index in named:
        segment = segments[index]
        if segment.size < SMALLEST_BYTES:
            continue
        for start, end in zip(offsets, ends, strict=True):
            at, other = base + constant.offset + start, base + segment.offset
            large_enough = end - start >= segment.size
            if large_enough and data[at : at + segment.size] == data[other : other + segment.size]:
                segment.inside = start
                break


def _tables(root: Table, field: int) -> list[Table]:
    vector = root.Offset(4 + 2 * field)
    if not vector:
        return []
    start = root.Vector(vector)
    return [Table(root.Bytes, root.Indirect(start + 4 * index)) for index in range(root.VectorLen(vector))]


def _field(table: Table, field: int) -> int:
    """Where a field is written; 0 if it has the default value and is not."""
    offset = table.Offset(4 + 2 * field)
    return table.Pos + offset if offset else 0


def _u64(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<Q", data, at)[0]) if at else 0


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0]) if at else 0


def _write(head: bytearray, segment: _Segment, offset: int) -> None:
    if segment.offset_at:
        struct.pack_into("<Q", head, segment.offset_at, offset)
    else:
        assert offset == segment.offset == 0


def _aligned(position: int, like: int) -> int:
    """The next position that is as aligned as another one is, up to a page."""
    alignment = min(like & -like, _MOST_ALIGNED) if like else _MOST_ALIGNED
    return -(-position // alignment) * alignment
