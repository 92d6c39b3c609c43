"""A bundle: calls of a program and what they must give, by which any host checks a program on its own processor.

One safetensors file, which appears whole or not at all. Its tensors are arguments and expected values; its metadata has

    mobizo_bundle    version of this format, "1"
    program          SHA-256 of the program file before its trailer, hexadecimal: the last 32 bytes of the file
    made_on          machine and versions that made it, as JSON, for people
    calls            the calls in their order, as JSON; see `Call`
    sha256           of the text "program calls", then of every tensor in the order of names: the text
                     "name torch.<dtype> [sizes]" and its bytes; hexadecimal

What a call gives is named `<call>/0`, `<call>/1`, ... and `<call>/state`, beside the tensors of the file. Arguments and
expected values of later calls may be among them, so that a host needs no more than a loop over calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mobizo_compiler.errors import ArtifactError, VerificationError
from mobizo_compiler.format.checksum import add_tensor
from mobizo_compiler.format.files import whole_file
from mobizo_compiler.step.agreement import largest_difference

VERSION = "1"
LARGEST, NORM, OTHERS = "largest difference", "norm of the difference", "share of others"
_MEASURES = (LARGEST, NORM, OTHERS)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a value must be.

    Args:
        value: Name of what a call gave.
        wanted: Name of what it should be.
        measure: How they are compared: `LARGEST`, where what is infinite or no number must be so in both; `NORM`; or
            `OTHERS`, the share of values that are not equal.
        tolerance: The measure may be so large.
    """

    value: str
    wanted: str
    measure: str
    tolerance: float

    def error(self, found: Tensor, wanted: Tensor) -> float:
        """The measure; infinite where shapes differ."""
        if found.shape != wanted.shape:
            return float("inf")
        if self.measure == NORM:
            return float((found.double() - wanted.double()).norm())
        if self.measure == OTHERS:
            return float((found != wanted).float().mean())
        return largest_difference(found, wanted)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a method.

    Args:
        name: Names what it gives.
        method: The method.
        state: Name of the state before it.
        arguments: Names of the arguments, the state not among them.
        expected: What it gives must be.
    """

    name: str
    method: str
    state: str
    arguments: tuple[str, ...]
    expected: tuple[Expected, ...]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a file has.

    Args:
        program: SHA-256 of the program, hexadecimal.
        made_on: What made it, for people.
        calls: In their order.
        tensors: By name.
    """

    program: str
    made_on: Mapping[str, str]
    calls: tuple[Call, ...]
    tensors: Mapping[str, Tensor]

    def write(self, path: Path) -> None:
        """Write it to a temporary name, flush it, and rename it."""
        calls = json.dumps([dataclasses.asdict(call) for call in self.calls])
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        described = {"mobizo_bundle": VERSION, "program": self.program, "calls": calls}
        described |= {"made_on": json.dumps(dict(self.made_on)), "sha256": _digest(self.program, calls, tensors)}
        with whole_file(path) as file:
            file.write(save(tensors, described))


def read_bundle(path: Path) -> Bundle:
    """The bundle in a file.

    Raises:
        ArtifactError: There is no such file, or it is none of this version, or damaged.
    """
    if not path.is_file():
        raise ArtifactError("there is no such file", where=str(path))
    try:
        with safe_open(path, framework="pt") as file:
            described: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"the bundle cannot be read: {error}", where=str(path)) from None
    version = described.get("mobizo_bundle")
    if version != VERSION:
        problem = "this is no bundle" if version is None else f"the bundle has version {version}, this reads {VERSION}"
        raise ArtifactError(problem, where=str(path), hint="mobizo bundle PROGRAM -o FILE")
    try:
        program, calls = described["program"], described["calls"]
        if described["sha256"] != _digest(program, calls, tensors):
            raise ArtifactError("the bundle is damaged: its checksum is another", where=str(path), hint="copy it again")
        return Bundle(program, json.loads(described["made_on"]), tuple(map(_call, json.loads(calls))), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the bundle lacks or has unknown fields: {error!r}", where=str(path)) from None


def check_expected(expected: Expected, values: Mapping[str, Tensor], where: str) -> float:
    """The measure of one expectation.

    Raises:
        VerificationError: It is above the tolerance, or no number.
    """
    found, wanted = values[expected.value], values[expected.wanted]
    error = expected.error(found, wanted)
    if not error <= expected.tolerance:
        raise VerificationError(
            f"{expected.value}: the {expected.measure} is {error:.3g}, more than {expected.tolerance:.3g}",
            where=f"{where}: found {_few(found)}, expected {_few(wanted)}",
            hint="copy the program again; if that does not help, this processor, emulator or runtime computes other "
            "numbers than the one that the bundle was made on: do not train here, and report it",
        )
    return error


def _call(values: Any) -> Call:
    expected = tuple(Expected(**item) for item in values.pop("expected"))
    if any(one.measure not in _MEASURES for one in expected):
        raise ValueError(f"a measure is none of {_MEASURES}")
    return Call(**{**values, "arguments": tuple(values["arguments"])}, expected=expected)


def _digest(program: str, calls: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{program} {calls}".encode())
    for name, tensor in sorted(tensors.items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def _few(values: Tensor) -> str:
    first: Sequence[float] = values.flatten()[:4].to(torch.float64).tolist()
    return "[" + ", ".join(f"{value:.6g}" for value in first) + (", ...]" if values.numel() > 4 else "]")
