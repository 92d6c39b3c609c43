"""Tensors in the safetensors format, inside of a larger file: written one by one, and mapped instead of read.

The format is 8 bytes with the length of a header, the header in JSON, and the values without gaps. It holds nothing
that could be executed. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from typing import IO

import torch
from torch import Tensor

from mobizo_compiler.errors import ArtifactError
from mobizo_compiler.format.files import raw_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_MOST_HEADER_BYTES = 100_000_000  # as in the reference implementation


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], position: int) -> None:
    """Write tensors to a file.

    Args:
        file: Where to write.
        tensors: Tensors of the dtypes in `DTYPES`.
        position: Where in the outermost file the first byte goes; the values begin at a multiple of 64 bytes there.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # keeps every one aligned
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(position + 8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        if tensor.numel():
            file.write(raw_bytes(tensor))


def map_tensors(data: mmap.mmap, position: int, size: int, where: str) -> dict[str, Tensor]:
    """The tensors of a mapped file, as aliases of it.

    Args:
        data: The file; the tensors keep it alive.
        position: Where in it the tensors begin.
        size: How many bytes they take.
        where: The file's name, for errors.

    Raises:
        ArtifactError: The header is damaged.
    """
    try:
        length = int.from_bytes(data[position : position + 8], "little")
        if length > min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(data[position + 8 : position + 8 + length])
        first, end = position + 8 + length, position + size
        return {name: _map(data, first, end, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"the weights cannot be read: {error!r}", where=where) from None


def _map(data: mmap.mmap, first: int, end: int, entry: dict[str, list[int]]) -> Tensor:
    dtype, shape = DTYPES[str(entry["dtype"])], entry["shape"]
    start, stop = (first + offset for offset in entry["data_offsets"])
    count = math.prod(shape)
    if not first <= start <= stop <= end or stop - start != count * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} at {entry['data_offsets']}")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).reshape(shape)
