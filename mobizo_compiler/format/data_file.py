"""The state as a data file of ExecuTorch (`.ptd`), which the stock runtime reads beside a program.

    mobizo_lora_b         float32 [S], the flat state
    mobizo_fingerprint    uint8 [32], of the program; see `journal.py`
    mobizo_probe          float64 [17], what the adapter did where the file was written; see `probe.py`

The runtime looks at the state alone. The file is ExecuTorch's FlatTensor format with our checksum at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir.scalar_type import ScalarType
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from torch import Tensor

from mobizo_compiler.errors import ArtifactError, MobizoError
from mobizo_compiler.format import checksum
from mobizo_compiler.format.files import raw_bytes
from mobizo_compiler.format.probe import Probe
from mobizo_compiler.graph.program import STATE
from mobizo_compiler.upstream import Cord, DataEntry, DataPayload

FINGERPRINT, PROBE = "mobizo_fingerprint", "mobizo_probe"
_ALIGNMENT = 16


def packed(state: Tensor, fingerprint: bytes | None = None, probe: Probe | None = None) -> bytes:
    """The bytes of a data file.

    Args:
        state: float32 [S].
        fingerprint: Of the program whose state it is, if that is to be checked.
        probe: What the adapter does, if that is to be checked.
    """
    buffers = [bytes(raw_bytes(state))]
    named = {STATE: DataEntry(0, _ALIGNMENT, TensorLayout(ScalarType.FLOAT, list(state.shape), [0]))}
    if fingerprint is not None:
        buffers.append(fingerprint)
        named[FINGERPRINT] = DataEntry(1, _ALIGNMENT, TensorLayout(ScalarType.BYTE, [len(fingerprint)], [0]))
    if probe is not None:
        values = probe.tensor()
        named[PROBE] = DataEntry(len(buffers), _ALIGNMENT, TensorLayout(ScalarType.DOUBLE, list(values.shape), [0]))
        buffers.append(bytes(raw_bytes(values)))
    return checksum.sealed(bytes(FlatTensorSerializer().serialize(DataPayload(buffers, named))))


def read(path: Path, fingerprint: bytes, verify: bool = True) -> tuple[Tensor, Probe | None]:
    """The state [S] in a data file, and what its adapter did where it was written, if the file says so.

    Args:
        path: The file.
        fingerprint: Of the program that is to have it; a file that names another one is refused.
        verify: False for a file without our checksum and fingerprint, as the C++ runtime writes them.

    Raises:
        ArtifactError: There is no such file, or it is damaged, or has no state, or that of another program, or does not
            say of which.
    """
    if not path.is_file():
        raise ArtifactError("there is no such file", where=str(path))
    if verify:
        checksum.check(path)
    try:
        found = FlatTensorSerializer().deserialize(Cord(path.read_bytes()))
        entries, buffers = found.named_data, found.buffers
        if verify and FINGERPRINT not in entries:
            raise ArtifactError(
                "the file does not say which program its state is of",
                where=str(path),
                hint="verify=False takes it as it is, if you know",
            )
        if FINGERPRINT in entries and buffers[entries[FINGERPRINT].buffer_index] != fingerprint:
            raise ArtifactError("the file has the state of another program", where=str(path))
        state, probe = torch.from_numpy(_numbers(found, STATE, ScalarType.FLOAT, "<f4")), None
        if PROBE in entries:
            probe = Probe.from_tensor(torch.from_numpy(_numbers(found, PROBE, ScalarType.DOUBLE, "<f8")))
    except MobizoError:
        raise
    except Exception as error:
        raise ArtifactError(f"the file has no state that can be read: {error!r}", where=str(path)) from error
    return state, probe


def _numbers(payload: DataPayload, name: str, scalar: ScalarType, dtype: str) -> np.ndarray[Any, Any]:
    entry = payload.named_data[name]
    layout, values = entry.tensor_layout, np.frombuffer(payload.buffers[entry.buffer_index], dtype=dtype)
    if layout is None or layout.scalar_type != scalar or layout.sizes != [len(values)]:
        raise ValueError(f"{name} is {layout}")
    return values.copy()
