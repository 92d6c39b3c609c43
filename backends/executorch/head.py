"""The head of a program file, read with the readers that ExecuTorch generates from its schema and ships.

A `.pte` is a flatbuffer (`schema/program.fbs`) behind an extended header, then segments. The readers look up what they
are asked for and parse nothing else; the segments, where the weights are, are not read at all.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from mobizo_compiler.upstream import ProgramReader, make_readers_whole, read_program

HEAD_BYTES = 64  # at most so many bytes from the start of a file until the header ends
_HEADER_AT = 8  # after the flatbuffer's own offset and identifier
_HEADER = struct.Struct("<4sIQQQ")  # magic, its own length, then what `Header` has
_HEADER_MAGIC, _SHORTEST_HEADER = b"eh00", 24  # without the last number
_FIRST_FIELD = 4  # of a vtable, which begins with two sizes of two bytes


@dataclasses.dataclass(frozen=True)
class Header:
    """ExecuTorch's extended header (`docs/source/pte-file-format.md` there).

    Args:
        program_size: Bytes of the flatbuffer, with this header.
        segment_base_offset: Where the first segment begins; 0 without segments.
        segment_data_size: Bytes of all segments; 0 if there are none or the file does not say.
    """

    program_size: int
    segment_base_offset: int
    segment_data_size: int


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of the file behind the head.

    Args:
        offset: First byte, counted from the first segment.
        size: In bytes.
        offset_at: Where in the head the offset is written; None if it is 0, which is not written.
    """

    offset: int
    size: int
    offset_at: int | None


@dataclasses.dataclass(frozen=True)
class Head:
    """What the head of a file says about its segments.

    Args:
        segments: All of them.
        constant: Index of the segment that kernels read constants from; None without one.
        constants: Where each constant begins in it.
        named: Indices of the segments that delegates read.
        delegates: Names of the delegates that the methods call, in order.
    """

    segments: tuple[Segment, ...]
    constant: int | None
    constants: tuple[int, ...]
    named: frozenset[int]
    delegates: tuple[str, ...]


def is_program(start: bytes) -> bool:
    """Whether a file that begins so is a program of ExecuTorch."""
    return len(start) >= HEAD_BYTES and bool(ProgramReader.ProgramBufferHasIdentifier(start, 0))


def read_header(start: bytes) -> Header | None:
    """The extended header in the first `HEAD_BYTES` of a file; None if there is none."""
    found = start[_HEADER_AT : _HEADER_AT + _HEADER.size]
    if len(found) < _HEADER.size:
        return None
    magic, length, program_size, base, size = _HEADER.unpack(found)
    if magic != _HEADER_MAGIC or length < _SHORTEST_HEADER:
        return None
    return Header(program_size, base, size if length >= _HEADER.size else 0)


def read_head(data: bytes) -> Head:
    """The head of a file.

    Args:
        data: The file's first `program_size` bytes, or more.
    """
    make_readers_whole()  # modules import each other in a circle, and some find modules where classes should be
    program: Any = ProgramReader.GetRootAs(data)
    segments = tuple(_segment(segment) for segment in _items(program, "Segments"))
    constants = program.ConstantSegment()
    offsets = () if constants is None else tuple(constants.Offsets(i) for i in range(constants.OffsetsLength()))
    names = [d.Id() for plan in _items(program, "ExecutionPlan") for d in _items(plan, "Delegates")]
    return Head(
        segments,
        constants.SegmentIndex() if offsets and segments else None,
        offsets[1:],  # the first one stands for no constant
        frozenset(named.SegmentIndex() for named in _items(program, "NamedData")),
        tuple(dict.fromkeys(name.decode() for name in names)),
    )


def write_offsets(head: bytearray, segments: tuple[Segment, ...], offsets: list[int], segments_size: int) -> None:
    """Say in the head of a file that its segments begin elsewhere, and how long they are together.

    Args:
        head: Everything before the first segment; it is changed.
        segments: As `read_head` found them.
        offsets: Where each of them begins now.
        segments_size: From the first to the end of the last, in bytes.
    """
    header = read_header(bytes(head[:HEAD_BYTES]))
    assert header is not None
    numbers = (header.program_size, header.segment_base_offset, segments_size)
    _HEADER.pack_into(head, _HEADER_AT, _HEADER_MAGIC, _HEADER.size, *numbers)
    for segment, offset in zip(segments, offsets, strict=True):
        if segment.offset_at is not None:
            head[segment.offset_at : segment.offset_at + 8] = offset.to_bytes(8, "little")
    found = [segment.offset for segment in read_head(bytes(head)).segments]
    assert found == offsets, "the head does not say what was written into it"


def _segment(segment: Any) -> Segment:
    # The readers give values, not where they are written; the offset is the first field of its table.
    place = segment._tab.Offset(_FIRST_FIELD)
    return Segment(segment.Offset(), segment.Size(), segment._tab.Pos + place if place else None)


def _items(table: Any, field: str) -> Iterator[Any]:
    return (getattr(table, field)(index) for index in range(cast(int, getattr(table, f"{field}Length")())))


def execution_plans(path: Path) -> list[Any]:
    """What the methods of a program file make the runtime do. Only its first part is read, not the weights."""
    with path.open("rb") as file:
        header = read_header(file.read(HEAD_BYTES))
        file.seek(0)
        program = read_program(file.read(header.program_size if header else -1))
    return list(program.execution_plan)
