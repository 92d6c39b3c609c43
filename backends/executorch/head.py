"""The head of a program file, read with the readers that ExecuTorch generates from its schema and ships.

A `.pte` is a flatbuffer (`schema/program.fbs`) behind an extended header, then segments. The readers look up what they
are asked for and parse nothing else; the segments, where the weights are, are not read at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from mobizo_compiler.upstream import ExtendedHeader, ProgramReader, make_readers_whole, read_header, read_program

HEAD_BYTES: int = ExtendedHeader.NUM_HEAD_BYTES  # at most so many bytes from the start of a file until the header ends
_HEADER_AT = 8  # after the flatbuffer's own offset and identifier
_FIRST_FIELD = 4  # of a vtable, which begins with two sizes of two bytes


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
    changed = dataclasses.replace(header, segment_data_size=segments_size).to_bytes()
    head[_HEADER_AT : _HEADER_AT + len(changed)] = changed
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
